//! Teams, keys and limits.

use std::collections::HashMap;

use super::{Known, MONTH, SECOND, refers, root, span, unique_names};
use crate::config::{
    Config, key_hash,
    load::Report,
    parse_sha256,
    schema::{Key, Limit},
    tree::Path,
};

pub(super) fn teams(config: &Config, report: &mut Report<'_>) {
    unique_names(
        "teams",
        config.teams.iter().map(|team| team.name.as_str()),
        report,
    );
}

pub(super) fn keys(config: &Config, known: &Known<'_>, report: &mut Report<'_>) {
    unique_names("keys", config.keys.iter().map(|key| key.name.as_str()), report);
    if config.keys.is_empty() {
        report.warning(
            &Path::default(),
            "no `keys`: every request is refused; `gateway keys create` makes one at run time",
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

pub(super) fn limits(config: &Config, known: &Known<'_>, report: &mut Report<'_>) {
    for (index, limit) in config.limits.iter().enumerate() {
        let path = root("limits").index(index);
        if limit.requests.is_none() && limit.tokens.is_none() {
            report.error(&path, "a limit needs `requests`, `tokens` or both");
        }
        span(&path.name("every"), limit.every, SECOND, MONTH, report);
        matches(&path.name("match"), limit, known, report);
    }
}

fn matches(path: &Path, limit: &Limit, known: &Known<'_>, report: &mut Report<'_>) {
    let wanted = &limit.matches;
    if let Some(key) = &wanted.key {
        refers(&path.name("key"), "key", key, &known.keys, report);
    }
    if let Some(team) = &wanted.team {
        refers(&path.name("team"), "team", team, &known.teams, report);
    }
    if let Some(model) = &wanted.model {
        refers(&path.name("model"), "model", model, &known.models, report);
    }
    let (Some(key), Some(team)) = (&wanted.key, &wanted.team) else {
        return;
    };
    if known
        .keys
        .get(key.as_str())
        .is_some_and(|of_key| *of_key != Some(team))
    {
        report.warning(
            path,
            format!("key `{key}` is not in team `{team}`: the limit counts nothing"),
        );
    }
}
