//! The threads themselves.

use std::{
    future::Future,
    io,
    net::{SocketAddr, TcpListener},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    rc::Rc,
    sync::{Arc, mpsc},
    task::{Context, Poll},
    thread::{self, JoinHandle},
    time::Duration,
};

use arc_swap::{ArcSwap, Guard};
use pin_project_lite::pin_project;
use rustls::ServerConfig;

use super::{Core, DRAIN, STOP, Shared};
use crate::{
    ledger::Journal,
    net::{
        clock,
        runtime::{self, Engine, give_back, set_gather, sleep, spawn},
        tcp::{Listener, Sock, stop_listening},
    },
    serve::{connection, trust::Trust},
};

/// How often a core looks after itself: follows the drain level, publishes what was asked for, sweeps.
const TICK: Duration = Duration::from_millis(50);

/// Ticks between two sweeps of the upstream pool.
const TICKS_PER_SWEEP: u32 = 40;

/// How long a core waits for its connections to end after [`STOP`] before it ends without them.
const STOP_TIME: Duration = Duration::from_secs(2);

/// How long accepting rests when the process is out of descriptors.
const ACCEPT_REST: Duration = Duration::from_millis(50);

/// One listening socket of one core.
pub struct Listening {
    pub socket: TcpListener,
    /// Swapped by a reload; a connection takes what is there when it comes.
    pub tls: Option<Arc<ArcSwap<ServerConfig>>>,
    /// The proxies before it; swapped likewise.
    pub trust: Arc<ArcSwap<Trust>>,
}

/// The running data plane.
pub struct Threads {
    handles: Vec<JoinHandle<io::Result<()>>>,
}

/// What one thread starts with.
struct Start {
    index: usize,
    shared: Arc<Shared>,
    engine: Engine,
    cpu: Option<usize>,
    listening: Vec<Listening>,
    journal: Journal,
}

/// Starts a thread for each element of `cores`: its listening sockets and its journal. Comes back when all of them
/// accept, or with the first failure.
pub fn start(
    shared: &Arc<Shared>,
    engine: Engine,
    cpus: &[usize],
    cores: Vec<(Vec<Listening>, Journal)>,
) -> io::Result<Threads> {
    let (ready, all_ready) = mpsc::channel();
    let mut handles = Vec::with_capacity(cores.len());
    let count = cores.len();
    for (index, (listening, journal)) in cores.into_iter().enumerate() {
        let cpu = (!cpus.is_empty()).then(|| cpus[index % cpus.len()]);
        let start = Start {
            index,
            shared: shared.clone(),
            engine,
            cpu,
            listening,
            journal,
        };
        let ready = ready.clone();
        let name = format!("core-{index}");
        handles.push(
            thread::Builder::new()
                .name(name)
                .spawn(move || run(start, ready))?,
        );
    }
    drop(ready);
    for _ in 0..count {
        match all_ready.recv() {
            Ok(started) => started?,
            Err(_) => return Err(io::Error::other("a data-plane thread ended while it started")),
        }
    }
    Ok(Threads { handles })
}

impl Threads {
    /// Whether all threads still run.
    pub fn all_run(&self) -> bool {
        !self.handles.iter().any(JoinHandle::is_finished)
    }

    /// Whether all threads have ended.
    pub fn all_ended(&self) -> bool {
        self.handles.iter().all(JoinHandle::is_finished)
    }

    /// Waits for all threads to end.
    pub fn join(self) {
        for handle in self.handles {
            match handle.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::error!(%error, "a data-plane thread failed"),
                Err(_) => tracing::error!("a data-plane thread panicked"),
            }
        }
    }
}

fn run(start: Start, ready: mpsc::Sender<io::Result<()>>) -> io::Result<()> {
    if let Some(cpu) = start.cpu {
        runtime::pin_to(cpu)?;
    }
    let engine = start.engine;
    runtime::run(engine, async move {
        let core = Core::new(start.shared, start.index, start.journal);
        let mut sockets = Vec::new();
        for listening in start.listening {
            match Listener::new(listening.socket) {
                Ok(listener) => {
                    sockets.push(listener.fd());
                    spawn(accept(core.clone(), listener, listening.tls, listening.trust));
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                    return;
                }
            }
        }
        core.telemetry.beat(clock::monotonic_ns() / 1_000_000);
        set_gather(core.shared.snapshot.load().gather);
        let _ = ready.send(Ok(()));
        drop(ready);
        live(&core, &sockets).await;
    })
}

/// The core's own task: ticks until the end.
async fn live(core: &Rc<Core>, sockets: &[i32]) {
    let mut ticks: u32 = 0;
    let mut stopped_ns = None;
    loop {
        sleep(TICK).await;
        ticks = ticks.wrapping_add(1);
        core.ticks.raise(core.ticks.level() + 1);
        let now_ns = clock::monotonic_ns();
        core.telemetry.beat(now_ns / 1_000_000);
        core.telemetry.publish_if_asked();
        core.turn_journal();
        core.follow_blocks(now_ns);
        // Follows a reload.
        set_gather(core.shared.snapshot.load().gather);
        if ticks.is_multiple_of(TICKS_PER_SWEEP) {
            core.pool.borrow_mut().sweep(now_ns);
            give_back();
        }
        let level = core.shared.level();
        if level >= DRAIN && core.drain.level() < DRAIN {
            sockets.iter().copied().for_each(stop_listening);
        }
        core.drain.raise(level);
        core.revocations.raise(core.shared.keys.revocations());
        // Answers may be read on whose client has hung up.
        if level >= DRAIN && core.connections.get() == 0 && core.accounts_open.get() == 0 {
            return;
        }
        let since_stop = if level >= STOP {
            now_ns - *stopped_ns.get_or_insert(now_ns)
        } else {
            0
        };
        if since_stop > STOP_TIME.as_nanos() as u64 {
            return;
        }
    }
}

/// Accepts until the listener is closed.
async fn accept(
    core: Rc<Core>,
    listener: Listener,
    tls: Option<Arc<ArcSwap<ServerConfig>>>,
    trust: Arc<ArcSwap<Trust>>,
) {
    loop {
        match listener.accept().await {
            Ok((sock, peer)) => {
                let tls = tls.as_ref().map(|tls| tls.load_full());
                admit(&core, sock, peer, tls, &trust);
            }
            Err(_) if core.drain.level() >= DRAIN || core.shared.level() >= DRAIN => return,
            Err(error) => {
                // Out of descriptors or memory, or a connection that was reset before it was accepted.
                if core.may_log() {
                    tracing::warn!(%error, "cannot accept a connection");
                }
                sleep(ACCEPT_REST).await;
            }
        }
    }
}

/// Starts a connection's task, or closes the connection where there are too many, or where its client is turned away.
fn admit(
    core: &Rc<Core>,
    sock: Rc<Sock>,
    peer: SocketAddr,
    tls: Option<Arc<ServerConfig>>,
    trust: &ArcSwap<Trust>,
) {
    let counters = core.telemetry.counters();
    if core.connections.get() >= core.shared.snapshot.load().http.connections_max {
        counters.connections_refused.inc();
        sock.reset_on_close();
        return;
    }
    let trust = trust.load();
    let hop = trust.origin(peer.ip().to_canonical(), false);
    // It came through before the kernel knew of the block.
    if core.turned_away(hop).is_some() {
        counters.connections_turned_away.inc();
        sock.reset_on_close();
        return;
    }
    // Most listeners have no proxy before them, and their connections hold nothing of it.
    let trust = (!trust.is_nobody()).then(|| Guard::into_inner(trust));
    counters.connections_opened.inc();
    core.connections.set(core.connections.get() + 1);
    let core = core.clone();
    spawn(async move {
        let served = Guarded {
            future: connection::run(core.clone(), sock, hop, tls, trust),
        }
        .await;
        if served.is_err() {
            tracing::error!(%peer, "a connection's task panicked; this is a bug");
        }
        core.connections.set(core.connections.get() - 1);
        core.telemetry.counters().connections_closed.inc();
    });
}

pin_project! {
    /// Runs a future so that its panic ends only itself.
    struct Guarded<F> {
        #[pin]
        future: F,
    }
}

impl<F: Future<Output = ()>> Future for Guarded<F> {
    type Output = Result<(), ()>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let future = self.project().future;
        // What the future was changing when it panicked is dropped with it; what it shares with others are
        // counters and cells, which are whole between two statements.
        match catch_unwind(AssertUnwindSafe(|| future.poll(cx))) {
            Ok(done) => done.map(Ok),
            Err(_) => Poll::Ready(Err(())),
        }
    }
}
