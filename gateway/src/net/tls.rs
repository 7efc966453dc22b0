//! TLS settings: certificates by server name for listeners, trust for upstreams.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, OnceLock},
};

use anyhow::{Context, bail};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection,
    server::{ClientHello, ProducesTickets, ResolvesServerCert},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};

use crate::config::schema::{Certificate, Tls};

/// Makes the process' cryptography ready; to be called once at start.
pub fn init() {
    // A second call finds the first one's provider, which is the same.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

/// A listener's settings. Tickets are sealed with keys that all cores share, so that a session resumes on
/// whichever core the kernel picks.
pub fn server_config(tls: &Tls) -> anyhow::Result<Arc<ServerConfig>> {
    let certificates = match tls {
        Tls::One(one) => std::slice::from_ref(one),
        Tls::Several(several) => several.as_slice(),
    };
    let resolver = Resolver::load(certificates)?;
    let mut config = ServerConfig::builder()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(resolver));
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
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
    let mut config = ClientConfig::builder()
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
