//! Loading: the object, its programs, its maps' first contents.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Mutex,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, MapError},
    programs::{CgroupAttachMode, SkReuseport, SockOps, Xdp, XdpMode},
};
use aya_log::EbpfLogger;
use gateway_common::{
    CLIENTS_MAX, CORE_NONE, CORES_MAX, CPUS_MAX, Client, ClientKey, HALF_OPEN_NS, Prefixes, Settings, names,
};

use crate::config::schema::{self, KernelMode};

use super::{
    Kernel, Off, Plan, SettingsMap,
    blocks::Blocks,
    cgroup, clock,
    lines::ToTracing,
    loads::Loads,
    near, off,
    pins::{Instance, Pins},
    policy::Policy,
    ports::Ports,
    rights,
};

/// The committed object, built by `gateway-ebpf/build.sh`.
pub(super) static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../gateway-ebpf/gateway.bpf.o"
));

impl Kernel {
    /// Loads the programs and attaches the accounting and, where it is configured, XDP; [`Kernel::guard`] then attaches to
    /// the listeners. Blocks and counts of an earlier run are taken over.
    ///
    /// # Errors
    /// Says in plain words what is missing and what to do. Nothing is left behind. When only accounting, XDP or the place for
    /// the maps cannot be had, loading succeeds and [`Kernel::degraded`] says so.
    pub fn load(plan: &Plan) -> Result<Kernel, Off> {
        if plan.config.mode == KernelMode::Off {
            return Err(Off::new("switched off by kernel.mode"));
        }
        if plan.cores == 0 || plan.cores > CORES_MAX as usize {
            return Err(Off::new(format!(
                "{} cores, the programs know 1 to {CORES_MAX}",
                plan.cores
            )));
        }
        if let Some(missing) = off::missing() {
            return Err(missing);
        }
        off::lift_memlock();
        let prefixes = Prefixes {
            v4: plan.config.drop.prefix_v4,
            v6: plan.config.drop.prefix_v6,
        };
        let mut degraded = Vec::new();
        let (mut ebpf, pins) = load_object(plan, prefixes, &mut degraded)?;
        let lines = EbpfLogger::init_with_logger(&mut ebpf, ToTracing);
        let lines = lines.map_err(|e| Off::failed("opening the programs' log", &e))?;
        load_listener(&mut ebpf)?;
        let ports = Ports::new(map(&mut ebpf, names::PORTS)?, map(&mut ebpf, names::PORT_COUNTS)?);
        let mut counts = Counts {
            clients: map(&mut ebpf, names::CLIENTS)?,
            ports: ports.map_err(|e| Off::failed("taking over the counts", &e))?,
        };
        if let Some(pins) = pins.as_ref().filter(|pins| pins.found()) {
            let ended = counts.take_over(plan.ports)?;
            let shown = pins.directory().display();
            tracing::info!(
                ended,
                "blocks and counts of an earlier run are taken over from {shown}"
            );
        }
        let policy = Policy::new(&plan.config.drop.exempt, prefixes);
        let (clients, nets, exempt) = (
            map(&mut ebpf, names::BLOCKS)?,
            map(&mut ebpf, names::NETS)?,
            map(&mut ebpf, names::EXEMPT)?,
        );
        let blocks = Blocks::new(clients, nets, exempt, policy);
        let mut kernel = Kernel {
            settings: Mutex::new(SettingsMap {
                map: map(&mut ebpf, names::SETTINGS)?,
                now: Settings::default(),
            }),
            loads: Mutex::new(loads(&mut ebpf, plan.cores)?),
            blocks: Mutex::new(blocks.map_err(|e| Off::failed("taking over the blocks", &e))?),
            clients: counts.clients,
            totals: map(&mut ebpf, names::TOTALS)?,
            groups: map(&mut ebpf, names::GROUPS)?,
            near: near::Ports::new(map(&mut ebpf, names::NEAR)?),
            sockets: map(&mut ebpf, names::SOCKETS)?,
            ports: counts.ports,
            cpu_cores: map(&mut ebpf, names::CPU_CORES)?,
            lines: Mutex::new(lines),
            taken: std::array::from_fn(|_| Vec::new()),
            degraded,
            xdp: None,
            pins,
            ebpf,
        };
        kernel.fill_maps(plan, prefixes)?;
        kernel.attach(plan.config);
        Ok(kernel)
    }

    fn fill_maps(&mut self, plan: &Plan, prefixes: Prefixes) -> Result<(), Off> {
        let failed = |e: MapError| Off::failed("filling the kernel maps", &e);
        // 0 stands for whichever is free; its listener is counted when it is guarded.
        for port in plan.ports.iter().filter(|port| **port != 0) {
            self.count_port(*port)?;
        }
        place_all(&mut self.cpu_cores, plan.cores).map_err(failed)?;
        let (mask_v4, mask_v6) = prefixes.masks();
        self.show(&super::locked(&self.blocks));
        self.set(|settings| {
            *settings = Settings {
                enforce: u32::from(plan.config.mode != KernelMode::Observe),
                steering: u32::from(plan.config.steering),
                cores: plan.cores as u32,
                mask_v4,
                mask_v6,
                forwards: u64::from(rights::may_forward()),
                ..*settings
            };
            bound(settings, &plan.config.connections);
        });
        Ok(())
    }

    /// Attaches what the gateway can do without; what fails is said in [`Kernel::degraded`].
    fn attach(&mut self, config: &schema::Kernel) {
        if let Err(off) = account(&mut self.ebpf, config) {
            self.degraded.push(format!("connection accounting is off: {off}"));
        }
        let Some(xdp) = &config.xdp else { return };
        match attach_xdp(&mut self.ebpf, xdp) {
            Ok(mode) => {
                tracing::info!(interface = xdp.interface, mode, "XDP drops blocked clients");
                self.xdp = Some((xdp.interface.clone(), mode));
            }
            Err(off) => self
                .degraded
                .push(format!("XDP on {} is off: {off}", xdp.interface)),
        }
    }
}

/// Sets the bounds of connections.
pub(super) fn bound(settings: &mut Settings, config: &schema::Connections) {
    const SECOND_NS: u64 = 1_000_000_000;
    settings.rate_ns = config
        .per_client_rate
        .map_or(0, |rate| SECOND_NS / u64::from(rate.max(1)));
    let burst = config
        .burst
        .or(config.per_client_rate.map(|rate| rate.saturating_mul(2)));
    settings.burst_ns = settings.rate_ns * u64::from(burst.unwrap_or(1).max(1) - 1);
    settings.open_max = config.per_client_open.map_or(0, u64::from);
    settings.half_open_ns = HALF_OPEN_NS.checked_div(u64::from(config.half_open)).unwrap_or(0);
}

/// Loads the object, with its maps pinned where that can be had.
fn load_object(
    plan: &Plan,
    prefixes: Prefixes,
    degraded: &mut Vec<String>,
) -> Result<(Ebpf, Option<Pins>), Off> {
    let instance = Instance::new(plan.config.instance.as_deref(), plan.state);
    let pins = Pins::open(&plan.config.bpffs, &instance, prefixes).and_then(|pins| {
        // No BTF of the running kernel is needed (the programs have no CO-RE relocations); parsing it takes a while.
        let mut loader = EbpfLoader::new();
        loader.btf(None);
        for (name, path) in pins.paths() {
            loader.map_pin_path(name, path);
        }
        match loader.load(OBJECT) {
            Ok(ebpf) => Ok((ebpf, pins)),
            Err(error) => Err(Off::failed("pinning the maps", &error)),
        }
    });
    match pins {
        Ok((ebpf, pins)) => Ok((ebpf, Some(pins))),
        Err(off) => {
            let loaded = EbpfLoader::new().btf(None).load(OBJECT);
            let ebpf = loaded.map_err(|e| Off::failed("loading the eBPF object", &e))?;
            degraded.push(format!("blocks and counts do not outlive a restart: {off}"));
            Ok((ebpf, None))
        }
    }
}

/// A map of the object, out of aya's table and as its type.
fn map<M>(ebpf: &mut Ebpf, name: &'static str) -> Result<M, Off>
where
    M: TryFrom<Map, Error = MapError>,
{
    let map = ebpf
        .take_map(name)
        .ok_or_else(|| Off::new(format!("the object has no map {name}")))?;
    M::try_from(map).map_err(|e| Off::failed(name, &e))
}

fn loads(ebpf: &mut Ebpf, cores: usize) -> Result<Loads, Off> {
    match ebpf.map(names::LOADS) {
        Some(Map::Array(map)) => {
            Loads::new(map, cores).map_err(|e| Off::failed("mapping the cores' loads", &e))
        }
        _ => Err(Off::new("the object has no array of loads")),
    }
}

/// What connections were counted in.
struct Counts {
    clients: HashMap<MapData, ClientKey, Client>,
    ports: Ports,
}

impl Counts {
    /// Books what the end of the earlier process kept from being counted: its connections ended with it. Forgets ports that
    /// are no longer listened on. Returns how many connections were open.
    fn take_over(&mut self, ports: &[u16]) -> Result<u64, Off> {
        let failed = |e: MapError| Off::failed("taking over the counts", &e);
        let entries = self
            .clients
            .iter()
            .take(CLIENTS_MAX as usize)
            .filter_map(Result::ok);
        let open: Vec<(ClientKey, Client)> = entries
            .filter(|(_, client)| client.opened != client.closed)
            .collect();
        for (key, client) in open {
            let closed = client.opened;
            self.clients
                .insert(key, Client { closed, ..client }, 0)
                .map_err(failed)?;
        }
        self.ports.take_over(ports).map_err(failed)
    }
}

fn load_listener(ebpf: &mut Ebpf) -> Result<(), Off> {
    let program = ebpf
        .program_mut(names::LISTENER)
        .ok_or_else(|| Off::new("the object has no listener program"))?;
    let program: &mut SkReuseport = program
        .try_into()
        .map_err(|e| Off::failed("finding the listener program", &e))?;
    program
        .load()
        .map_err(|e| Off::failed("loading the listener program", &e))
}

/// Loads `connections` and links it to the service's cgroup. The link is aya's and goes with it.
fn account(ebpf: &mut Ebpf, config: &schema::Kernel) -> Result<(), Off> {
    if let Some(missing) = off::missing_net_admin() {
        return Err(missing);
    }
    let directory = directory(config)?;
    let shown = directory.display();
    let cgroup =
        File::open(&directory).map_err(|e| Off::failed(&format!("opening the cgroup {shown}"), &e))?;
    let program = ebpf
        .program_mut(names::CONNECTIONS)
        .ok_or_else(|| Off::new("the object has no accounting program"))?;
    let program: &mut SockOps = program
        .try_into()
        .map_err(|e| Off::failed("finding the accounting program", &e))?;
    program
        .load()
        .map_err(|e| Off::failed("loading the accounting program", &e))?;
    // A cgroup link takes no flags and always stands beside others (cgroup_bpf_link_attach, kernel/bpf/cgroup.c), so a
    // second gateway on the same cgroup has its own, and each counts its own ports.
    match program.attach(&cgroup, CgroupAttachMode::Single) {
        Ok(_) => Ok(()),
        Err(error) if off::denied(&error) => Err(Off::new(format!(
            "another sock_ops program has {shown} or a cgroup above for itself; set kernel.cgroup to another one"
        ))),
        Err(error) => Err(Off::failed(&format!("attaching to the cgroup {shown}"), &error)),
    }
}

/// Loads `driver` and links it to the interface; says in which mode it runs. The link is aya's and goes with it.
fn attach_xdp(ebpf: &mut Ebpf, config: &schema::Xdp) -> Result<&'static str, Off> {
    if let Some(missing) = off::missing_net_admin() {
        return Err(missing);
    }
    let program = ebpf
        .program_mut(names::DRIVER)
        .ok_or_else(|| Off::new("the object has no XDP program"))?;
    let program: &mut Xdp = program
        .try_into()
        .map_err(|e| Off::failed("finding the XDP program", &e))?;
    program
        .load()
        .map_err(|e| Off::failed("loading the XDP program", &e))?;
    let interface = config.interface.as_str();
    let native = || ("native", XdpMode::Driver);
    let generic = || ("generic", XdpMode::Skb);
    let modes = match config.mode {
        schema::XdpMode::Auto => vec![native(), generic()],
        schema::XdpMode::Native => vec![native()],
        schema::XdpMode::Generic => vec![generic()],
    };
    let mut last = Off::new("no mode to try");
    for (name, mode) in modes {
        match program.attach(interface, mode) {
            Ok(_) => return Ok(name),
            Err(error) => {
                last = Off::failed(&format!("attaching to {interface} as {name}"), &error);
                tracing::debug!("{last}");
            }
        }
    }
    Err(last)
}

fn directory(config: &schema::Kernel) -> Result<PathBuf, Off> {
    match &config.cgroup {
        Some(directory) => Ok(directory.clone()),
        None => cgroup::own().map_err(|e| {
            Off::new(format!(
                "{e}; mount cgroup2, or name a directory in kernel.cgroup"
            ))
        }),
    }
}

/// Core n is pinned to the n-th CPU that the process may run on; further CPUs are shared out in turn.
fn place_all(cpu_cores: &mut Array<MapData, u32>, cores: usize) -> Result<(), MapError> {
    let cpus = clock::cpus().unwrap_or_default();
    let last = cpus
        .last()
        .copied()
        .unwrap_or(0)
        .max(configured_cpus())
        .min(CPUS_MAX as usize - 1);
    for cpu in 0..=last {
        let core = cpus
            .iter()
            .position(|allowed| *allowed == cpu)
            .map_or(CORE_NONE, |rank| (rank % cores) as u32);
        cpu_cores.set(cpu as u32, core, 0)?;
    }
    Ok(())
}

/// CPUs of the machine, also those that this process may not use but packets arrive on.
fn configured_cpus() -> usize {
    aya::util::nr_cpus().unwrap_or(1)
}

/// Removes kernel maps that gateways which no longer run left under a BPF file system: of one instance, or of all. Returns
/// their names.
///
/// # Errors
/// The file system cannot be read.
pub fn remove_pins(bpffs: &Path, instance: Option<&str>) -> std::io::Result<Vec<String>> {
    super::pins::remove(bpffs, instance)
}

#[cfg(test)]
mod tests {
    use gateway_common::{LAYOUT, LAYOUT_MARK};

    use super::*;

    #[test]
    fn the_object_was_built_from_these_types() {
        let at = memchr::memmem::find(OBJECT, &LAYOUT_MARK).expect("a stamp in the object");
        let stamp: [u8; 8] = OBJECT[at + 8..at + 16].try_into().expect("eight bytes");
        assert_eq!(u64::from_le_bytes(stamp), LAYOUT, "run gateway-ebpf/build.sh");
    }

    #[test]
    fn bounds_become_times() {
        let mut settings = Settings::default();
        bound(&mut settings, &schema::Connections::default());
        assert_eq!(
            (settings.rate_ns, settings.burst_ns, settings.open_max),
            (0, 0, 0)
        );
        assert_eq!(settings.half_open_ns, HALF_OPEN_NS / 4096);
        let all = schema::Connections {
            per_client_rate: Some(10),
            burst: None,
            per_client_open: Some(7),
            half_open: 0,
        };
        bound(&mut settings, &all);
        assert_eq!(
            (settings.rate_ns, settings.burst_ns),
            (100_000_000, 1_900_000_000)
        );
        assert_eq!((settings.open_max, settings.half_open_ns), (7, 0));
    }
}
