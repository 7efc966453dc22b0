//! The engine of one data-plane thread: tasks, timers, and one of two drivers for sockets.
//!
//! A turn runs the tasks that are ready, fires timers, and then enters the kernel once: everything the turn has to send
//! or to ask goes with that call, and it returns with everything that has come. There is one engine a thread, reached
//! through thread-local state; nothing in it is shared between threads.

mod buffers;
mod chain;
mod enough;
mod epoll;
mod ring;
mod slot;
mod spare;
mod tasks;
mod timers;

use std::{
    cell::{Cell, RefCell},
    future::Future,
    io::{self, IoSlice},
    os::fd::{FromRawFd, IntoRawFd, OwnedFd, RawFd},
    pin::{Pin, pin},
    task::{Context, Poll},
    time::Duration,
};

use self::{epoll::Epoll, ring::Ring, timers::Timers};
use super::{allocator, clock};

pub use self::ring::probe;

/// Turns of the ready queue between two looks at the kernel, when tasks keep each other ready.
const TURNS_IN_A_ROW: u32 = 4;

/// The longest wait without a timer. Only bounds how long a mistake could last.
const WAIT_MAX: Duration = Duration::from_secs(1);

/// Timers are rounded up to this, nanoseconds: those of one millisecond fire together.
const TIMER_STEP_NS: u64 = 1_000_000;

/// How long the engine's end may take for what is still to be sent.
const END_TIME: Duration = Duration::from_secs(1);

enum Driver {
    Ring(Box<Ring>),
    Epoll(Epoll),
}

/// Which socket of the thread's engine. One of an engine that has ended is none of the next one's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    Ring(u32, ring::Key),
    Epoll(u32, epoll::Key),
}

#[derive(Default)]
struct Local {
    driver: RefCell<Option<Driver>>,
    /// Which of the thread's engines this is.
    era: Cell<u32>,
    timers: RefCell<Timers>,
    /// How long events may be gathered while streams run.
    gather: Cell<Duration>,
    /// Streams that run.
    streams: Cell<usize>,
}

thread_local! {
    static LOCAL: Local = Local::default();
}

/// Which driver to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Ring,
    Epoll,
}

/// Runs `main` on this thread to its end, and with it what [`spawn`] started meanwhile.
pub fn run<F: Future>(kind: Kind, main: F) -> io::Result<F::Output> {
    let driver = match kind {
        Kind::Ring => Driver::Ring(Box::new(Ring::new()?)),
        Kind::Epoll => Driver::Epoll(Epoll::new()?),
    };
    clock::set_turn(clock::monotonic_ns());
    LOCAL.with(|local| {
        local.era.set(local.era.get() + 1);
        *local.driver.borrow_mut() = Some(driver);
    });
    let _end = End;
    let mut main = pin!(main);
    let waker = tasks::main_waker();
    let mut cx = Context::from_waker(&waker);
    waker.wake_by_ref();
    loop {
        for _ in 0..TURNS_IN_A_ROW {
            let main_is_ready = tasks::with(tasks::Tasks::take_main).unwrap_or(false);
            if main_is_ready && let Poll::Ready(output) = main.as_mut().poll(&mut cx) {
                return Ok(output);
            }
            tasks::with(tasks::Tasks::run_ready);
            if !any_ready() {
                break;
            }
        }
        LOCAL.with(park);
    }
}

/// Ends the thread's engine, also when `main` panics.
struct End;

impl Drop for End {
    fn drop(&mut self) {
        // Tasks close their sockets with the driver's help.
        tasks::with(tasks::Tasks::clear);
        clock::set_turn(0);
        let driver = LOCAL.with(|local| local.driver.borrow_mut().take());
        if let Some(Driver::Ring(ring)) = driver {
            ring.end(END_TIME);
        }
    }
}

fn any_ready() -> bool {
    tasks::with(tasks::Tasks::any_ready).unwrap_or(false)
}

/// Waits for the kernel, at most until the next timer is due, and fires timers.
fn park(local: &Local) {
    let mut wait = Duration::ZERO;
    if !any_ready() {
        wait = WAIT_MAX;
        if let Some(next_ns) = local.timers.borrow().next_ns() {
            let now_ns = clock::monotonic_ns();
            wait = wait.min(Duration::from_nanos(next_ns.saturating_sub(now_ns)));
        }
    }
    let gather = if local.streams.get() > 0 {
        local.gather.get()
    } else {
        Duration::ZERO
    };
    match local.driver.borrow_mut().as_mut() {
        Some(Driver::Ring(ring)) => ring.park(wait, gather),
        Some(Driver::Epoll(epoll)) => epoll.park(wait),
        None => {}
    }
    let now_ns = clock::monotonic_ns();
    clock::set_turn(now_ns);
    loop {
        let waker = local.timers.borrow_mut().fire(now_ns);
        match waker {
            Some(waker) => waker.wake(),
            None => return,
        }
    }
}

/// Starts a task on this thread.
pub fn spawn(task: impl Future<Output = ()> + 'static) {
    tasks::with(|tasks| tasks.spawn(Box::pin(task)));
}

/// How long events may be gathered while streams run; zero: not at all. Epoll never does.
pub fn set_gather(time: Duration) {
    LOCAL.with(|local| local.gather.set(time));
}

/// To be called every few seconds: gives back what a burst has left behind.
pub fn give_back() {
    LOCAL.with(|local| {
        if let Some(Driver::Ring(ring)) = local.driver.borrow_mut().as_mut() {
            ring.give_back();
        }
    });
    allocator::give_back();
}

/// A stream runs while this is held: events may be gathered.
pub struct Streaming(());

impl Streaming {
    /// A stream begins.
    pub fn begin() -> Streaming {
        LOCAL.with(|local| local.streams.set(local.streams.get() + 1));
        Streaming(())
    }
}

impl Drop for Streaming {
    fn drop(&mut self) {
        let _ = LOCAL.try_with(|local| local.streams.set(local.streams.get().saturating_sub(1)));
    }
}

/// A timer. Costs a place in a heap from the first time that it is asked until it is dropped or set anew.
pub struct Timer {
    deadline_ns: u64,
    id: Option<u32>,
}

impl Timer {
    /// Fires after `time`.
    pub fn new(time: Duration) -> Timer {
        Timer {
            deadline_ns: after(time),
            id: None,
        }
    }

    /// Fires after `time` from now, whether it has fired before or not.
    pub fn reset(&mut self, time: Duration) {
        self.stop();
        self.deadline_ns = after(time);
    }

    /// Whether it has fired; wakes the task when it does.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        LOCAL.with(|local| {
            let mut timers = local.timers.borrow_mut();
            match self.id {
                Some(id) if timers.has_fired(id, cx.waker()) => Poll::Ready(()),
                Some(_) => Poll::Pending,
                None if clock::turn_ns() >= self.deadline_ns => Poll::Ready(()),
                None => {
                    self.id = Some(timers.add(self.deadline_ns, cx.waker().clone()));
                    Poll::Pending
                }
            }
        })
    }

    fn stop(&mut self) {
        if let Some(id) = self.id.take() {
            let _ = LOCAL.try_with(|local| local.timers.borrow_mut().remove(id));
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Future for Timer {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        Timer::poll(&mut self, cx)
    }
}

fn after(time: Duration) -> u64 {
    let deadline_ns =
        clock::monotonic_ns().saturating_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    deadline_ns
        .checked_next_multiple_of(TIMER_STEP_NS)
        .unwrap_or(u64::MAX)
}

/// Calls `f` with the driver that a socket belongs to.
fn with<R>(
    key: Key,
    on_ring: impl FnOnce(&mut Ring, ring::Key) -> R,
    on_epoll: impl FnOnce(&mut Epoll, epoll::Key) -> R,
) -> Option<R> {
    LOCAL
        .try_with(|local| {
            let era = local.era.get();
            match (local.driver.borrow_mut().as_mut(), key) {
                (Some(Driver::Ring(ring)), Key::Ring(of, key)) if of == era => Some(on_ring(ring, key)),
                (Some(Driver::Epoll(epoll)), Key::Epoll(of, key)) if of == era => Some(on_epoll(epoll, key)),
                _ => None,
            }
        })
        .ok()
        .flatten()
}

fn gone<T>() -> io::Result<T> {
    Err(io::ErrorKind::NotConnected.into())
}

/// How a socket comes to the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Connected,
    /// Writable when the connection is made or has failed; then [`connected`] is to be called.
    Connecting,
    Listening,
}

/// Takes a socket, which must not block, into this thread's engine, which closes it after [`close`].
pub fn add(fd: OwnedFd, role: Role) -> io::Result<Key> {
    LOCAL.with(|local| {
        let era = local.era.get();
        match local.driver.borrow_mut().as_mut() {
            Some(Driver::Ring(ring)) => {
                let fd = fd.into_raw_fd();
                let key = match role {
                    Role::Connected => ring.add_connected(fd),
                    Role::Connecting => ring.add_connecting(fd),
                    Role::Listening => ring.add_listening(fd),
                };
                Ok(Key::Ring(era, key))
            }
            Some(Driver::Epoll(epoll)) => Ok(Key::Epoll(era, epoll.add(fd)?)),
            None => gone(),
        }
    })
}

/// The connection has been made.
pub fn connected(key: Key) {
    with(key, Ring::start_receiving, |_, _| {});
}

/// Takes what has arrived.
pub fn try_read(key: Key, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    let buffer = RefCell::new(buffer);
    with(
        key,
        |ring, key| ring.try_read(key, &mut buffer.borrow_mut()),
        |epoll, key| epoll.try_read(key, &mut buffer.borrow_mut()),
    )
    .unwrap_or_else(gone)
}

/// As [`try_read`], but what has arrived stays.
pub fn try_peek(key: Key, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    let buffer = RefCell::new(buffer);
    with(
        key,
        |ring, key| ring.try_peek(key, &mut buffer.borrow_mut()),
        |epoll, key| epoll.try_peek(key, &mut buffer.borrow_mut()),
    )
    .unwrap_or_else(gone)
}

/// Whether something has arrived: `None` nothing, `Some(false)` bytes, `Some(true)` the end or an error.
pub fn peek(key: Key) -> Option<bool> {
    with(key, Ring::peek, Epoll::peek).unwrap_or(Some(true))
}

/// Takes bytes to be sent. `None`: there is no room now.
pub fn try_write(key: Key, pieces: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
    with(
        key,
        |ring, key| ring.try_write(key, pieces),
        |epoll, key| epoll.try_write(key, pieces),
    )
    .unwrap_or_else(gone)
}

/// Ready when a read may bring something.
pub fn poll_readable(key: Key, cx: &mut Context<'_>) -> Poll<()> {
    let cx = RefCell::new(cx);
    with(
        key,
        |ring, key| ring.poll_readable(key, &mut cx.borrow_mut()),
        |epoll, key| epoll.poll_readable(key, &mut cx.borrow_mut()),
    )
    .unwrap_or(Poll::Ready(()))
}

/// Ready when a write may bring something.
pub fn poll_writable(key: Key, cx: &mut Context<'_>) -> Poll<()> {
    let cx = RefCell::new(cx);
    with(
        key,
        |ring, key| ring.poll_writable(key, &mut cx.borrow_mut()),
        |epoll, key| epoll.poll_writable(key, &mut cx.borrow_mut()),
    )
    .unwrap_or(Poll::Ready(()))
}

/// The next connection of a listening socket.
pub fn poll_accept(key: Key, cx: &mut Context<'_>) -> Poll<io::Result<OwnedFd>> {
    let cx = RefCell::new(cx);
    let fd: Poll<io::Result<RawFd>> = with(
        key,
        |ring, key| ring.poll_accept(key, &mut cx.borrow_mut()),
        |epoll, key| epoll.poll_accept(key, &mut cx.borrow_mut()),
    )
    .unwrap_or_else(|| Poll::Ready(gone()));
    // SAFETY: the descriptor is new and nobody else's.
    fd.map(|fd| fd.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Ends the sending side when everything written has been sent.
pub fn shutdown_write(key: Key) {
    with(key, Ring::shutdown_write, Epoll::shutdown_write);
}

/// Gives a socket up; `reset`: without sending what was written and not yet sent.
pub fn close(key: Key, reset: bool) {
    with(
        key,
        |ring, key| ring.close(key, reset),
        |epoll, key| epoll.close(key),
    );
}
