//! Keys for the configuration file, made without a gateway.

use std::io::Read;

use super::Create;
use crate::{
    cli::client::print,
    config::{generate_key, key_hash, sha256_hex},
};

/// Longest secret that is read, bytes.
const SECRET_BYTES_MAX: u64 = 4096;

/// Makes a key and prints it with its line.
///
/// # Errors
/// The operating system gives no random bytes, or standard output cannot be written.
pub(super) fn create(create: &Create) -> anyhow::Result<()> {
    let key = generate_key().map_err(|error| anyhow::anyhow!("no random bytes: {error}"))?;
    let line = config_line(create, &key);
    if create.admin.json {
        let sha256 = sha256_hex(&key_hash(&key));
        let object = serde_json::json!({ "name": create.name, "key": key, "sha256": sha256, "line": line });
        return print(&format!("{object}\n"));
    }
    print(&format!(
        "{key}\n\nThe key is shown only this once. Add this line under `keys:`, then `gateway reload`:\n\n  {line}\n"
    ))
}

/// Prints the SHA-256 of the secret on standard input.
///
/// # Errors
/// There is none.
pub(super) fn hash() -> anyhow::Result<()> {
    let mut text = String::new();
    std::io::stdin()
        .take(SECRET_BYTES_MAX)
        .read_to_string(&mut text)?;
    match text.trim() {
        "" => anyhow::bail!("there is no secret on standard input"),
        secret => print(&format!("{}\n", sha256_hex(&key_hash(secret)))),
    }
}

/// The key's entry in the configuration, as YAML in flow style.
fn config_line(create: &Create, key: &str) -> String {
    let mut line = format!(
        "- {{ name: {}, sha256: \"{}\"",
        yaml_text(&create.name),
        sha256_hex(&key_hash(key))
    );
    if let Some(team) = &create.settings.team {
        line += &format!(", team: {}", yaml_text(team));
    }
    if !create.settings.models.is_empty() {
        let models: Vec<String> = create
            .settings
            .models
            .iter()
            .map(|model| yaml_text(model))
            .collect();
        line += &format!(", models: [{}]", models.join(", "));
    }
    line + " }"
}

/// A text as YAML takes it: bare where it cannot be misread, otherwise as a JSON string, which is
/// YAML too.
fn yaml_text(text: &str) -> String {
    const WORDS: [&str; 12] = [
        "true", "false", "null", "yes", "no", "on", "off", "y", "n", "inf", "nan", "~",
    ];
    let letter_first = text.starts_with(|c: char| c.is_ascii_alphabetic());
    let bare = text
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/'));
    match letter_first && bare && !WORDS.contains(&text.to_ascii_lowercase().as_str()) {
        true => text.to_owned(),
        false => serde_json::Value::from(text).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        create: Create,
    }

    fn create(name: &str, team: Option<&str>, models: &[&str]) -> Create {
        let mut line = <Line as clap::Parser>::parse_from(["create", "--offline", "--name", "x"]).create;
        line.name = name.into();
        line.settings.team = team.map(Into::into);
        line.settings.models = models.iter().map(|model| (*model).into()).collect();
        line
    }

    #[test]
    fn the_line_reads_like_in_the_documentation() {
        let line = config_line(&create("alice", Some("search"), &["fast", "gpt-5"]), "abc");
        assert_eq!(
            line,
            "- { name: alice, sha256: \"ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad\", \
             team: search, models: [fast, gpt-5] }"
        );
    }

    #[test]
    fn any_name_comes_back_from_the_file() {
        for name in [
            "alice", "true", "No", "12", "1e3", "a b", "a: b", "a #b", "{x}", "é\"\\", "-", "*a", "a,b", "~",
        ] {
            let line = config_line(&create(name, Some(name), &[name]), "abc");
            let quoted = yaml_text(name);
            let text = format!(
                "listeners: [{{ address: 127.0.0.1:8080 }}]\n\
                 providers: {{ p: {{ kind: openai }} }}\n\
                 models: [{{ name: {quoted}, targets: [{{ provider: p }}] }}]\n\
                 teams: [{{ name: {quoted} }}]\n\
                 keys:\n  {line}\n"
            );
            let config = config::parse(&text, "test", Path::new("/"), &|_| None).unwrap();
            let key = &config.keys[0];
            assert_eq!(key.name, name);
            assert_eq!(key.team.as_deref(), Some(name));
            assert_eq!(key.models.as_deref(), Some(&[name.to_owned()][..]));
        }
    }
}
