//! Turns evidence into drops: who is refused again and again is dropped by the kernel, or turned away by the cores where
//! it stands behind a proxy.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use ipnet::IpNet;

use crate::{
    bounds::{BLOCK_NETS_MAX, OFFENDERS_MAX},
    config::{
        Config,
        schema::{Drop, KernelMode},
    },
    core::Shared,
    kernel::{BlockError, Kernel},
    net::clock,
    quota::refusals::{Growth, Offenders, Origin, Prefixes, Via},
};

/// Clients taken from each queue in one pass.
const CLIENTS_PER_PASS: usize = 256;

/// What is remembered of offenders. For the control thread.
pub struct Drops {
    offenders: Mutex<Offenders>,
}

impl Drops {
    /// Nobody yet.
    pub fn new() -> Drops {
        Drops {
            offenders: Mutex::new(Offenders::new(OFFENDERS_MAX)),
        }
    }

    /// Acts on what the cores have noted since the last pass; `tell` hears of each network that the kernel drops from now on.
    /// Tells whether more may wait than one pass takes.
    pub fn tick(
        &self,
        shared: &Shared,
        kernel: Option<&Kernel>,
        config: &Config,
        tell: &dyn Fn(IpNet, Duration),
    ) -> bool {
        let mut offenders = self.offenders.lock().unwrap_or_else(PoisonError::into_inner);
        let prefixes = prefixes(&config.kernel.drop);
        let mut redeemed = 0;
        while redeemed < CLIENTS_PER_PASS
            && let Some(client) = shared.refusals.next_redeemed()
        {
            offenders.redeem(prefixes.net(client.ip), client.via);
            redeemed += 1;
        }
        for _ in 0..CLIENTS_PER_PASS {
            let Some(client) = shared.refusals.next_offender() else {
                return redeemed == CLIENTS_PER_PASS;
            };
            if config.kernel.mode != KernelMode::Off {
                drop_client(&mut offenders, shared, kernel, config, client, tell);
            }
        }
        true
    }

    /// Forgets what was held against a network whose block was lifted by hand.
    pub fn lift(&self, shared: &Shared, net: IpNet) {
        shared.blocks.unblock(net);
        let mut offenders = self.offenders.lock().unwrap_or_else(PoisonError::into_inner);
        offenders.lift(net);
    }

    /// Whether one network more can be blocked by hand, or this one again.
    ///
    /// # Errors
    /// Too many networks are blocked by hand.
    pub fn room_for(&self, shared: &Shared, net: IpNet) -> Result<(), String> {
        match shared.blocks.has_room(net, clock::monotonic_ns()) {
            true => Ok(()),
            false => Err(too_many()),
        }
    }

    /// Ends what a client has open that another host blocked; such blocks are not bounded as those by hand are.
    pub fn block_client(&self, shared: &Shared, client: IpNet, hold: Duration) {
        let until_ns = clock::monotonic_ns().saturating_add(hold.as_nanos() as u64);
        shared.blocks.block(client, Via::Direct, until_ns);
    }

    /// Ends what the clients of a network have open that was blocked by hand, and turns away those behind proxies.
    ///
    /// # Errors
    /// Too many networks are blocked by hand.
    pub fn block_net(&self, shared: &Shared, net: IpNet, hold: Duration) -> Result<(), String> {
        let now_ns = clock::monotonic_ns();
        let until_ns = now_ns.saturating_add(hold.as_nanos() as u64);
        match shared.blocks.block_net(net, until_ns, now_ns) {
            true => Ok(()),
            false => Err(too_many()),
        }
    }
}

fn too_many() -> String {
    format!("{BLOCK_NETS_MAX} networks are blocked by hand already, which is the bound: unblock one")
}

fn drop_client(
    offenders: &mut Offenders,
    shared: &Shared,
    kernel: Option<&Kernel>,
    config: &Config,
    client: Origin,
    tell: &dyn Fn(IpNet, Duration),
) {
    let drop = &config.kernel.drop;
    let net = prefixes(drop).net(client.ip);
    let ip = client.ip;
    let exempt = drop
        .exempt
        .iter()
        .any(|exempt| exempt.contains(&net) || net.contains(exempt));
    // Without the kernel a direct client is served as before: nothing would be saved by refusing it elsewhere.
    if exempt || (client.via == Via::Direct && kernel.is_none()) {
        tracing::debug!(client = %ip, "client is not blocked: exempt, or the kernel plane is off");
        return;
    }
    let now_ns = clock::monotonic_ns();
    let hold = offenders.offend(net, client.via, &growth(drop), now_ns);
    if let (Via::Direct, Some(kernel)) = (client.via, kernel) {
        match kernel.block_client(ip, hold) {
            Ok(()) => tell(net, hold),
            Err(BlockError::Exempt(reason)) => {
                return tracing::debug!(client = %ip, reason, "client is not blocked");
            }
            // What user space can do it still does.
            Err(error) => tracing::warn!(client = %ip, %error, "the kernel does not block a client"),
        }
    }
    let until_ns = now_ns.saturating_add(hold.as_nanos() as u64);
    shared.blocks.block(net, client.via, until_ns);
    let behind_proxy = client.via == Via::Proxied;
    tracing::info!(client = %ip, %net, behind_proxy, seconds = hold.as_secs(), "client is refused again and again: blocked");
}

fn prefixes(drop: &Drop) -> Prefixes {
    Prefixes {
        v4: drop.prefix_v4,
        v6: drop.prefix_v6,
    }
}

fn growth(drop: &Drop) -> Growth {
    Growth {
        first: drop.hold.0,
        factor: drop.escalation.factor,
        max: drop.escalation.max.0,
        forgive: drop.escalation.forgive.0,
        forget: drop.escalation.forget.0,
    }
}

/// What the kernel never drops: what the configuration exempts, and all proxies that some listener trusts.
pub fn exempt(config: &Config) -> Vec<IpNet> {
    let proxies = config
        .listeners
        .iter()
        .flat_map(|listener| &listener.trusted_proxies);
    config.kernel.drop.exempt.iter().chain(proxies).copied().collect()
}
