//! The data plane's runtime: monoio on io_uring, or on epoll where io_uring is forbidden.

use std::{
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use crate::config::schema::Driver;

/// Submission queue entries of one core's ring. One entry per wait that starts in the same turn;
/// when more start, monoio submits early, so it bounds a batch and not the connections.
const RING_ENTRIES: u32 = 4096;

/// The driver that a core really uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// io_uring.
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
    match monoio::RuntimeBuilder::<monoio::IoUringDriver>::new()
        .with_entries(16)
        .build()
    {
        Ok(_) if monoio::utils::detect_uring() => Ok(Engine::IoUring),
        Ok(_) if driver == Driver::Auto => Ok(Engine::Epoll),
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "this kernel's io_uring lacks needed operations",
        )),
        Err(_) if driver == Driver::Auto => Ok(Engine::Epoll),
        Err(error) => Err(error),
    }
}

/// Runs `main` on this thread to its end. Tasks that [`spawn`] started end with it.
pub fn run<F: Future>(engine: Engine, main: F) -> io::Result<F::Output> {
    match engine {
        Engine::IoUring => {
            let mut runtime = Err(io::ErrorKind::Unsupported.into());
            for ring in rings() {
                let builder =
                    monoio::RuntimeBuilder::<monoio::IoUringDriver>::new().with_entries(RING_ENTRIES);
                runtime = builder.uring_builder(ring).enable_timer().build();
                if runtime.is_ok() {
                    break;
                }
            }
            Ok(runtime?.block_on(main))
        }
        Engine::Epoll => {
            let builder = monoio::RuntimeBuilder::<monoio::LegacyDriver>::new();
            Ok(builder.enable_timer().build()?.block_on(main))
        }
    }
}

/// The ways to set up a ring, the cheapest first; older kernels know only the later ones. Without a flag the kernel
/// interrupts the thread for each completion. With `DEFER_TASKRUN` (6.1) completions are made when the thread
/// asks for them, all at once; with `COOP_TASKRUN` (5.19) whenever it makes a system call (io_uring_setup(2)). Measured
/// with `bench/run.sh --scenarios busy`: 12.9, 13.5 and 17.4 us an event.
fn rings() -> [io_uring::Builder; 3] {
    let plain = io_uring::IoUring::builder();
    let (mut deferred, mut cooperative) = (plain.clone(), plain.clone());
    deferred.setup_single_issuer().setup_defer_taskrun();
    cooperative.setup_coop_taskrun();
    [deferred, cooperative, plain]
}

/// Starts a task on this core.
pub fn spawn(task: impl Future<Output = ()> + 'static) {
    drop(monoio::spawn(task));
}

/// Waits `time`; granularity one millisecond.
pub fn sleep(time: Duration) -> impl Future<Output = ()> {
    monoio::time::sleep(time)
}

/// A timer that is kept over many waits.
pub struct Timer(Pin<Box<monoio::time::Sleep>>);

impl Timer {
    /// Fires after `time`.
    pub fn new(time: Duration) -> Timer {
        Timer(Box::pin(monoio::time::sleep(time)))
    }

    /// Fires after `time` from now, whether it has fired before or not.
    pub fn reset(&mut self, time: Duration) {
        self.0.as_mut().reset(monoio::time::Instant::now() + time);
    }

    /// Whether it has fired; wakes the task when it does.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.0.as_mut().poll(cx)
    }
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
