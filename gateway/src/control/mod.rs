//! The life of the process: start, the control thread, reload, drain, end.
//!
//! The control thread never stands between a request and its answer. It runs on tokio-uring, which is a current-thread
//! tokio runtime, so that ordinary libraries run on it; where io_uring is forbidden, on plain tokio.

mod access;
mod drops;
mod listen;
mod plane;
pub mod quota;
pub mod store;

pub mod admin;
pub mod cluster;
pub mod notify;

use std::{
    future::Future,
    path::PathBuf,
    sync::{Arc, Mutex},
    task::{Wake, Waker},
    time::Duration,
};

use anyhow::{Context, bail};
use arc_swap::ArcSwap;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::Notify,
    time::{Instant, sleep, sleep_until},
};

use crate::{
    config::{
        Config,
        schema::{Driver, KernelMode},
    },
    core::{self, DRAIN, STOP, Shared},
    kernel::{self, Kernel, Off, Plan},
    ledger::Ledger,
    net::{
        process,
        runtime::{self, Engine},
        tls,
    },
    serve::snapshot::{Registry, Snapshot},
    telemetry::{
        access::{AccessLog, Destination},
        logging,
    },
};
use access::{Access, Directory, Names};
use plane::{Inner, State};

/// How often the control thread looks after the kernel, the limits' clock and the cores where nothing moves. Offenders wake
/// it at once.
const TICK: Duration = Duration::from_millis(100);

/// Shortest time between two looks after offenders that were asked for.
const BELL_REST: Duration = Duration::from_millis(1);

/// How often while the cores' loads move, or the gateway ends.
const TICK_BUSY: Duration = Duration::from_millis(20);

/// How long the data plane may take to end after [`STOP`]; then the process ends without it.
const STOP_TIME: Duration = Duration::from_secs(5);

/// How long giving leases back may hold up the end.
const LEAVE_TIME: Duration = Duration::from_secs(1);

/// Age of a core's heartbeat at which it counts as stuck.
const HEARTBEAT_MS_MAX: u64 = 5_000;

/// Runs the gateway until it is told to end.
///
/// # Errors
/// What keeps it from starting: an address in use, a state directory that cannot be written, BPF where it is
/// `required`. Also a data-plane thread that died.
pub fn run(path: PathBuf, config: Config) -> anyhow::Result<()> {
    logging::init(&config.log)?;
    process::forbid_core_dumps();
    process::raise_descriptor_limit();
    tls::init();
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    let gateway = Gateway::start(path, config)?;
    let uring = gateway.state.engine == Engine::IoUring;
    on_control_runtime(uring, gateway.control())
}

/// Runs a future on the control thread's runtime.
fn on_control_runtime<F: Future>(uring: bool, future: F) -> F::Output {
    if uring {
        return tokio_uring::start(future);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    // Without even epoll there is nothing to serve with.
    runtime
        .expect("a tokio runtime needs epoll and an eventfd")
        .block_on(future)
}

/// A started gateway: its threads run, its control thread does not yet.
struct Gateway {
    state: Arc<State>,
    threads: core::Threads,
    ledger: Arc<Ledger>,
    admin: std::net::TcpListener,
    guard: Arc<admin::Guard>,
}

impl Gateway {
    fn start(path: PathBuf, config: Config) -> anyhow::Result<Gateway> {
        let engine = choose_engine(&config)?;
        let cpus = runtime::cpus().context("cannot learn which CPUs may be used")?;
        let cores = config.workers.threads.unwrap_or(cpus.len()).max(1);
        // Before any thread is started, so that none has the rights that loading needs.
        let kernel = load_kernel(&config, cores)?;
        let (ledger, journals) = Ledger::start(&config.ledger, cores)?;
        let guard = Arc::new(admin::Guard::new(&config)?);
        let db = store::open(&config.ledger.path)?;
        let admin = admin::bind(config.admin.address)?;

        let mut registry = Registry::default();
        let cluster = cluster::join(&config)?;
        registry.quota = Arc::new(quota::open(&config, cluster.as_deref())?);
        let snapshot = Snapshot::build(&config, &mut registry)?;
        snapshot.load_vocabularies();
        let shared = Arc::new(Shared::new(snapshot, cores));
        let names = Arc::new(ArcSwap::from_pointee(Names::new(&config)));
        let inner = Arc::new(Mutex::new(Inner {
            config: config.clone(),
            registry,
        }));
        let access = Access::load(&db, shared.clone(), inner.clone())?;
        let directory = Directory {
            store: store::Store::start(db, access).context("cannot start the store of run-time keys")?,
            names,
            shared: shared.clone(),
        };
        let listeners = listen::open(&config, cores)?;
        let kernel = guard_listeners(&config, kernel, &listeners)?;
        let log = AccessLog::start(shared.cores.clone(), &Destination::parse(&config.log.access))
            .context("cannot open the access log")?;

        for listener in &listeners {
            tracing::info!(address = %listener.address, tls = listener.tls.is_some(), "listening");
        }
        let addresses = listeners.iter().map(|listener| listener.address).collect();
        let tls = listeners.iter().map(|listener| listener.tls.clone()).collect();
        let trust = listeners.iter().map(|listener| listener.trust.clone()).collect();
        let sockets = listen::by_core(listeners, cores);
        let pins = if config.workers.pin { cpus } else { Vec::new() };
        let threads = core::start(
            &shared,
            engine,
            &pins,
            sockets.into_iter().zip(journals).collect(),
        )
        .context("cannot start the data plane")?;
        let ledger = Arc::new(ledger);
        let mut state = State::new(
            path,
            inner,
            directory,
            guard.clone(),
            engine,
            kernel,
            ledger.clone(),
            log,
            addresses,
            tls,
            trust,
        )?;
        state.cluster = cluster;
        Ok(Gateway {
            state: Arc::new(state),
            threads,
            ledger,
            admin,
            guard,
        })
    }

    /// The control thread's work until the end.
    async fn control(self) -> anyhow::Result<()> {
        let Gateway {
            state,
            threads,
            ledger,
            admin,
            guard,
        } = self;
        // Before anyone is told that the gateway is ready: a signal then no longer kills it.
        let signals = Signals::listen()?;
        let (stop_admin, admin_stopped) = tokio::sync::oneshot::channel::<()>();
        let address = admin.local_addr()?;
        let admin = tokio::net::TcpListener::from_std(admin)?;
        let api = admin::serve(admin, state.clone(), guard, async {
            let _ = admin_stopped.await;
        });
        let api = tokio::spawn(api);
        let cluster = state.cluster.as_ref().map(|cluster| {
            let store = state.directory().store.clone();
            cluster.start(state.clone(), Some(store))
        });
        let (cores, engine) = (state.shared.cores.len(), state.engine.name());
        tracing::info!(cores, engine, admin = %address, "ready");
        notify::ready();
        notify::status(&state.summary());
        let lived = live(&state, &threads, signals).await;
        let _ = stop_admin.send(());
        // An open scrape does not hold up the end.
        let _ = tokio::time::timeout(Duration::from_millis(500), api).await;
        if threads.all_ended() {
            threads.join();
        } else {
            tracing::warn!("the data plane did not end in time; ending without it");
        }
        if let Some(cluster) = cluster {
            // Requests that ended have settled: the others need not wait for the leases to run out.
            cluster.end(LEAVE_TIME).await;
        }
        state.end();
        if let Err(error) = ledger.flush() {
            tracing::error!(%error, "the ledger could not be flushed; the journal keeps what is missing");
        }
        lived
    }
}

fn choose_engine(config: &Config) -> anyhow::Result<Engine> {
    let engine = runtime::choose(config.workers.driver)
        .context("workers.driver is io_uring, and io_uring cannot be used (see kernel.io_uring_disabled)")?;
    if engine == Engine::Epoll && config.workers.driver == Driver::Auto {
        tracing::warn!("io_uring cannot be used here; the data plane runs on epoll");
    }
    Ok(engine)
}

/// Loads the kernel plane, or says why not. What only that needed is given up.
fn load_kernel(config: &Config, cores: usize) -> anyhow::Result<Result<Kernel, String>> {
    let ports: Vec<u16> = config
        .listeners
        .iter()
        .map(|listener| listener.address.port())
        .collect();
    let kernel = match config.kernel.mode {
        KernelMode::Off => Ok(Err("switched off (kernel.mode)".into())),
        _ => {
            let loaded = Kernel::load(&Plan {
                config: &config.kernel,
                cores,
                ports: &ports,
                state: &config.ledger.path,
            });
            kernel_or_reason(config, loaded)
        }
    };
    match kernel::shed_rights() {
        Ok(rights) if rights.is_empty() => {}
        Ok(rights) => tracing::debug!("given up after loading: {}", rights.join(" ")),
        Err(error) => tracing::warn!(%error, "the rights that loading needed are kept"),
    }
    kernel
}

/// Puts the kernel plane before the listeners.
fn guard_listeners(
    config: &Config,
    kernel: Result<Kernel, String>,
    listeners: &[listen::Group],
) -> anyhow::Result<Result<Kernel, String>> {
    let Ok(mut kernel) = kernel else {
        return Ok(kernel);
    };
    let guarded: Result<(), Off> = listeners
        .iter()
        .try_for_each(|listener| kernel.guard(&listener.descriptors()));
    let kernel = kernel_or_reason(config, guarded.map(|()| kernel))?;
    if let Ok(kernel) = &kernel {
        kernel.set_exempt(&drops::exempt(config));
        for part in kernel.degraded() {
            tracing::warn!("kernel plane: {part}");
        }
        tracing::info!("kernel plane loaded: early drop and steering are on");
    }
    Ok(kernel)
}

/// The kernel plane, or why the gateway does without it.
fn kernel_or_reason(config: &Config, kernel: Result<Kernel, Off>) -> anyhow::Result<Result<Kernel, String>> {
    match kernel {
        Ok(kernel) => Ok(Ok(kernel)),
        Err(off) if config.kernel.mode == KernelMode::Required => {
            bail!(
                "kernel.mode is required, and the kernel plane cannot be loaded: {}",
                off.reason
            )
        }
        Err(off) => {
            tracing::warn!("kernel plane is off: {}; all else works", off.reason);
            Ok(Err(off.reason))
        }
    }
}

/// Wakes the control thread from any other.
#[derive(Default)]
struct Bell(Notify);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.notify_one();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.notify_one();
    }
}

/// What the process is told by signals.
struct Signals {
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> anyhow::Result<Signals> {
        let of = |kind| signal(kind).context("cannot listen to signals");
        Ok(Signals {
            hangup: of(SignalKind::hangup())?,
            terminate: of(SignalKind::terminate())?,
            interrupt: of(SignalKind::interrupt())?,
        })
    }
}

/// Signals and ticks, until the data plane has ended.
async fn live(state: &Arc<State>, threads: &core::Threads, mut signals: Signals) -> anyhow::Result<()> {
    let mut tick = Instant::now();
    let mut watchdog = notify::Watchdog::new();
    let mut deadline = None;
    let bell = Arc::new(Bell::default());
    state.shared.refusals.listen(Waker::from(bell.clone()));
    loop {
        let asked_to_end = tokio::select! {
            () = sleep_until(tick) => false,
            () = bell.0.notified() => {
                if state.follow_offenders() {
                    bell.0.notify_one();
                }
                // However many offend, ticks and everything else of this thread have their turn.
                sleep(BELL_REST).await;
                continue;
            }
            _ = signals.hangup.recv() => {
                let noted = admin::note_reload(state.directory().store.clone(), "signal".into(), state.reload());
                // Apart, so that a slow disk holds up no tick.
                tokio::spawn(noted);
                false
            }
            _ = signals.terminate.recv() => true,
            _ = signals.interrupt.recv() => true,
        };
        if asked_to_end {
            deadline = Some(end(state, deadline));
        }
        let moves = state.tick();
        tick = Instant::now()
            + if moves || deadline.is_some() {
                TICK_BUSY
            } else {
                TICK
            };
        watchdog.beat(|| state.cores_are_alive(HEARTBEAT_MS_MAX));
        if threads.all_ended() && deadline.is_some() {
            return Ok(());
        }
        if deadline.is_none() && !threads.all_run() {
            state.shared.raise(STOP);
            bail!("a data-plane thread has ended unasked");
        }
        let Some(due) = deadline else { continue };
        if due <= Instant::now() {
            if state.shared.level() >= STOP {
                return Ok(());
            }
            tracing::warn!("the drain time is over; ending what still runs");
            deadline = Some(stop(state));
        }
    }
}

/// A signal to end: the first drains, the second stops. Returns until when.
fn end(state: &State, deadline: Option<Instant>) -> Instant {
    if let Some(due) = deadline {
        // Further signals do not put off the end.
        return if state.shared.level() >= STOP {
            due
        } else {
            stop(state)
        };
    }
    let drain = state.drain();
    notify::stopping();
    tracing::info!(
        seconds = drain.as_secs(),
        "draining: no new connections, running requests go on"
    );
    state.shared.raise(DRAIN);
    Instant::now() + drain
}

fn stop(state: &State) -> Instant {
    state.shared.raise(STOP);
    Instant::now() + STOP_TIME
}
