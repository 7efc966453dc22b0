//! TLS settings: certificates by server name for listeners, trust for upstreams.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, OnceLock},
};

use anyhow::{Context, bail};
use rustls::{
    CipherSuite, ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection,
    crypto::CryptoProvider,
    server::{ClientHello, ProducesTickets, ResolvesServerCert},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};

use crate::config::schema::{Certificate, Tls};

/// Makes the process' cryptography ready; to be called once at start.
pub fn init() {
    // A second call finds the first one's provider, which is the same.
    let _ = provider().install_default();
}

/// aws-lc-rs, with AES-128-GCM in front where the CPU has instructions for AES, else with ChaCha20. AES-128 is not known
/// to be weaker in any way that matters (RFC 8446 makes it the one cipher that all must have), and its SHA-256 has
/// instructions on most CPUs where the SHA-384 of AES-256 has none: a handshake hashes for its keys many times.
///
/// Key exchange is with X25519 where the peer offers it; its hybrid with ML-KEM is last, so that it is used with who
/// offers nothing else.
fn provider() -> CryptoProvider {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    let rank = |suite: CipherSuite| match suite {
        CipherSuite::TLS13_AES_128_GCM_SHA256
        | CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
        | CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 => 1,
        CipherSuite::TLS13_CHACHA20_POLY1305_SHA256
        | CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256
        | CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256 => {
            if has_aes() {
                3
            } else {
                0
            }
        }
        _ => 2,
    };
    // Stable: TLS 1.3 stays before 1.2 within a rank; a suite is of one version, so they never compete.
    provider.cipher_suites.sort_by_key(|suite| rank(suite.suite()));
    provider
}

/// Whether the CPU has instructions for AES and for GCM's multiplication.
#[cfg(target_arch = "x86_64")]
fn has_aes() -> bool {
    std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq")
}

/// Whether the CPU has instructions for AES and for GCM's multiplication.
#[cfg(target_arch = "aarch64")]
fn has_aes() -> bool {
    std::arch::is_aarch64_feature_detected!("aes") && std::arch::is_aarch64_feature_detected!("pmull")
}

/// Not known.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn has_aes() -> bool {
    false
}

/// A listener's settings. Tickets are sealed with keys that all cores share, so that a session resumes on
/// whichever core the kernel picks.
pub fn server_config(tls: &Tls) -> anyhow::Result<Arc<ServerConfig>> {
    let certificates = match tls {
        Tls::One(one) => std::slice::from_ref(one),
        Tls::Several(several) => several.as_slice(),
    };
    let resolver = Resolver::load(certificates)?;
    let mut config = ServerConfig::builder_with_provider(provider().into())
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(resolver));
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    // The server's order counts: most clients name AES-256 first.
    config.ignore_client_order = true;
    config.ticketer = ticketer()?;
    // Stateless tickets carry the session; a shared session cache would be a lock between cores.
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    Ok(Arc::new(config))
}

/// The seal of all listeners' tickets; it lives as long as the process, so that sessions resume after a reload too.
/// rustls changes its key every six hours and honours the one before.
fn ticketer() -> anyhow::Result<Arc<dyn ProducesTickets>> {
    static TICKETER: OnceLock<Arc<dyn ProducesTickets>> = OnceLock::new();
    if let Some(ticketer) = TICKETER.get() {
        return Ok(ticketer.clone());
    }
    let fresh = rustls::crypto::aws_lc_rs::Ticketer::new()?;
    Ok(TICKETER.get_or_init(|| fresh).clone())
}

/// A session for an accepted connection.
pub fn server_session(config: &Arc<ServerConfig>) -> Result<rustls::Connection, rustls::Error> {
    Ok(ServerConnection::new(config.clone())?.into())
}

/// The settings for a provider's endpoints: the system's roots, or the authorities in `ca` alone.
pub fn client_config(ca: Option<&Path>) -> anyhow::Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    match ca {
        Some(path) => {
            for certificate in CertificateDer::pem_file_iter(path).with_context(|| at(path))? {
                roots
                    .add(certificate.with_context(|| at(path))?)
                    .with_context(|| at(path))?;
            }
        }
        None => {
            let native = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(native.certs);
        }
    }
    if roots.is_empty() {
        match ca {
            Some(path) => bail!("{} holds no certificate", path.display()),
            None => {
                bail!("the system has no root certificates (Debian: install ca-certificates, or set `ca`)")
            }
        }
    }
    let mut config = ClientConfig::builder_with_provider(provider().into())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// A session towards an upstream whose certificate must name `host`.
pub fn client_session(config: &Arc<ClientConfig>, host: &str) -> anyhow::Result<rustls::Connection> {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let name = ServerName::try_from(host.to_string())?;
    Ok(ClientConnection::new(config.clone(), name)?.into())
}

/// Picks a certificate by the name that the client asks for.
#[derive(Debug)]
struct Resolver {
    by_name: HashMap<String, Arc<CertifiedKey>>,
    default: Arc<CertifiedKey>,
}

impl Resolver {
    fn load(certificates: &[Certificate]) -> anyhow::Result<Resolver> {
        let mut by_name = HashMap::new();
        let mut default = None;
        for entry in certificates {
            let key = Arc::new(load_key(entry)?);
            for name in dns_names(&key.cert[0]) {
                by_name.entry(name).or_insert_with(|| key.clone());
            }
            default.get_or_insert(key);
        }
        let default = default.context("a TLS listener needs a certificate")?;
        Ok(Resolver { by_name, default })
    }
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let Some(name) = hello.server_name() else {
            return Some(self.default.clone());
        };
        let name = name.to_ascii_lowercase();
        let wildcard = || {
            name.split_once('.')
                .and_then(|(_, rest)| self.by_name.get(&format!("*.{rest}")))
        };
        Some(
            self.by_name
                .get(&name)
                .or_else(wildcard)
                .unwrap_or(&self.default)
                .clone(),
        )
    }
}

fn load_key(entry: &Certificate) -> anyhow::Result<CertifiedKey> {
    let path = &entry.certificate;
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .with_context(|| at(path))?;
    if chain.is_empty() {
        bail!("{} holds no certificate", path.display());
    }
    let key = PrivateKeyDer::from_pem_file(&entry.key).with_context(|| at(&entry.key))?;
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    CertifiedKey::from_der(chain, key, &provider)
        .with_context(|| format!("{} and {} do not fit", path.display(), entry.key.display()))
}

/// The DNS names that a certificate is valid for, lower case.
fn dns_names(certificate: &CertificateDer<'_>) -> Vec<String> {
    match webpki::EndEntityCert::try_from(certificate) {
        Ok(leaf) => leaf.valid_dns_names().map(str::to_ascii_lowercase).collect(),
        // Served all the same where it is the default; clients judge it.
        Err(_) => Vec::new(),
    }
}

fn at(path: &Path) -> String {
    format!("cannot use {}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_a_certificate() {
        let names = vec![
            "A.example".to_string(),
            "*.b.example".to_string(),
            "127.0.0.1".to_string(),
        ];
        let made = rcgen::generate_simple_self_signed(names).expect("certificate");
        assert_eq!(dns_names(made.cert.der()), ["a.example", "*.b.example"]);
    }
}
