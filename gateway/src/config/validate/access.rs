//! Keys.

use std::collections::HashMap;

use super::{Known, refers, root, unique_names};
use crate::config::{Config, key_hash, load::Report, parse_sha256, schema::Key, tree::Path};

pub(super) fn keys(config: &Config, known: &Known<'_>, report: &mut Report<'_>) {
    unique_names("keys", config.keys.iter().map(|key| key.name.as_str()), report);
    if config.keys.is_empty() {
        report.warning(
            &Path::default(),
            "no `keys` in this file: only those that `gateway keys create` makes at run time are let in",
        );
    }
    let mut first: HashMap<[u8; 32], usize> = HashMap::new();
    for (index, key) in config.keys.iter().enumerate() {
        let path = root("keys").index(index);
        references(&path, key, known, report);
        let path = path.name("sha256");
        let Some(hash) = parse_sha256(&key.sha256) else {
            report.error(&path, not_a_hash(&key.sha256));
            continue;
        };
        if hash == key_hash("") {
            report.error(&path, "this is the SHA-256 of nothing");
        }
        match first.get(&hash) {
            Some(other) => report.error(&path, format!("the same key as keys[{other}]")),
            None => drop(first.insert(hash, index)),
        }
    }
}

/// Says why a text is no hash, without the text: it may be a key put there by mistake.
fn not_a_hash(text: &str) -> String {
    let found = text.chars().count();
    match text.chars().all(|c| c.is_ascii_hexdigit()) {
        true => format!("a SHA-256 has 64 hex digits, found {found}"),
        false => "not a SHA-256 of 64 hex digits; put the hash of the key here, not the key".into(),
    }
}

fn references(path: &Path, key: &Key, known: &Known<'_>, report: &mut Report<'_>) {
    if let Some(team) = &key.team {
        refers(&path.name("team"), "team", team, &known.teams, report);
    }
    let Some(models) = &key.models else { return };
    let path = path.name("models");
    if models.is_empty() {
        report.warning(&path, "the list is empty: the key may use no model");
    }
    for (index, model) in models.iter().enumerate() {
        refers(&path.index(index), "model", model, &known.models, report);
    }
}
