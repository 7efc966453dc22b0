//! What several hosts share.

use super::{MILLISECOND, MINUTE, SECOND, quote, root, span};
use crate::config::{
    Config,
    load::Report,
    schema::{PREFIX_BYTES_MAX, STORE_NODES_MAX},
    tls,
    tree::Path,
};

pub(super) fn store(config: &Config, report: &mut Report<'_>) {
    let Some(store) = &config.store else { return };
    let path = root("store");
    match (&store.redis, store.cluster.is_empty()) {
        (Some(text), true) => url(&path.name("redis"), text, report),
        (None, false) => {}
        (Some(_), false) => report.error(&path, "has both `redis` and `cluster`; one is meant"),
        (None, true) => report.error(&path, "has neither `redis` nor `cluster`"),
    }
    let nodes = store.cluster.len();
    if nodes > STORE_NODES_MAX {
        let path = path.name("cluster");
        report.error(&path, format!("{nodes} nodes; the most is {STORE_NODES_MAX}"));
    }
    for (index, text) in store.cluster.iter().enumerate() {
        url(&path.name("cluster").index(index), text, report);
    }
    if let Some(Err(message)) = store.ca.as_deref().map(tls::authorities) {
        report.error(&path.name("ca"), message);
    }
    let proper = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let prefix = &store.prefix;
    if prefix.is_empty() || prefix.len() > PREFIX_BYTES_MAX || !prefix.chars().all(proper) {
        let message = format!(
            "{} is not 1 to {PREFIX_BYTES_MAX} letters, digits, `-`, `_` or `.`",
            quote(prefix)
        );
        report.error(&path.name("prefix"), message);
    }
    span(&path.name("lease"), store.lease, SECOND, MINUTE, report);
    span(
        &path.name("round"),
        store.round,
        crate::config::units::Span(MILLISECOND.0 * 10),
        SECOND,
        report,
    );
    if store.round.0 * 10 > store.lease.0 {
        report.error(
            &path.name("round"),
            "must be at most a tenth of `lease`, or leases run out between rounds",
        );
    }
    if store.first_share > 100 {
        report.error(&path.name("first_share"), "is more than 100 percent");
    }
}

fn url(path: &Path, text: &str, report: &mut Report<'_>) {
    let Some(rest) = text
        .strip_prefix("redis://")
        .or_else(|| text.strip_prefix("rediss://"))
    else {
        // The text may hold a password in a wrong place.
        report.error(path, "must begin with redis:// or rediss://");
        return;
    };
    if rest.contains('@') {
        report.error(
            path,
            "has a user or password; write them as `store.username` and `store.password`",
        );
        return;
    }
    let (authority, database) = rest.split_once('/').unwrap_or((rest, ""));
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
    let port = authority.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
    if host.is_empty() || matches!(port, Some(Err(_))) && !authority.ends_with(']') {
        report.error(path, "is not redis://host:port[/database]");
    }
    if !database.is_empty() && database.parse::<u8>().is_err() {
        report.error(path, "has a database that is not a number");
    }
}

#[cfg(test)]
mod tests {
    use crate::config::parse;

    fn errors(store: &str) -> String {
        let text = format!(
            "listeners: [{{ address: 127.0.0.1:0 }}]\nproviders: {{ sim: {{ kind: openai }} }}\n\
             models: [{{ name: m, targets: [{{ provider: sim }}] }}]\nkeys: []\nstore: {store}\n"
        );
        let parsed = parse(&text, "test", std::path::Path::new("/"), &|_| None);
        parsed.err().map(|errors| errors.to_string()).unwrap_or_default()
    }

    #[test]
    fn what_is_right_passes() {
        for store in [
            "{ redis: redis://127.0.0.1 }",
            "{ redis: \"rediss://[::1]:6380/2\", password: open-sesame, username: me }",
            "{ cluster: [redis://a:1, redis://b:2], lease: 10s, round: 100ms, first_share: 0, on_store_loss: refuse }",
        ] {
            assert_eq!(errors(store), "", "{store}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_without_secrets() {
        for (store, part) in [
            ("{}", "neither `redis` nor `cluster`"),
            (
                "{ redis: redis://a, cluster: [redis://b] }",
                "both `redis` and `cluster`",
            ),
            ("{ redis: http://a }", "must begin with redis://"),
            ("{ redis: \"redis://:hunter2@a\" }", "store.password"),
            ("{ redis: redis://a:x }", "is not redis://host:port"),
            ("{ redis: redis:///1 }", "is not redis://host:port"),
            ("{ redis: redis://a/x }", "a database that is not a number"),
            ("{ redis: redis://a, prefix: \"{x}\" }", "is not 1 to 64 letters"),
            ("{ redis: redis://a, lease: 100ms }", "too short"),
            (
                "{ redis: redis://a, lease: 1s, round: 500ms }",
                "a tenth of `lease`",
            ),
            ("{ redis: redis://a, first_share: 101 }", "more than 100 percent"),
            ("{ redis: redis://a, ca: /nowhere.pem }", "nowhere.pem"),
        ] {
            let errors = errors(store);
            assert!(errors.contains(part), "{store}: {errors}");
            assert!(!errors.contains("hunter2"), "{errors}");
        }
    }
}
