//! Admin tokens: where they come from, and how they are compared.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, bail};
use arc_swap::ArcSwap;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::config::{Config, schema::Role, units::Secret};

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

/// Whose token a request has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Who {
    /// `admin` for the one of `admin.token`.
    pub name: Arc<str>,
    pub role: Role,
}

/// Knows the tokens' hashes. Hashes of what is presented are compared in constant time, and always with all of them, so
/// neither a token's length nor how much of it was right can be measured.
pub struct Guard {
    tokens: ArcSwap<Vec<([u8; 32], Arc<Who>)>>,
}

impl Guard {
    /// Admits the configuration's tokens.
    ///
    /// # Errors
    /// As [`token`].
    pub fn new(config: &Config) -> anyhow::Result<Guard> {
        Ok(Guard {
            tokens: ArcSwap::from_pointee(tokens(config)?),
        })
    }

    /// Admits another configuration's tokens from now on.
    pub fn set(&self, tokens: Vec<([u8; 32], Arc<Who>)>) {
        self.tokens.store(Arc::new(tokens));
    }

    /// Whose token this is.
    pub(super) fn admits(&self, presented: Option<&str>) -> Option<Arc<Who>> {
        let presented = presented.filter(|token| !token.is_empty())?;
        let hash: [u8; 32] = Sha256::digest(presented.as_bytes()).into();
        let mut found = None;
        for (known, who) in self.tokens.load().iter() {
            if bool::from(known.ct_eq(&hash)) {
                found = Some(who.clone());
            }
        }
        found
    }
}

/// All admin tokens of a configuration, as hashes.
///
/// # Errors
/// As [`token`].
pub fn tokens(config: &Config) -> anyhow::Result<Vec<([u8; 32], Arc<Who>)>> {
    let entry = |token: &Secret, name: &str, role| {
        let hash = Sha256::digest(token.expose().as_bytes()).into();
        (
            hash,
            Arc::new(Who {
                name: name.into(),
                role,
            }),
        )
    };
    let mut tokens = vec![entry(&token(config)?, "admin", Role::Admin)];
    let named = config.admin.tokens.iter();
    tokens.extend(named.map(|named| entry(&named.token, &named.name, named.role)));
    Ok(tokens)
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
        let config = |more: &str| -> Config {
            let text = format!("listeners: [{{ address: '127.0.0.1:0' }}]\nadmin: {{ token: right{more} }}");
            crate::config::parse(&text, "test", Path::new("/"), &|_| None).expect("a configuration")
        };
        let named = ", tokens: [{ name: eve, token: 0123456789abcdef }, \
                     { name: ops, token: fedcba9876543210, role: admin }]";
        let guard = Guard::new(&config(named)).expect("tokens");
        let who = |token: &str| {
            guard
                .admits(Some(token))
                .map(|who| (who.name.to_string(), who.role))
        };
        assert_eq!(who("right"), Some(("admin".into(), Role::Admin)));
        assert_eq!(who("0123456789abcdef"), Some(("eve".into(), Role::Viewer)));
        assert_eq!(who("fedcba9876543210"), Some(("ops".into(), Role::Admin)));
        assert_eq!(guard.admits(None), None);
        for wrong in ["", "righ", "right ", "Right"] {
            assert_eq!(who(wrong), None, "{wrong:?}");
        }
        guard.set(tokens(&config("")).expect("tokens"));
        assert_eq!(who("0123456789abcdef"), None);
        assert!(who("right").is_some());
    }
}
