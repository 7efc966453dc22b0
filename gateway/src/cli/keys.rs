//! `gateway keys`: makes virtual keys.

use std::process::ExitCode;

use clap::{Subcommand, builder::NonEmptyStringValueParser};

use crate::{
    bounds::NAME_BYTES_MAX,
    config::{generate_key, key_hash, sha256_hex},
};

/// Make virtual keys for clients
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Create(Create),
}

/// Make a key, print it once, and the line for the configuration file
///
/// The key is random and kept nowhere: the configuration holds only its SHA-256. Nothing is read
/// or written; put the line under `keys:` and reload.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  gateway keys create --name alice
  gateway keys create --name search-prod --team search --models fast,embed
  gateway keys create --name alice --json | jq -r .key")]
struct Create {
    /// Unique name of the key, seen in logs and in the ledger
    #[arg(long, value_parser = parse_name)]
    name: String,
    /// Team that the key belongs to, an entry of `teams`
    #[arg(long, value_parser = parse_name)]
    team: Option<String>,
    /// Models that the key may use, separated by commas; all if absent
    #[arg(long, value_delimiter = ',', value_parser = NonEmptyStringValueParser::new())]
    models: Vec<String>,
    /// Print one JSON object with name, key, sha256 and line, for scripts
    #[arg(long)]
    json: bool,
}

/// A name that the configuration would take.
fn parse_name(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > NAME_BYTES_MAX {
        return Err(format!("a name has 1 to {NAME_BYTES_MAX} bytes"));
    }
    if text.chars().any(char::is_control) || text.trim() != text {
        return Err("a name has no control characters, nor spaces at its ends".into());
    }
    Ok(text.to_owned())
}

/// Runs the command.
pub fn run(args: &Args) -> ExitCode {
    let Command::Create(create) = &args.command;
    let key = match generate_key() {
        Ok(key) => key,
        Err(error) => {
            eprintln!("no random bytes from the operating system: {error}");
            return ExitCode::FAILURE;
        }
    };
    let line = config_line(create, &key);
    if create.json {
        let sha256 = sha256_hex(&key_hash(&key));
        println!(
            "{}",
            serde_json::json!({ "name": create.name, "key": key, "sha256": sha256, "line": line })
        );
    } else {
        println!(
            "{key}\n\nThe key is shown only this once. Add this line under `keys:`, then `gateway reload`:\n\n  {line}"
        );
    }
    ExitCode::SUCCESS
}

/// The key's entry in the configuration, as YAML in flow style.
fn config_line(create: &Create, key: &str) -> String {
    let mut line = format!(
        "- {{ name: {}, sha256: \"{}\"",
        yaml_text(&create.name),
        sha256_hex(&key_hash(key))
    );
    if let Some(team) = &create.team {
        line += &format!(", team: {}", yaml_text(team));
    }
    if !create.models.is_empty() {
        let models: Vec<String> = create.models.iter().map(|model| yaml_text(model)).collect();
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

    fn create(name: &str, team: Option<&str>, models: &[&str]) -> Create {
        Create {
            name: name.into(),
            team: team.map(Into::into),
            models: models.iter().map(|model| (*model).into()).collect(),
            json: false,
        }
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

    #[test]
    fn names_are_checked_before_a_key_is_made() {
        assert!(parse_name("alice").is_ok());
        for wrong in ["", " a", "a\n", "a\u{7}b", &"x".repeat(129)] {
            assert!(parse_name(wrong).is_err());
        }
    }
}
