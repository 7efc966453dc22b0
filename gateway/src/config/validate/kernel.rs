//! What runs in the kernel.

use std::fmt::Display;
use std::ops::RangeInclusive;

use super::{DAY, HOUR, SECOND, root, span};
use crate::config::{Config, load::Report, tree::Path};

/// Longest name of an instance, bytes: it names a directory.
const INSTANCE_BYTES_MAX: usize = 32;

/// Longest name of an interface, bytes (IFNAMSIZ less its end).
const INTERFACE_BYTES_MAX: usize = 15;

/// Most that a rate or a count of connections may be.
const CONNECTIONS_MAX: u32 = 1_000_000;

pub(super) fn kernel(config: &Config, report: &mut Report<'_>) {
    let (path, kernel) = (root("kernel"), &config.kernel);
    drop(config, &path.name("drop"), report);
    connections(config, &path.name("connections"), report);
    if kernel.cgroup.as_ref().is_some_and(|cgroup| !cgroup.is_absolute()) {
        let message = "not an absolute path; cgroup2 is mounted at /sys/fs/cgroup";
        report.error(&path.name("cgroup"), message);
    }
    if !kernel.bpffs.is_absolute() {
        let message = "not an absolute path; bpffs is mounted at /sys/fs/bpf";
        report.error(&path.name("bpffs"), message);
    }
    if kernel.instance.as_deref().is_some_and(|name| !is_instance(name)) {
        let message = format!("not 1 to {INSTANCE_BYTES_MAX} letters, digits, `-` or `_`");
        report.error(&path.name("instance"), message);
    }
    if kernel
        .xdp
        .as_ref()
        .is_some_and(|xdp| !is_interface(&xdp.interface))
    {
        let message = "not the name of an interface, such as eth0";
        report.error(&path.name("xdp").name("interface"), message);
    }
}

fn drop(config: &Config, path: &Path, report: &mut Report<'_>) {
    let drop = &config.kernel.drop;
    span(&path.name("within"), drop.within, SECOND, HOUR, report);
    span(&path.name("for"), drop.hold, SECOND, DAY, report);
    super::proxies::escalation(&path.name("escalation"), drop, report);
    range(&path.name("prefix_v4"), drop.prefix_v4, 8..=32, report);
    range(&path.name("prefix_v6"), drop.prefix_v6, 32..=128, report);
}

fn connections(config: &Config, path: &Path, report: &mut Report<'_>) {
    let connections = &config.kernel.connections;
    for (name, value) in [
        ("per_client_rate", connections.per_client_rate),
        ("burst", connections.burst),
        ("per_client_open", connections.per_client_open),
    ] {
        if let Some(value) = value {
            range(&path.name(name), value, 1..=CONNECTIONS_MAX, report);
        }
    }
    let half_open = connections.half_open;
    range(&path.name("half_open"), half_open, 0..=CONNECTIONS_MAX, report);
    if connections.burst.is_some() && connections.per_client_rate.is_none() {
        report.error(&path.name("burst"), "means nothing without per_client_rate");
    }
}

fn range<T: PartialOrd + Display>(path: &Path, value: T, range: RangeInclusive<T>, report: &mut Report<'_>) {
    if !range.contains(&value) {
        let (least, most) = (range.start(), range.end());
        report.error(path, format!("{value} is not within {least} to {most}"));
    }
}

fn is_instance(name: &str) -> bool {
    let known = |c: u8| c.is_ascii_alphanumeric() || c == b'-' || c == b'_';
    !name.is_empty() && name.len() <= INSTANCE_BYTES_MAX && name.bytes().all(known)
}

/// As the kernel judges names of interfaces (`dev_valid_name`, net/core/dev.c).
fn is_interface(name: &str) -> bool {
    let forbidden = |c: char| c == '/' || c == ':' || c.is_whitespace() || c == '\0';
    !name.is_empty()
        && name.len() <= INTERFACE_BYTES_MAX
        && name != "."
        && name != ".."
        && !name.contains(forbidden)
}
