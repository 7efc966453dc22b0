//! Listeners and what the process itself needs.

use std::net::SocketAddr;

use super::{DAY, HOUR, MILLISECOND, MINUTE, hint, quote, root, span};
use crate::config::{
    Config,
    defaults::LISTENERS_MAX,
    load::Report,
    parse_endpoint,
    schema::{ClickHouse, Listener},
    tls,
    tree::Path,
    units::{Bytes, Span},
};

pub(super) fn listeners(config: &Config, report: &mut Report<'_>) {
    let path = root("listeners");
    if config.listeners.is_empty() {
        report.error(&path, "at least one listener is needed");
    }
    if config.listeners.len() > LISTENERS_MAX {
        let count = config.listeners.len();
        report.error(&path, format!("{count} listeners; the most is {LISTENERS_MAX}"));
        return;
    }
    for (index, listener) in config.listeners.iter().enumerate() {
        let path = path.index(index);
        let earlier = &config.listeners[..index];
        // Port 0 asks the kernel for a free port, so two of them do not meet.
        let same = |other: &Listener| other.address == listener.address && other.address.port() != 0;
        if let Some(other) = earlier.iter().position(same) {
            let message = format!(
                "{} is already the address of listeners[{other}]",
                listener.address
            );
            report.error(&path.name("address"), message);
        }
        certificates(&path.name("tls"), listener, report);
        super::proxies::check(&path, listener, report);
    }
}

fn certificates(path: &Path, listener: &Listener, report: &mut Report<'_>) {
    let Some(tls) = &listener.tls else { return };
    if tls.certificates().is_empty() {
        report.error(path, "at least one certificate is needed");
    }
    for (index, files) in tls.certificates().iter().enumerate() {
        let path = match tls {
            crate::config::schema::Tls::One(_) => path.clone(),
            crate::config::schema::Tls::Several(_) => path.index(index),
        };
        if let Err(message) = tls::certified_key(files) {
            report.error(&path, message);
        }
    }
}

pub(super) fn admin(config: &Config, report: &mut Report<'_>) {
    let path = root("admin").name("address");
    let address = config.admin.address;
    for (index, listener) in config.listeners.iter().enumerate() {
        if clash(address, listener.address) {
            report.error(
                &path,
                format!("{address} clashes with the address of listeners[{index}]"),
            );
        }
    }
    if !address.ip().is_loopback() && config.admin.token.is_none() {
        report.warning(
            &path,
            format!(
                "{address} can be reached from other hosts, in plain HTTP; set `token` and guard the network"
            ),
        );
    }
}

/// Whether two sockets cannot both be bound: same port, and same address or one of them a wildcard.
fn clash(one: SocketAddr, other: SocketAddr) -> bool {
    let wildcard = one.ip().is_unspecified() || other.ip().is_unspecified();
    one.port() == other.port() && one.port() != 0 && (wildcard || one.ip() == other.ip())
}

pub(super) fn http(config: &Config, report: &mut Report<'_>) {
    const BODY_MAX_LEAST: Bytes = Bytes(1 << 10);
    const BODY_MAX_MOST: Bytes = Bytes(1 << 30);
    let (path, http) = (root("http"), &config.http);
    let body_max = http.body_max;
    if body_max < BODY_MAX_LEAST {
        let message = format!("{body_max} is too small; the least is {BODY_MAX_LEAST}");
        report.error(&path.name("body_max"), message);
    } else if body_max > BODY_MAX_MOST {
        let message = format!("{body_max} is too large; the most is {BODY_MAX_MOST}");
        report.error(&path.name("body_max"), message);
    }
    if http.bodies_max < body_max {
        let message = format!("{} is less than `body_max`, which is {body_max}", http.bodies_max);
        report.error(&path.name("bodies_max"), message);
    }
    for (name, value) in [
        ("head_timeout", http.head_timeout),
        ("body_timeout", http.body_timeout),
        ("idle_timeout", http.idle_timeout),
        ("write_timeout", http.write_timeout),
    ] {
        span(&path.name(name), value, MILLISECOND, DAY, report);
    }
}

pub(super) fn ledger(config: &Config, report: &mut Report<'_>) {
    let (path, ledger) = (root("ledger"), &config.ledger);
    span(&path.name("sync"), ledger.sync, MILLISECOND, MINUTE, report);
    if ledger.retention != Span::secs(0) {
        let path = path.name("retention");
        span(&path, ledger.retention, DAY, Span::secs(3650 * 86_400), report);
    }
    if let Some(export) = &ledger.export {
        clickhouse(
            &path.name("export").name("clickhouse"),
            &export.clickhouse,
            report,
        );
    }
    if ledger.path.exists() && !ledger.path.is_dir() {
        let message = format!("{} is not a directory", ledger.path.display());
        report.error(&path.name("path"), message);
    }
}

fn clickhouse(path: &Path, server: &ClickHouse, report: &mut Report<'_>) {
    match parse_endpoint(&server.url) {
        Ok(url) if url.tls => {
            let message = "https is not spoken here: reach the server by a tunnel or a proxy on this host";
            report.error(&path.name("url"), message);
        }
        Ok(_) => {}
        Err(message) => report.error(&path.name("url"), message),
    }
    let is_name = |name: &str| {
        let mut bytes = name.bytes();
        bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
            && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_')
    };
    let mut parts = server.table.split('.');
    if !(parts.by_ref().take(2).all(is_name) && parts.next().is_none()) {
        let message = format!(
            "{} is not a table's name: `table` or `database.table`",
            quote(&server.table)
        );
        report.error(&path.name("table"), message);
    }
    let every_min = Span(std::time::Duration::from_millis(100));
    span(&path.name("every"), server.every, every_min, HOUR, report);
}

pub(super) fn log(config: &Config, report: &mut Report<'_>) {
    let (path, log) = (root("log"), &config.log);
    if let Err(message) = level(&log.level) {
        report.error(&path.name("level"), message);
    }
    let access = log.access.as_str();
    if !ACCESS_WORDS.contains(&access) && !is_file_of_access_log(access) {
        let message = format!(
            "unknown word {}{}; a path has a slash",
            quote(access),
            hint(access, ACCESS_WORDS)
        );
        report.error(&path.name("access"), message);
    }
}

const ACCESS_WORDS: [&str; 3] = ["off", "stdout", "stderr"];

/// Whether the access log goes to a file. A path needs a slash, so that a slip in `stdout` makes no
/// file of that name.
pub(in crate::config) fn is_file_of_access_log(access: &str) -> bool {
    access.contains('/')
}

/// Checks `info` or `info,gateway::kernel=debug`: an unknown level would be taken for a module.
fn level(text: &str) -> Result<(), String> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    for directive in text.split(',') {
        let word = directive
            .rsplit_once('=')
            .map_or(directive, |(_, level)| level)
            .trim();
        if !LEVELS.iter().any(|level| level.eq_ignore_ascii_case(word)) {
            return Err(format!("unknown level {}{}", quote(word), hint(word, LEVELS)));
        }
    }
    Ok(())
}
