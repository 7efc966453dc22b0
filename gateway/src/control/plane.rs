//! What the control thread knows and can do: the state behind the admin API.

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use ipnet::IpNet;
use serde_json::{Value, json};

use super::{
    access::{Directory, Names},
    admin::{self, Guard, kernel::Target, top},
    cluster::Cluster,
    drops::{self, Drops},
    listen::{SharedTls, SharedTrust},
    notify,
    quota::Alerts,
};
use crate::{
    config::{
        self, Config,
        schema::{self, KernelMode},
    },
    core::Shared,
    fleet::resolve::Resolver,
    kernel::Kernel,
    ledger::{Counters, Ledger},
    net::{clock, runtime::Engine, tls},
    serve::{
        snapshot::{Registry, Snapshot},
        trust::Trust,
    },
    telemetry::{
        self,
        access::{AccessLog, Destination},
        logging,
    },
};

/// Time between two counts of the blocked clients, which walk the kernel's map.
const COUNT_EVERY: Duration = Duration::from_secs(1);

/// Clients that are taken from the kernel for `gateway top`, those with the most connections first.
const TOP_CLIENTS_MAX: usize = 4096;

/// The gateway as its control thread sees it.
pub struct State {
    pub shared: Arc<Shared>,
    pub engine: Engine,
    path: PathBuf,
    started: Instant,
    ledger: Arc<Ledger>,
    log: AccessLog,
    alerts: Alerts,
    resolver: Resolver,
    /// When the blocked clients are to be counted next, milliseconds since the start.
    count_due_ms: AtomicU64,
    /// Blocked clients, as last counted.
    blocked: AtomicUsize,
    addresses: Vec<SocketAddr>,
    tls: Vec<SharedTls>,
    trust: Vec<SharedTrust>,
    pub(super) drops: Drops,
    /// What the process was started with: what only a restart changes still is as it says.
    at_start: Config,
    /// Locks are for the control thread alone; the data plane has none of them.
    inner: Arc<Mutex<Inner>>,
    directory: Directory,
    guard: Arc<Guard>,
    kernel: Result<Mutex<Kernel>, String>,
    /// What this host shares with others; `None` where it stands alone.
    pub(super) cluster: Option<Arc<Cluster>>,
}

/// What a reload changes.
pub(super) struct Inner {
    pub config: Config,
    pub registry: Registry,
}

impl State {
    #[allow(clippy::too_many_arguments)] // called once, where all of these have just been made
    pub fn new(
        path: PathBuf,
        inner: Arc<Mutex<Inner>>,
        directory: Directory,
        guard: Arc<Guard>,
        engine: Engine,
        kernel: Result<Kernel, String>,
        ledger: Arc<Ledger>,
        log: AccessLog,
        addresses: Vec<SocketAddr>,
        tls: Vec<SharedTls>,
        trust: Vec<SharedTrust>,
    ) -> anyhow::Result<State> {
        let resolver = Resolver::start()?;
        let config = {
            let inner = inner.lock().unwrap_or_else(PoisonError::into_inner);
            resolver.watch(&inner.registry.endpoints.named());
            inner.config.clone()
        };
        let alerts = Alerts::start(&config.alerts)?;
        directory
            .shared
            .blocks
            .set_observe(config.kernel.mode == KernelMode::Observe);
        directory.shared.blocks.set_exempt(drops::exempt(&config));
        Ok(State {
            shared: directory.shared.clone(),
            engine,
            path,
            started: Instant::now(),
            ledger,
            log,
            alerts,
            resolver,
            count_due_ms: AtomicU64::new(0),
            blocked: AtomicUsize::new(0),
            addresses,
            tls,
            trust,
            drops: Drops::new(),
            at_start: config,
            inner,
            directory,
            guard,
            kernel: kernel.map(Mutex::new),
            cluster: None,
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn kernel(&self) -> Result<MutexGuard<'_, Kernel>, String> {
        match &self.kernel {
            Ok(kernel) => Ok(kernel.lock().unwrap_or_else(PoisonError::into_inner)),
            Err(reason) => Err(format!("the kernel plane is off: {reason}")),
        }
    }

    /// Publishes to the kernel who is to be dropped. Tells whether more wait.
    pub fn follow_offenders(&self) -> bool {
        let kernel = self.kernel().ok();
        self.drops.tick(
            &self.shared,
            kernel.as_deref(),
            &self.inner().config,
            &|net, hold| self.tell_block(net, Some(hold)),
        )
    }

    /// Alerts, the limits' clock, blocks that have ended, and for the kernel how loaded the cores are. Tells whether their
    /// loads move: then the next tick is to be soon.
    pub fn tick(&self) -> bool {
        self.alerts.tick(&self.shared.snapshot.load().quota);
        let more = self.follow_offenders();
        let Ok(kernel) = self.kernel() else { return more };
        let now_ms = self.started.elapsed().as_millis() as u64;
        if now_ms >= self.count_due_ms.load(Ordering::Relaxed) {
            let due_ms = now_ms + COUNT_EVERY.as_millis() as u64;
            self.count_due_ms.store(due_ms, Ordering::Relaxed);
            self.blocked.store(kernel.blocked().len(), Ordering::Relaxed);
        }
        let loads_move = kernel.publish_loads(self.shared.cores.iter().map(|core| {
            let streams = u32::try_from(core.counters().streams_open()).unwrap_or(u32::MAX);
            (core.core(), streams)
        }));
        kernel.tick();
        more || loads_move
    }

    /// Whether every core has shown itself lately.
    pub fn cores_are_alive(&self, age_ms_max: u64) -> bool {
        let now_ms = clock::monotonic_ns() / 1_000_000;
        self.shared
            .cores
            .iter()
            .all(|core| core.heartbeat_age_ms(now_ms) <= age_ms_max)
    }

    /// How long running requests may go on after the first signal to end.
    pub fn drain(&self) -> Duration {
        self.inner().config.drain.0
    }

    /// Writes out what is left at the end.
    pub fn end(&self) {
        self.log.flush();
    }

    /// Puts the configuration file as it is now in force, on all cores at once. Running requests keep what they
    /// started with.
    ///
    /// # Errors
    /// What is wrong with the file; then nothing has changed.
    pub fn reload(&self) -> Result<String, String> {
        if self.shared.level() == 0 {
            notify::reloading();
        }
        let result = self.try_reload();
        if let Err(error) = &result {
            tracing::error!("the new configuration is refused, the old one stays: {error}");
        }
        notify::ready();
        notify::status(&self.summary());
        result
    }

    /// What systemd shows of the service.
    pub fn summary(&self) -> String {
        let cores = self.shared.cores.len();
        let generation = self.shared.snapshot.load().generation;
        format!(
            "serving on {cores} cores ({}), configuration generation {generation}",
            self.engine.name()
        )
    }

    fn try_reload(&self) -> Result<String, String> {
        if self.shared.level() > 0 {
            return Err("the gateway is being stopped".into());
        }
        let config = config::load(&self.path).map_err(|errors| errors.to_string())?;
        // What may still fail comes first: a refused configuration leaves nothing behind.
        let fresh_tls = self.fresh_tls(&config)?;
        let tokens = admin::tokens(&config).map_err(|error| format!("{error:#}"))?;
        let mut inner = self.inner();
        let snapshot = Snapshot::build(&config, &mut inner.registry).map_err(|error| format!("{error:#}"))?;
        snapshot.load_vocabularies();
        let unchanged = needs_restart(&self.at_start, &config);

        let generation = snapshot.generation;
        self.guard.set(tokens);
        self.directory.names.store(Arc::new(Names::new(&config)));
        self.shared.snapshot.store(Arc::new(snapshot));
        for (shared, fresh) in self.tls.iter().zip(fresh_tls) {
            if let (Some(shared), Some(fresh)) = (shared, fresh) {
                shared.store(fresh);
            }
        }
        for (trust, listener) in self
            .trust
            .iter()
            .zip(same_listeners(&self.at_start.listeners, &config.listeners))
        {
            if let Some(listener) = listener {
                trust.store(Arc::new(Trust::new(listener)));
            }
        }
        self.follow(&config);
        inner.config = config;
        super::access::renew_organizations(&self.shared, &inner.config);
        inner.registry.endpoints.sweep();
        inner.registry.calibrations.sweep();
        self.resolver.watch(&inner.registry.endpoints.named());
        tracing::info!(generation, "configuration reloaded");
        for warning in &inner.config.warnings {
            tracing::warn!("{warning}");
        }
        if unchanged.is_empty() {
            return Ok(format!("reloaded, generation {generation}"));
        }
        let parts = unchanged.join(", ");
        tracing::warn!("changes to {parts} take effect with a restart only");
        Ok(format!(
            "reloaded, generation {generation}; changes to {parts} need a restart"
        ))
    }

    /// Reads certificates again, for the listeners that are open, in their order.
    fn fresh_tls(&self, config: &Config) -> Result<Vec<Option<Arc<rustls::ServerConfig>>>, String> {
        let load =
            |listener: Option<&schema::Listener>| match listener.and_then(|listener| listener.tls.as_ref()) {
                Some(settings) => tls::server_config(settings)
                    .map(Some)
                    .map_err(|error| format!("{error:#}")),
                None => Ok(None),
            };
        let open = same_listeners(&self.at_start.listeners, &config.listeners);
        open.into_iter().map(load).collect()
    }

    /// Lets everything beside the data plane follow a new configuration.
    fn follow(&self, config: &Config) {
        self.shared
            .blocks
            .set_observe(config.kernel.mode == KernelMode::Observe);
        self.shared.blocks.set_exempt(drops::exempt(config));
        if let Ok(kernel) = self.kernel() {
            kernel.set_observe(config.kernel.mode == KernelMode::Observe);
            kernel.set_steering(config.kernel.steering);
            kernel.set_exempt(&drops::exempt(config));
            kernel.set_connections(&config.kernel.connections);
        }
        if let Err(error) = logging::set_level(&config.log.level) {
            tracing::warn!(%error, "the log's level stays");
        }
        if let Err(error) = self.log.reopen(&Destination::parse(&config.log.access)) {
            tracing::warn!(%error, "the access log stays where it was");
        }
        self.alerts.follow(&config.alerts);
    }

    /// The gateway's state, for `gateway status`.
    pub fn status(&self) -> Value {
        let inner = self.inner();
        let totals = telemetry::totals(&self.shared.cores);
        let snapshot = self.shared.snapshot.load();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "uptime_seconds": self.started.elapsed().as_secs(),
            "state": match self.shared.level() { 0 => "running", 1 => "draining", _ => "stopping" },
            "config": { "path": self.path, "generation": snapshot.generation },
            "listeners": self.addresses,
            "cores": self.shared.cores.len(),
            "engine": self.engine.name(),
            "models": inner.config.models.len(),
            "keys": inner.config.keys.len(),
            "keys_at_run_time": self.shared.keys.len(),
            "connections_open": totals.connections_open(),
            "streams_open": totals.streams_open(),
            "requests": totals.requests,
            "refused": totals.refused_total(),
        "ledger": self.ledger.status(),
            "limits": super::quota::status(&snapshot.quota),
            "alerts": self.alerts.counts().into_iter().collect::<std::collections::BTreeMap<_, _>>(),
            "kernel": self.kernel_brief(),
            "store": self.cluster.as_ref().map(|cluster| cluster.status().json()),
            "degraded": self.degraded(&inner.config),
        })
    }

    fn kernel_brief(&self) -> Value {
        match self.kernel() {
            Ok(kernel) => {
                json!({ "loaded": true, "dropped": kernel.stats().dropped, "blocked": self.blocked.load(Ordering::Relaxed) })
            }
            Err(reason) => json!({ "loaded": false, "reason": reason }),
        }
    }

    /// Everything that does not work as it could, in words.
    fn degraded(&self, config: &Config) -> Vec<String> {
        let mut degraded = Vec::new();
        if self.engine == Engine::Epoll && config.workers.driver != schema::Driver::Epoll {
            degraded.push("io_uring cannot be used: the data plane runs on epoll".into());
        }
        match self.kernel() {
            Ok(kernel) => degraded.extend(kernel.degraded()),
            Err(reason) if config.kernel.mode != KernelMode::Off => degraded.push(reason),
            Err(_) => {}
        }
        let ledger = self.ledger.status();
        if let Some(error) = ledger.trouble {
            degraded.push(format!("ledger: {error}"));
        }
        if let Some(error) = ledger.export_trouble {
            degraded.push(format!("export: {error}"));
        }
        degraded.extend(
            self.cluster
                .as_ref()
                .and_then(|cluster| cluster.status().trouble()),
        );
        if let Some(error) = self.directory.store.trouble() {
            degraded.push(format!("changes by administrators cannot be kept: {error}"));
        }
        degraded
    }

    /// Keys, teams and budgets.
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// Sums by key and model since the start, of what the ledger has folded.
    pub fn model_totals(&self) -> Vec<(String, String, Counters)> {
        self.ledger.totals()
    }

    /// Clients and keys, for `gateway top`.
    pub fn top(&self, query: &top::Query) -> Value {
        let mut clients = top::Clients::default();
        let mut sums = HashMap::new();
        for core in &self.shared.cores {
            core.clients().add_to(&mut sums);
        }
        clients.figures(sums);
        let off = match self.kernel() {
            Ok(kernel) => {
                clients.kernel(kernel.clients(TOP_CLIENTS_MAX));
                for blocked in kernel.blocked().iter().take(TOP_CLIENTS_MAX) {
                    let seconds = blocked.remaining.as_secs_f64();
                    clients.blocked(blocked.net.addr(), seconds, blocked.dropped);
                }
                None
            }
            Err(reason) => Some(reason),
        };
        let totals = telemetry::totals(&self.shared.cores);
        json!({
            "connections": totals.connections_open(),
            "streams": totals.streams_open(),
            "requests": totals.requests,
            "refusals": totals.refused_total() + totals.clients_turned_away,
            "tokens": totals.tokens_prompt.saturating_add(totals.tokens_completion),
            "uptime_seconds": self.started.elapsed().as_secs_f64(),
            "kernel_off": off,
            "clients": clients.json(query),
            "keys": top::keys(self.ledger.totals(), query),
        })
    }

    /// The kernel plane in detail, for `gateway kernel status`.
    pub fn kernel_status(&self) -> Value {
        let kernel = match self.kernel() {
            Ok(kernel) => kernel,
            Err(reason) => return json!({ "loaded": false, "reason": reason }),
        };
        admin::kernel::detail(&kernel)
    }

    /// The same without the list of blocked clients, which may be long: for metrics.
    pub fn kernel_figures(&self) -> Value {
        match self.kernel() {
            Ok(kernel) => {
                let mut figures = admin::kernel::figures(&kernel);
                figures["blocked_clients"] = self.blocked.load(Ordering::Relaxed).into();
                figures
            }
            Err(reason) => json!({ "loaded": false, "reason": reason }),
        }
    }

    /// Blocks a client or a network by hand; says which network that is.
    pub fn kernel_block(&self, target: Target, hold: Duration) -> Result<IpNet, String> {
        let kernel = self.kernel()?;
        let net = target.net(|client| kernel.net_of(client));
        // Asked first, so that nothing the kernel has taken must be taken back; only this thread blocks.
        self.drops.room_for(&self.shared, net)?;
        kernel.block(net, hold).map_err(|error| error.to_string())?;
        self.drops.block_net(&self.shared, net, hold)?;
        self.tell_block(net, Some(hold));
        Ok(net)
    }

    /// Lifts a block; says of which network, and false where there was none.
    pub fn kernel_unblock(&self, target: Target) -> Result<(IpNet, bool), String> {
        let kernel = self.kernel()?;
        let net = target.net(|client| kernel.net_of(client));
        self.drops.lift(&self.shared, net);
        let lifted = kernel.unblock(net).map_err(|error| error.to_string())?;
        self.tell_block(net, None);
        Ok((net, lifted))
    }

    /// The clients with the most open connections, as the kernel counts them; at most so many.
    pub fn kernel_clients(&self, max: usize) -> Result<Value, String> {
        let kernel = self.kernel()?;
        Ok(admin::kernel::clients(&kernel, max))
    }
}

/// For each listener that is open the one of a new configuration at the same address. The order says nothing: a list
/// that was reordered must not give one address the certificates of another. Several at port 0 are told apart by it.
fn same_listeners<'a>(
    open: &[schema::Listener],
    listeners: &'a [schema::Listener],
) -> Vec<Option<&'a schema::Listener>> {
    let same = |place: usize| {
        let address = open[place].address;
        let earlier = open[..place]
            .iter()
            .filter(|other| other.address == address)
            .count();
        listeners
            .iter()
            .filter(|listener| listener.address == address)
            .nth(earlier)
    };
    (0..open.len()).map(same).collect()
}

/// Parts of the configuration that a reload cannot change, as far as they differ from what the process was started with.
fn needs_restart(before: &Config, after: &Config) -> Vec<&'static str> {
    let addresses = |config: &Config| {
        let listeners = config.listeners.iter();
        let mut addresses: Vec<_> = listeners
            .map(|listener| (listener.address, listener.tls.is_some()))
            .collect();
        addresses.sort();
        addresses
    };
    let mut parts = Vec::new();
    let mut note = |differs: bool, name| {
        if differs {
            parts.push(name)
        }
    };
    note(addresses(before) != addresses(after), "listeners");
    note(before.admin.address != after.admin.address, "admin.address");
    let workers = |config: &Config| {
        let workers = &config.workers;
        (workers.threads, workers.driver, workers.pin)
    };
    note(workers(before) != workers(after), "workers");
    let ledger = |config: &Config| {
        let ledger = &config.ledger;
        let export = serde_json::to_string(&ledger.export).unwrap_or_default();
        (
            ledger.path.clone(),
            ledger.sync,
            ledger.keep,
            ledger.retention,
            export,
        )
    };
    note(ledger(before) != ledger(after), "ledger");
    note(
        before.limit_state.levels != after.limit_state.levels,
        "limit_state.levels",
    );
    note(before.store != after.store, "store");
    note(before.log.format != after.log.format, "log.format");
    // Exempt networks, bounds and the mode's other words follow a reload.
    let kernel = |config: &Config| {
        let kernel = &config.kernel;
        (
            kernel.mode == KernelMode::Off,
            (kernel.drop.prefix_v4, kernel.drop.prefix_v6),
            (
                kernel.cgroup.clone(),
                kernel.instance.clone(),
                kernel.bpffs.clone(),
            ),
            kernel.xdp.clone(),
        )
    };
    note(kernel(before) != kernel(after), "kernel");
    parts
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn config(text: &str) -> Config {
        config::parse(text, "test", Path::new("/"), &|_| None).expect("configuration")
    }

    fn listeners(addresses: &str) -> Config {
        config(&format!("listeners: [{addresses}]"))
    }

    #[test]
    fn listeners_are_known_by_address_and_not_by_place() {
        let open = listeners("{address: '127.0.0.1:1'}, {address: '127.0.0.1:2'}, {address: '127.0.0.1:3'}");
        let new = listeners("{address: '127.0.0.1:4'}, {address: '127.0.0.1:2'}, {address: '127.0.0.1:1'}");
        let same = same_listeners(&open.listeners, &new.listeners);
        let ports: Vec<_> = same
            .iter()
            .map(|listener| listener.map(|listener| listener.address.port()))
            .collect();
        assert_eq!(ports, [Some(1), Some(2), None]);
    }

    #[test]
    fn listeners_at_port_0_keep_their_order() {
        let any = listeners("{address: '127.0.0.1:0'}, {address: '127.0.0.1:0'}");
        let same = same_listeners(&any.listeners, &any.listeners);
        assert!(std::ptr::eq(same[0].expect("first"), &any.listeners[0]));
        assert!(std::ptr::eq(same[1].expect("second"), &any.listeners[1]));
    }

    #[test]
    fn what_a_reload_does_not_change_is_named() {
        let with = |more: &str| config(&format!("listeners: [{{address: '127.0.0.1:1'}}]\n{more}"));
        for (more, part) in [
            ("admin: { address: '127.0.0.1:9901' }", "admin.address"),
            ("workers: { threads: 3 }", "workers"),
            ("workers: { pin: false }", "workers"),
            ("ledger: { path: /elsewhere }", "ledger"),
            ("ledger: { sync: 7ms }", "ledger"),
            ("ledger: { keep: 7MiB }", "ledger"),
            ("log: { format: json }", "log.format"),
            ("kernel: { mode: off }", "kernel"),
            ("kernel: { drop: { prefix_v6: 48 } }", "kernel"),
            ("kernel: { instance: blue }", "kernel"),
            ("kernel: { xdp: { interface: eth0 } }", "kernel"),
        ] {
            assert_eq!(needs_restart(&with(""), &with(more)), [part], "{more}");
        }
        assert!(
            needs_restart(
                &with(""),
                &with("drain: 7s\nlog: { level: warn }\nkernel: { connections: { half_open: 9 } }")
            )
            .is_empty()
        );
    }
}
