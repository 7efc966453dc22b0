//! Why the kernel's help is not to be had, in words that say what to do.

use std::{error::Error, fmt, fs, io};

/// CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_PERFMON and CAP_BPF (include/uapi/linux/capability.h).
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

/// The oldest kernel the programs are written for.
const KERNEL_MIN: (u32, u32) = (5, 15);
/// From 5.11 on, BPF memory is charged to the cgroup and no longer to RLIMIT_MEMLOCK.
const KERNEL_WITHOUT_MEMLOCK: (u32, u32) = (5, 11);

/// How aya begins what the verifier said.
const VERIFIER: &str = "Verifier output";

/// The kernel plane, or a part of it, is off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Off {
    /// What is missing and what to do, lower case, one sentence.
    pub reason: String,
}

impl fmt::Display for Off {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl Error for Off {}

impl Off {
    pub(super) fn new(reason: impl Into<String>) -> Off {
        Off {
            reason: reason.into(),
        }
    }

    /// `what` failed with `error`. A refusal for want of rights names the right, an old kernel its age.
    pub(super) fn failed(what: &str, error: &(dyn Error + 'static)) -> Off {
        let mut reason = format!("{what} failed: {}", chain(error));
        if denied(error) {
            reason.push_str(" (not permitted: a container, seccomp or kernel lockdown forbids bpf())");
        } else if let Some(old) = too_old() {
            reason.push_str(&old);
        } else if reason.contains(VERIFIER) && !may(CAP_PERFMON) {
            reason.push_str(" (CAP_PERFMON is missing, without which older kernels admit less: add it to the service's AmbientCapabilities)");
        }
        Off { reason }
    }
}

/// The first missing thing without which nothing can be loaded.
pub(super) fn missing() -> Option<Off> {
    if !may(CAP_BPF) {
        return Some(Off::new(
            "CAP_BPF is missing: run as root, or give the service AmbientCapabilities=CAP_BPF CAP_PERFMON CAP_NET_ADMIN",
        ));
    }
    None
}

/// What `sock_ops` and XDP need beyond [`missing`].
pub(super) fn missing_net_admin() -> Option<Off> {
    (!may(CAP_NET_ADMIN))
        .then(|| Off::new("CAP_NET_ADMIN is missing: add it to the service's AmbientCapabilities"))
}

/// Lifts RLIMIT_MEMLOCK where old kernels charge maps to it. Failure is left to the map that does not fit.
pub(super) fn lift_memlock() {
    if version().is_none_or(|version| version >= KERNEL_WITHOUT_MEMLOCK) {
        return;
    }
    let limit = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: setrlimit reads one rlimit structure, which lives on the stack for the call.
    if unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) } != 0 {
        tracing::warn!(error = %io::Error::last_os_error(), "RLIMIT_MEMLOCK stays: set LimitMEMLOCK=infinity");
    }
}

/// Whether this thread has the capability in force; CAP_SYS_ADMIN includes both for bpf().
fn may(capability: u32) -> bool {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    effective(&status).is_none_or(|set| set >> capability & 1 == 1 || set >> CAP_SYS_ADMIN & 1 == 1)
}

/// The effective set of `/proc/…/status`; None when unreadable, and then the kernel's own answer decides.
fn effective(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

pub(super) fn version() -> Option<(u32, u32)> {
    parse_version(&fs::read_to_string("/proc/sys/kernel/osrelease").ok()?)
}

fn parse_version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn too_old() -> Option<String> {
    let (major, minor) = version()?;
    let (min_major, min_minor) = KERNEL_MIN;
    ((major, minor) < KERNEL_MIN)
        .then(|| format!(" (kernel {major}.{minor}; {min_major}.{min_minor} or later is needed)"))
}

/// An error and its causes on one line. aya's errors often repeat their cause in their own text.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    // The verifier's log has thousands of lines: the fault is the last one before its statistics.
    let statistics = ["verification time", "stack depth", "processed "];
    let mut lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !statistics.iter().any(|word| line.starts_with(word)))
        .collect();
    if lines.len() > 1 {
        tracing::debug!(error = %text, "the whole of it");
        let skipped = lines.len().saturating_sub(2).max(1);
        lines.drain(1..skipped);
    }
    lines.join(" | ")
}

/// True when a cause is EPERM. EACCES is what the verifier answers to a program that it does not admit.
pub(super) fn denied(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(cause) = next {
        if let Some(io) = cause.downcast_ref::<io::Error>() {
            return io.raw_os_error() == Some(libc::EPERM);
        }
        next = cause.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases() {
        assert_eq!(parse_version("6.18.44-fc-v657\n"), Some((6, 18)));
        assert_eq!(parse_version("5.15.0-91-generic"), Some((5, 15)));
        assert_eq!(parse_version("5.4"), Some((5, 4)));
        assert_eq!(parse_version("?"), None);
    }

    #[test]
    fn capability_sets() {
        let status = "Name:\tx\nCapPrm:\t0000000000000000\nCapEff:\t0000008000001000\n";
        let set = effective(status).expect("a set");
        assert_eq!(set >> CAP_BPF & 1, 1);
        assert_eq!(set >> CAP_NET_ADMIN & 1, 1);
        assert_eq!(set >> CAP_SYS_ADMIN & 1, 0);
        assert_eq!(effective("Name:\tx\n"), None);
    }

    #[test]
    fn a_denial_says_so_and_a_chain_is_one_line() {
        let denied = io::Error::from_raw_os_error(libc::EPERM);
        let off = Off::failed("loading", &denied);
        assert!(off.reason.starts_with("loading failed: "), "{off}");
        assert!(off.reason.contains("not permitted"), "{off}");
        let long = io::Error::other("first\n1\n2\n3\n\nfault\nprocessed 7 insns");
        assert_eq!(Off::failed("x", &long).reason, "x failed: first | 3 | fault");
    }
}
