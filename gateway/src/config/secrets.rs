//! Resolves `${env:NAME}`, `${file:/path}` and `${credential:NAME}` in the fields that are secret.

use std::{
    fs::File,
    io::{self, Read as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path as FilePath, PathBuf},
};

use super::{load::Env, schema::Config, tree::Path, units::Secret};

/// Largest file that holds a secret, bytes.
const SECRET_BYTES_MAX: u64 = 64 * 1024;

/// Where systemd puts the credentials of a service (systemd.exec(5), "Credentials").
const CREDENTIALS_DIRECTORY: &str = "CREDENTIALS_DIRECTORY";

/// Where references are looked up.
pub(super) struct Sources<'a> {
    /// The configuration's directory: relative paths begin here.
    pub base_dir: &'a FilePath,
    pub env: Env<'a>,
}

/// What became of the text of a secret.
pub(super) struct Resolved {
    pub value: String,
    /// The text was the secret itself.
    pub literal: bool,
    /// The file that held the secret can be read by every user of the host.
    pub exposed_file: Option<PathBuf>,
}

/// Every secret of the configuration with its path.
pub(super) fn fields(config: &mut Config) -> Vec<(Path, &mut Secret)> {
    let root = Path::default();
    let mut fields = Vec::new();
    if let Some(token) = &mut config.admin.token {
        fields.push((root.name("admin").name("token"), token));
    }
    if let Some(password) = config.store.as_mut().and_then(|store| store.password.as_mut()) {
        fields.push((root.name("store").name("password"), password));
    }
    let tokens = root.name("admin").name("tokens");
    for (index, token) in config.admin.tokens.iter_mut().enumerate() {
        fields.push((tokens.index(index).name("token"), &mut token.token));
    }
    if let Some(token) = &mut config.alerts.token {
        fields.push((root.name("alerts").name("token"), token));
    }
    let providers = root.name("providers");
    for (name, provider) in &mut config.providers {
        if let Some(key) = &mut provider.key {
            fields.push((providers.name(name).name("key"), key));
        }
    }
    fields
}

/// Finds the value that `text` refers to; a text without a reference is the secret itself.
///
/// # Errors
/// Names the variable or the file, never a value.
pub(super) fn resolve(text: &str, sources: &Sources<'_>) -> Result<Resolved, String> {
    if !text.contains("${") {
        return literal(text);
    }
    let inner = text.strip_prefix("${").and_then(|rest| rest.strip_suffix('}'));
    let reference = inner.filter(|inner| !inner.contains(['$', '{', '}']));
    let (kind, name) = reference
        .and_then(|inner| inner.split_once(':'))
        .filter(|(_, name)| !name.is_empty())
        .ok_or("not a reference; write ${env:NAME}, ${file:/path} or ${credential:NAME} and nothing else")?;
    match kind {
        "env" => from_env(name, sources),
        "file" => from_file(&sources.base_dir.join(name)),
        "credential" => from_credential(name, sources),
        _ => Err(format!(
            "unknown kind of reference {}{}",
            super::error::quote(kind),
            super::error::hint(kind, ["env", "file", "credential"])
        )),
    }
}

fn literal(text: &str) -> Result<Resolved, String> {
    check(text).map_err(|what| format!("the secret {what}"))?;
    Ok(Resolved {
        value: text.to_owned(),
        literal: true,
        exposed_file: None,
    })
}

fn from_env(name: &str, sources: &Sources<'_>) -> Result<Resolved, String> {
    let value = (sources.env)(name).ok_or_else(|| format!("environment variable `{name}` is not set"))?;
    let value = value.trim_end_matches(['\r', '\n']);
    check(value).map_err(|what| format!("environment variable `{name}` {what}"))?;
    Ok(Resolved {
        value: value.to_owned(),
        literal: false,
        exposed_file: None,
    })
}

fn from_credential(name: &str, sources: &Sources<'_>) -> Result<Resolved, String> {
    if name.contains('/') || name == "." || name == ".." {
        return Err(format!("`{name}` is not the name of a credential"));
    }
    let directory = (sources.env)(CREDENTIALS_DIRECTORY).ok_or_else(|| {
        format!("credential `{name}`: {CREDENTIALS_DIRECTORY} is not set (LoadCredential= of the systemd unit sets it)")
    })?;
    let resolved = from_file(&FilePath::new(&directory).join(name))?;
    // systemd guards the directory itself.
    Ok(Resolved {
        exposed_file: None,
        ..resolved
    })
}

fn from_file(path: &FilePath) -> Result<Resolved, String> {
    let shown = path.display();
    let (bytes, mode) = read_bounded(path).map_err(|error| format!("cannot read {shown}: {error}"))?;
    let text = String::from_utf8(bytes).map_err(|_| format!("{shown} is not UTF-8 text"))?;
    let value = text.trim_end_matches(['\r', '\n']);
    check(value).map_err(|what| format!("{shown} {what}"))?;
    const READABLE_BY_OTHERS: u32 = 0o004;
    Ok(Resolved {
        value: value.to_owned(),
        literal: false,
        exposed_file: (mode & READABLE_BY_OTHERS != 0).then(|| path.to_owned()),
    })
}

/// Reads a regular file (a pipe could block the start for ever) and its mode.
fn read_bounded(path: &FilePath) -> io::Result<(Vec<u8>, u32)> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let file = File::open(path)?;
    let mode = file.metadata()?.permissions().mode();
    let mut bytes = Vec::new();
    file.take(SECRET_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > SECRET_BYTES_MAX {
        return Err(io::Error::other(format!("larger than {SECRET_BYTES_MAX} bytes")));
    }
    Ok((bytes, mode))
}

/// A secret goes into a header field, where a control character would end it (RFC 9110, section 5.5).
fn check(value: &str) -> Result<(), &'static str> {
    if value.is_empty() {
        return Err("is empty");
    }
    match value.bytes().any(|byte| !byte.is_ascii_graphic()) {
        true => Err("holds a space, control or non-ASCII character"),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn try_resolve(text: &str, dir: &FilePath) -> Result<(String, bool), String> {
        let directory = dir.display().to_string();
        let env = move |name: &str| match name {
            "KEY" => Some("from-env\n".to_owned()),
            "EMPTY" => Some(String::new()),
            "BROKEN" => Some("hunter2\r\nhost: x".to_owned()),
            CREDENTIALS_DIRECTORY => Some(directory.clone()),
            _ => None,
        };
        let sources = Sources {
            base_dir: dir,
            env: &env,
        };
        resolve(text, &sources).map(|resolved| (resolved.value, resolved.literal))
    }

    #[test]
    fn references_are_resolved() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), "from-file\r\n").unwrap();
        let absolute = format!("${{file:{}/token}}", dir.path().display());
        for (text, expected, literal) in [
            ("${env:KEY}", "from-env", false),
            ("${file:token}", "from-file", false),
            (absolute.as_str(), "from-file", false),
            ("${credential:token}", "from-file", false),
            ("sk-plain$1", "sk-plain$1", true),
        ] {
            assert_eq!(try_resolve(text, dir.path()), Ok((expected.to_owned(), literal)));
        }
    }

    #[test]
    fn what_cannot_be_resolved_says_why_without_the_value() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("large"), vec![b'x'; 64 * 1024 + 1]).unwrap();
        std::fs::write(dir.path().join("binary"), [0xff, 0xfe]).unwrap();
        std::fs::write(dir.path().join("lines"), "hunter2\nhunter3\n").unwrap();
        for (text, part) in [
            ("${env:NOPE}", "environment variable `NOPE` is not set"),
            ("${env:EMPTY}", "environment variable `EMPTY` is empty"),
            (
                "${env:BROKEN}",
                "environment variable `BROKEN` holds a space, control",
            ),
            ("${file:absent}", "absent: No such file"),
            ("${file:large}", "larger than 65536 bytes"),
            ("${file:binary}", "is not UTF-8 text"),
            ("${file:lines}", "holds a space, control"),
            ("${file:.}", "not a regular file"),
            ("${credential:../x}", "is not the name of a credential"),
            ("${env:}", "not a reference"),
            ("${KEY}", "not a reference"),
            ("x${env:KEY}", "not a reference"),
            ("${env:KEY}${env:KEY}", "not a reference"),
            (
                "${enf:KEY}",
                "unknown kind of reference `enf`; did you mean `env`?",
            ),
            ("", "the secret is empty"),
            ("hunter2 x", "the secret holds a space"),
        ] {
            let error = try_resolve(text, dir.path()).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
            assert!(!error.contains("hunter"), "{error}");
        }
    }
}
