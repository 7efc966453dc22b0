//! Capabilities: what loading needs is given up when it is done.
//!
//! Maps are then used through descriptors that are open already, which needs no right since 5.19 (`__sys_bpf`,
//! kernel/bpf/syscall.c: `unprivileged_bpf_disabled` keeps from making maps and programs only). Before that CAP_BPF stays.

use std::{fs, io};

use super::off;

/// Capabilities of include/uapi/linux/capability.h, by number and name.
const CAP_NET_ADMIN: (u32, &str) = (12, "CAP_NET_ADMIN");
const CAP_SYS_ADMIN: (u32, &str) = (21, "CAP_SYS_ADMIN");
const CAP_PERFMON: (u32, &str) = (38, "CAP_PERFMON");
const CAP_BPF: (u32, &str) = (39, "CAP_BPF");

/// From 5.19 on, maps can be read and written without CAP_BPF.
const KERNEL_WITH_FREE_MAPS: (u32, u32) = (5, 19);

/// `_LINUX_CAPABILITY_VERSION_3` (include/uapi/linux/capability.h): sets of 64 bits, in two words.
const CAPABILITY_VERSION: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Gives up for good, in this thread and those that it starts, what only loading needed: CAP_NET_ADMIN, CAP_PERFMON, root's
/// CAP_SYS_ADMIN, and CAP_BPF where the kernel is 5.19 or later. Returns the names of those that were there.
///
/// # Errors
/// The kernel refused; then nothing has changed.
pub fn shed() -> io::Result<Vec<&'static str>> {
    let mut unneeded = vec![CAP_NET_ADMIN, CAP_PERFMON];
    if off::version().is_some_and(|version| version >= KERNEL_WITH_FREE_MAPS) {
        // CAP_SYS_ADMIN includes CAP_BPF.
        unneeded.extend([CAP_BPF, CAP_SYS_ADMIN]);
    }
    let mut sets = get()?;
    let held = |sets: &[Sets; 2], number: u32| sets[number as usize / 32].permitted >> (number % 32) & 1 == 1;
    unneeded.retain(|(number, _)| held(&sets, *number));
    for (number, _) in &unneeded {
        let (word, bit) = (*number as usize / 32, 1 << (number % 32));
        sets[word].effective &= !bit;
        sets[word].permitted &= !bit;
        sets[word].inheritable &= !bit;
    }
    // The ambient set follows: it is never wider than the permitted one (capabilities(7)).
    set(&sets)?;
    Ok(unneeded.into_iter().map(|(_, name)| name).collect())
}

fn get() -> io::Result<[Sets; 2]> {
    let header = Header {
        version: CAPABILITY_VERSION,
        pid: 0,
    };
    let mut sets = [Sets::default(); 2];
    // SAFETY: capget(2) reads the header and writes two sets, which this version has.
    match unsafe { libc::syscall(libc::SYS_capget, &raw const header, sets.as_mut_ptr()) } {
        0 => Ok(sets),
        _ => Err(io::Error::last_os_error()),
    }
}

fn set(sets: &[Sets; 2]) -> io::Result<()> {
    let header = Header {
        version: CAPABILITY_VERSION,
        pid: 0,
    };
    // SAFETY: capset(2) reads the header and two sets; it changes the calling thread alone.
    match unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether this host may forward packets; true also where that cannot be read (`ProcSubset=pid`).
pub fn may_forward() -> bool {
    let is_on = |path: &str| fs::read_to_string(path).map_or(true, |text| text.trim() != "0");
    is_on("/proc/sys/net/ipv4/ip_forward") || is_on("/proc/sys/net/ipv6/conf/all/forwarding")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shed_stays_away_from_threads_to_come() {
        // In a thread of its own: the other tests keep their rights.
        let after = std::thread::spawn(|| {
            shed().expect("shed");
            let again = shed().expect("shed again");
            assert!(again.is_empty(), "{again:?}");
            std::thread::spawn(|| get().expect("sets"))
                .join()
                .expect("a thread")
        });
        let after = after.join().expect("a thread");
        assert_eq!(after[0].permitted >> CAP_NET_ADMIN.0 & 1, 0);
    }
}
