//! The programs' clock, and the CPUs that cores are pinned to.

use std::{io, mem};

/// CLOCK_MONOTONIC in nanoseconds: what `bpf_ktime_get_ns` returns to the programs (kernel/bpf/helpers.c).
pub fn now_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes one timespec. It cannot fail: the clock exists on every Linux and the pointer is valid.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    (now.tv_sec as u64) * 1_000_000_000 + now.tv_nsec as u64
}

/// The CPUs that this thread may run on, ascending, numbers below CPU_SETSIZE (1024).
pub fn cpus() -> io::Result<Vec<usize>> {
    // SAFETY: cpu_set_t is a bit field; all zero is the empty set.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    // SAFETY: writes at most size_of_val(&set) bytes into `set`.
    if unsafe { libc::sched_getaffinity(0, mem::size_of_val(&set), &mut set) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: CPU_ISSET reads the bit of a number below CPU_SETSIZE.
    Ok((0..libc::CPU_SETSIZE as usize)
        .filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, &set) })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_goes_on_and_there_is_a_cpu() {
        let before = now_ns();
        assert!(before > 0);
        assert!(now_ns() >= before);
        assert!(!cpus().expect("an affinity").is_empty());
    }
}
