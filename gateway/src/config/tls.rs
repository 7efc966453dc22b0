//! Reads the PEM files that the configuration names.

use std::{fs, path::Path, sync::Arc};

use rustls::{RootCertStore, crypto::aws_lc_rs, sign::CertifiedKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};

use super::schema::Certificate;

/// Largest PEM file, bytes. The system's bundle of authorities has about 220 KiB.
const PEM_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Reads a listener's certificate chain and private key, and makes sure that they belong together.
///
/// # Errors
/// Names the file and what is wrong with it; never shows its content.
pub fn certified_key(files: &Certificate) -> Result<CertifiedKey, String> {
    let chain = certificates(&files.certificate)?;
    let path = &files.key;
    let pem = read(path)?;
    let key = PrivateKeyDer::from_pem_slice(&pem)
        .map_err(|error| format!("{} holds no private key: {}", path.display(), lower(&error)))?;
    let certified = CertifiedKey::from_der(chain, key, &aws_lc_rs::default_provider());
    certified.map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => format!(
            "the private key {} does not belong to the certificate {}",
            path.display(),
            files.certificate.display()
        ),
        error => format!(
            "cannot use {} with {}: {}",
            files.certificate.display(),
            path.display(),
            lower(&error)
        ),
    })
}

/// Reads the certificate authorities that a provider trusts.
///
/// # Errors
/// Names the file and what is wrong with it.
pub fn authorities(path: &Path) -> Result<Arc<RootCertStore>, String> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(path)? {
        let added = store.add(certificate);
        added.map_err(|error| format!("{}: {}", path.display(), lower(&error)))?;
    }
    Ok(Arc::new(store))
}

/// The certificates of a PEM file, at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let pem = read(path)?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match chain {
        Ok(chain) if chain.is_empty() => Err(format!("{} holds no certificate", path.display())),
        Ok(chain) => Ok(chain),
        Err(error) => Err(format!("{} is no PEM file: {}", path.display(), lower(&error))),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    let cannot = |error: std::io::Error| format!("cannot read {}: {error}", path.display());
    let metadata = fs::metadata(path).map_err(cannot)?;
    if !metadata.is_file() || metadata.len() > PEM_BYTES_MAX {
        return Err(format!(
            "{} is not a file of at most {PEM_BYTES_MAX} bytes",
            path.display()
        ));
    }
    fs::read(path).map_err(cannot)
}

fn lower(error: &dyn std::fmt::Display) -> String {
    super::error::plain_words(&error.to_string())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    struct Files {
        dir: tempfile::TempDir,
    }

    impl Files {
        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn pair(&self, certificate: &str, key: &str) -> Result<CertifiedKey, String> {
            certified_key(&Certificate {
                certificate: self.path(certificate),
                key: self.path(key),
            })
        }
    }

    fn files() -> Files {
        let files = Files {
            dir: tempfile::tempdir().unwrap(),
        };
        for name in ["a", "b"] {
            let made = rcgen::generate_simple_self_signed([format!("{name}.test")]).unwrap();
            fs::write(files.path(&format!("{name}.pem")), made.cert.pem()).unwrap();
            fs::write(
                files.path(&format!("{name}.key")),
                made.signing_key.serialize_pem(),
            )
            .unwrap();
        }
        fs::write(files.path("empty"), "").unwrap();
        fs::write(
            files.path("broken"),
            "-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n",
        )
        .unwrap();
        files
    }

    #[test]
    fn a_certificate_needs_its_own_key() {
        let files = files();
        assert_eq!(files.pair("a.pem", "a.key").unwrap().cert.len(), 1);
        for (certificate, key, part) in [
            ("a.pem", "b.key", "does not belong to the certificate"),
            ("a.key", "a.key", "a.key holds no certificate"),
            ("a.pem", "b.pem", "b.pem holds no private key"),
            ("empty", "a.key", "empty holds no certificate"),
            ("broken", "a.key", "broken is no PEM file"),
            ("absent", "a.key", "cannot read"),
            (".", "a.key", "is not a file"),
        ] {
            let error = files.pair(certificate, key).map(drop).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn authorities_are_read() {
        let files = files();
        assert_eq!(authorities(&files.path("a.pem")).unwrap().len(), 1);
        assert!(authorities(&files.path("a.key")).is_err());
    }
}
