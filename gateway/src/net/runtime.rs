//! The data plane's runtime: the engine on io_uring, or on epoll where io_uring is forbidden or too old.

use std::{future::Future, io, task::Poll, time::Duration};

use super::engine;
use crate::config::schema::Driver;

pub use super::engine::{Streaming, Timer, give_back, set_gather, spawn};

/// The driver that a core really uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// io_uring, as of Linux 6.1.
    IoUring,
    /// epoll.
    Epoll,
}

impl Engine {
    /// The name used in the log and in `gateway status`.
    pub fn name(self) -> &'static str {
        match self {
            Engine::IoUring => "io_uring",
            Engine::Epoll => "epoll",
        }
    }
}

/// Which engine `driver` means on this host. An error says why io_uring, where it is asked for by
/// name, cannot be had.
pub fn choose(driver: Driver) -> io::Result<Engine> {
    if driver == Driver::Epoll {
        return Ok(Engine::Epoll);
    }
    match engine::probe() {
        Ok(()) => Ok(Engine::IoUring),
        Err(_) if driver == Driver::Auto => Ok(Engine::Epoll),
        // What the kernel does not know it calls invalid.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "this kernel's io_uring lacks needed operations (Linux 6.1)",
        )),
        Err(error) => Err(error),
    }
}

/// Runs `main` on this thread to its end. Tasks that [`spawn`] started end with it.
pub fn run<F: Future>(engine: Engine, main: F) -> io::Result<F::Output> {
    let kind = match engine {
        Engine::IoUring => engine::Kind::Ring,
        Engine::Epoll => engine::Kind::Epoll,
    };
    engine::run(kind, main)
}

/// Waits `time`; granularity one millisecond.
pub fn sleep(time: Duration) -> Timer {
    Timer::new(time)
}

/// Lets the core's other tasks run.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(move |cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Binds this thread to a CPU.
pub fn pin_to(cpu: usize) -> io::Result<()> {
    // SAFETY: cpu_set_t is plain data for which all zeroes is valid.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    if cpu >= libc::CPU_SETSIZE as usize {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the set is a local, and `cpu` is within it.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the set lives over the call, which only reads it; 0 is this thread.
    let result = unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The CPUs that this process may run on.
pub fn cpus() -> io::Result<Vec<usize>> {
    // SAFETY: cpu_set_t is plain data for which all zeroes is valid.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is a local of the size that is told.
    if unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: every number is below CPU_SETSIZE.
    Ok((0..libc::CPU_SETSIZE as usize)
        .filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) })
        .collect())
}
