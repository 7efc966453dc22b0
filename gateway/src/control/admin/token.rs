//! The admin token: where it comes from, and how it is compared.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::config::{Config, units::Secret};

/// Random bytes of a generated token.
const TOKEN_BYTES: usize = 32;

/// Largest token file that is read, bytes.
const FILE_BYTES_MAX: u64 = 4096;

/// Where a generated token is kept.
pub fn token_path(state: &Path) -> PathBuf {
    state.join("admin.token")
}

/// The admin token: the configuration's, else the one in `admin.token` under `ledger.path`, which is
/// made when it is not there.
///
/// # Errors
/// The token is empty, or its file cannot be read or written.
pub fn token(config: &Config) -> anyhow::Result<Secret> {
    match &config.admin.token {
        Some(token) if token.expose().trim().is_empty() => bail!("admin.token is empty"),
        Some(token) => Ok(token.clone()),
        None => kept_or_new(&token_path(&config.ledger.path)),
    }
}

fn kept_or_new(path: &Path) -> anyhow::Result<Secret> {
    let kept = read(path).with_context(|| format!("cannot read the admin token {}", path.display()))?;
    match kept {
        Some(token) => Ok(token),
        None => create(path).with_context(|| format!("cannot write the admin token {}", path.display())),
    }
}

/// The token of a file; none where there is no file, or an empty one.
pub(super) fn read(path: &Path) -> io::Result<Option<Secret>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mode = file.metadata()?.permissions().mode();
    if mode & 0o077 != 0 {
        tracing::warn!(path = %path.display(), "the admin token was open to others; it is closed to them now");
        file.set_permissions(fs::Permissions::from_mode(0o600))?;
    }
    let mut text = String::new();
    file.take(FILE_BYTES_MAX).read_to_string(&mut text)?;
    let token = text.trim();
    Ok((!token.is_empty()).then(|| Secret::new(token)))
}

/// Makes a token and puts its file in place whole, so that a crash leaves none or a good one.
fn create(path: &Path) -> io::Result<Secret> {
    let mut random = [0; TOKEN_BYTES];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    let token = crate::config::sha256_hex(&random);
    let draft = path.with_extension(format!("token.{}", std::process::id()));
    let written = write_new(&draft, &token).and_then(|()| fs::rename(&draft, path));
    if let Err(error) = written {
        let _ = fs::remove_file(&draft);
        return Err(error);
    }
    Ok(Secret::new(token))
}

fn write_new(path: &Path, token: &str) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(token.as_bytes())?;
    file.write_all(b"\n")?;
    file.sync_all()
}

/// Knows the token's hash. Hashes of what is presented are compared in constant time, so neither
/// the token's length nor how much of it was right can be measured.
pub(super) struct Guard {
    hash: [u8; 32],
}

impl Guard {
    pub(super) fn new(token: &Secret) -> Guard {
        Guard {
            hash: Sha256::digest(token.expose().as_bytes()).into(),
        }
    }

    /// Whether this is the token.
    pub(super) fn admits(&self, presented: Option<&str>) -> bool {
        let Some(presented) = presented.filter(|token| !token.is_empty()) else {
            return false;
        };
        let hash: [u8; 32] = Sha256::digest(presented.as_bytes()).into();
        hash.ct_eq(&self.hash).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_made_once_and_kept_private() {
        let dir = tempfile::tempdir().expect("directory");
        let path = token_path(dir.path());
        let first = kept_or_new(&path).expect("made");
        assert_eq!(first.expose().len(), 2 * TOKEN_BYTES);
        let mode = fs::metadata(&path).expect("file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(kept_or_new(&path).expect("kept"), first);
        let files = fs::read_dir(dir.path()).expect("directory").count();
        assert_eq!(files, 1, "no draft is left");
    }

    #[test]
    fn an_open_file_is_closed_and_an_empty_one_replaced() {
        let dir = tempfile::tempdir().expect("directory");
        let path = token_path(dir.path());
        fs::write(&path, "from-outside\n").expect("write");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("mode");
        assert_eq!(kept_or_new(&path).expect("kept").expose(), "from-outside");
        let mode = fs::metadata(&path).expect("file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::write(&path, " \n").expect("write");
        assert_eq!(kept_or_new(&path).expect("made").expose().len(), 2 * TOKEN_BYTES);
    }

    #[test]
    fn only_the_token_is_admitted() {
        let guard = Guard::new(&Secret::new("right"));
        assert!(guard.admits(Some("right")));
        for wrong in [None, Some(""), Some("righ"), Some("right "), Some("Right")] {
            assert!(!guard.admits(wrong), "{wrong:?}");
        }
        assert!(!Guard::new(&Secret::new("")).admits(Some("")));
    }
}
