//! What the harness asks of Linux directly: the clock that two processes share, cores, descriptors, system call counts.

use std::fs;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

/// Microseconds of `CLOCK_MONOTONIC`, which is one clock for all processes of a host.
pub fn monotonic_us() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a timespec that lives through the call; this clock always exists on Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1000
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn note_interrupt(_: libc::c_int) {
    INTERRUPTED.store(true, Relaxed);
}

/// From now on the first SIGINT or SIGTERM ends runs early, with a report ([`interrupted`]); the second ends the process.
///
/// # Errors
/// Those of `sigaction`.
pub fn catch_interrupts() -> io::Result<()> {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: a zeroed sigaction is a valid one with an empty mask; the handler only stores to an atomic, which is
        // allowed in handlers, and lives as long as the program.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = note_interrupt as *const () as libc::sighandler_t;
            action.sa_flags = libc::SA_RESETHAND;
            libc::sigaction(signal, &action, std::ptr::null_mut())
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Whether a signal has asked this process to end.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Relaxed)
}

/// Waits until a descriptor can be read, at most `time`, to some 50 µs (`epoll_wait` counts in milliseconds). A signal
/// ends it too. Tells whether it can be read.
pub fn wait_readable(fd: &impl AsRawFd, time: Duration) -> bool {
    let mut wanted = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let time = libc::timespec {
        tv_sec: time.as_secs().try_into().unwrap_or(libc::time_t::MAX),
        tv_nsec: time.subsec_nanos().into(),
    };
    // SAFETY: both pointers are to values that live through the call; there is one descriptor.
    unsafe { libc::ppoll(&mut wanted, 1, &time, std::ptr::null()) > 0 }
}

/// Cores that this process may run on.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Keeps the calling thread, or the process `pid` about to run, on core `core`.
///
/// # Errors
/// Those of sched_setaffinity(2): a core that is not there or not allowed.
pub fn pin(core: usize) -> io::Result<()> {
    // SAFETY: a zeroed set is a valid empty one, and `CPU_SET` ignores cores beyond its size.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core, &mut set);
        set
    };
    // SAFETY: the set lives through the call and its size is told; 0 is the calling thread.
    let result = unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Raises the limit of descriptors to `wanted` where it may be, else as far as it may be. Returns what it is then.
pub fn allow_descriptors(wanted: u64) -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the pointer is to an rlimit that lives through the call.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } != 0 || limit.rlim_cur >= wanted {
        return limit.rlim_cur;
    }
    let raised = libc::rlimit {
        rlim_cur: wanted,
        rlim_max: limit.rlim_max.max(wanted),
    };
    let within = libc::rlimit {
        rlim_cur: limit.rlim_max.min(wanted),
        rlim_max: limit.rlim_max,
    };
    for attempt in [raised, within] {
        // SAFETY: the pointer is to an rlimit that lives through the call.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &attempt) } == 0 {
            return attempt.rlim_cur;
        }
    }
    limit.rlim_cur
}

/// `perf_event_attr` in its first published form (`PERF_ATTR_SIZE_VER0`, include/uapi/linux/perf_event.h), which every
/// kernel takes.
#[repr(C)]
#[derive(Default)]
struct PerfEventAttr {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    breakpoint_type: u32,
    config1: u64,
}

const _: () = assert!(size_of::<PerfEventAttr>() == 64);

const PERF_TYPE_TRACEPOINT: u32 = 2;
/// `inherit` is the second bit of the flags: threads that start later are counted too.
const FLAG_INHERIT: u64 = 1 << 1;
const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;

/// Counts the system calls of a process with the kernel's own counter on `raw_syscalls:sys_enter`. While it is open each
/// call of the process costs about a tenth of a microsecond more, so nothing else is measured meanwhile.
#[derive(Debug)]
pub struct SyscallCounter {
    threads: Vec<OwnedFd>,
}

impl SyscallCounter {
    /// Starts to count.
    ///
    /// # Errors
    /// A text for people: tracefs is not mounted, no right (root or `CAP_PERFMON`), or the process is gone.
    pub fn open(pid: u32) -> Result<Self, String> {
        let id = tracepoint_id()?;
        let tasks =
            fs::read_dir(format!("/proc/{pid}/task")).map_err(|error| format!("process {pid}: {error}"))?;
        let mut threads = Vec::new();
        for task in tasks.flatten() {
            let Some(thread) = task
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<i32>().ok())
            else {
                continue;
            };
            match open_counter(id, thread) {
                Ok(counter) => threads.push(counter),
                // It ended between the listing and now.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                Err(error) => return Err(format!("perf_event_open: {error} (it needs root or CAP_PERFMON)")),
            }
        }
        if threads.is_empty() {
            return Err(format!("process {pid} has no threads"));
        }
        Ok(Self { threads })
    }

    /// System calls since it was opened.
    pub fn read(&self) -> u64 {
        self.threads.iter().filter_map(read_counter).sum()
    }
}

fn tracepoint_id() -> Result<u64, String> {
    let path = "events/raw_syscalls/sys_enter/id";
    ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"]
        .iter()
        .find_map(|root| fs::read_to_string(format!("{root}/{path}")).ok())
        .and_then(|text| text.trim().parse().ok())
        .ok_or_else(|| format!("tracefs has no {path} (not mounted, or not readable)"))
}

fn open_counter(id: u64, thread: i32) -> io::Result<OwnedFd> {
    let attributes = PerfEventAttr {
        kind: PERF_TYPE_TRACEPOINT,
        size: size_of::<PerfEventAttr>() as u32,
        config: id,
        flags: FLAG_INHERIT,
        ..PerfEventAttr::default()
    };
    // SAFETY: the attributes live through the call and tell their own size; the other arguments are plain numbers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &attributes,
            thread,
            -1,
            -1,
            PERF_FLAG_FD_CLOEXEC,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just returned this descriptor, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}

fn read_counter(counter: &OwnedFd) -> Option<u64> {
    let mut value = 0_u64;
    // SAFETY: the buffer is a u64 of ours and its size is told.
    let read = unsafe { libc::read(counter.as_raw_fd(), (&raw mut value).cast(), size_of::<u64>()) };
    (read == size_of::<u64>() as isize).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_goes_forward() {
        let first = monotonic_us();
        assert!(first > 0 && monotonic_us() >= first);
    }

    #[test]
    fn system_calls_are_counted() {
        let counter = match SyscallCounter::open(std::process::id()) {
            Ok(counter) => counter,
            Err(reason) => return println!("skipped: {reason}"),
        };
        let before = counter.read();
        for _ in 0..1000 {
            // SAFETY: no arguments.
            unsafe { libc::syscall(libc::SYS_getppid) };
        }
        assert!(counter.read() >= before + 1000);
        assert!(SyscallCounter::open(u32::MAX >> 1).is_err());
    }
}
