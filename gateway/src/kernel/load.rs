//! Loading: the object, its programs, its maps' first contents.

use std::{fs::File, path::PathBuf, sync::Mutex};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, Map, MapError},
    programs::{CgroupAttachMode, SkReuseport, SockOps},
};
use aya_log::EbpfLogger;
use gateway_common::{CORE_NONE, CORES_MAX, CPUS_MAX, Settings, names};

use crate::config::schema::{self, KernelMode};

use super::{Kernel, Loads, Off, Plan, Policy, SettingsMap, cgroup, clock, lines::ToTracing, off};

/// The committed object, built by `gateway-ebpf/build.sh`.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../gateway-ebpf/gateway.bpf.o"
));

impl Kernel {
    /// Loads the programs and attaches the accounting; [`Kernel::guard`] then attaches to the listeners.
    ///
    /// # Errors
    /// Says in plain words what is missing and what to do. Nothing is left behind. When only the accounting cannot be
    /// had, loading succeeds and [`Kernel::degraded`] says so.
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
        // No BTF of the running kernel is needed (the programs have no CO-RE relocations); parsing it takes a while.
        let loaded = EbpfLoader::new().btf(None).load(OBJECT);
        let mut ebpf = loaded.map_err(|e| Off::failed("loading the eBPF object", &e))?;
        let lines = EbpfLogger::init_with_logger(&mut ebpf, ToTracing);
        let lines = lines.map_err(|e| Off::failed("opening the programs' log", &e))?;
        load_listener(&mut ebpf)?;
        let mut degraded = Vec::new();
        if let Err(off) = account(&mut ebpf, plan.config) {
            degraded.push(format!("connection accounting is off: {off}"));
        }
        let mut kernel = Kernel {
            settings: Mutex::new(SettingsMap {
                map: map(&mut ebpf, names::SETTINGS)?,
                now: Settings::default(),
            }),
            loads: Mutex::new(Loads {
                map: map(&mut ebpf, names::LOADS)?,
                published: vec![0; plan.cores],
            }),
            blocks: Mutex::new(map(&mut ebpf, names::BLOCKS)?),
            clients: map(&mut ebpf, names::CLIENTS)?,
            totals: map(&mut ebpf, names::TOTALS)?,
            groups: map(&mut ebpf, names::GROUPS)?,
            sockets: map(&mut ebpf, names::SOCKETS)?,
            ports: map(&mut ebpf, names::PORTS)?,
            cpu_cores: map(&mut ebpf, names::CPU_CORES)?,
            lines: Mutex::new(lines),
            taken: std::array::from_fn(|_| Vec::new()),
            policy: Policy::new(&plan.config.drop.exempt),
            degraded,
            ebpf,
        };
        kernel.fill_maps(plan)?;
        Ok(kernel)
    }

    fn fill_maps(&mut self, plan: &Plan) -> Result<(), Off> {
        let failed = |e: MapError| Off::failed("filling the kernel maps", &e);
        for port in plan.ports {
            self.ports.insert(u32::from(*port), 0, 0).map_err(failed)?;
        }
        place_all(&mut self.cpu_cores, plan.cores).map_err(failed)?;
        self.set(|settings| {
            *settings = Settings {
                enforce: u32::from(plan.config.mode != KernelMode::Observe),
                steering: u32::from(plan.config.steering),
                cores: plan.cores as u32,
                least_core: 0,
            }
        });
        Ok(())
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
    if let Some(missing) = off::missing_for_accounting() {
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
fn place_all(cpu_cores: &mut Array<aya::maps::MapData, u32>, cores: usize) -> Result<(), MapError> {
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
