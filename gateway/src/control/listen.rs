//! The listening sockets: one for each core and address, all of an address in one `SO_REUSEPORT` group.

use std::{
    net::{SocketAddr, TcpListener},
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
};

use anyhow::Context;
use arc_swap::ArcSwap;
use rustls::ServerConfig;

use crate::{
    config::Config,
    core::Listening,
    net::{tcp, tls},
    serve::trust::Trust,
};

/// A listener's TLS settings, swapped by a reload.
pub type SharedTls = Option<Arc<ArcSwap<ServerConfig>>>;

/// The proxies before a listener, swapped by a reload.
pub type SharedTrust = Arc<ArcSwap<Trust>>;

/// The sockets of one listener, in the order of the cores.
pub struct Group {
    /// The address, with the port that the kernel chose where the configuration says 0.
    pub address: SocketAddr,
    pub tls: SharedTls,
    pub trust: SharedTrust,
    sockets: Vec<TcpListener>,
}

impl Group {
    /// The sockets, for the kernel plane.
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.sockets.iter().map(AsFd::as_fd).collect()
    }
}

/// Opens all listeners of the configuration.
pub fn open(config: &Config, cores: usize) -> anyhow::Result<Vec<Group>> {
    let mut groups = Vec::with_capacity(config.listeners.len());
    for listener in &config.listeners {
        let wanted = listener.address;
        let tls = match &listener.tls {
            Some(settings) => {
                let settings = tls::server_config(settings).with_context(|| format!("listener {wanted}"))?;
                Some(Arc::new(ArcSwap::new(settings)))
            }
            None => None,
        };
        let cannot = || format!("cannot listen on {wanted}");
        tcp::ensure_free(wanted).with_context(cannot)?;
        let first = tcp::listen(wanted).with_context(cannot)?;
        let address = first.local_addr().with_context(cannot)?;
        let mut sockets = vec![first];
        for _ in 1..cores {
            sockets.push(tcp::listen(address).with_context(cannot)?);
        }
        groups.push(Group {
            address,
            tls,
            trust: Arc::new(ArcSwap::from_pointee(Trust::new(listener))),
            sockets,
        });
    }
    Ok(groups)
}

/// Hands each core its socket of every group.
pub fn by_core(groups: Vec<Group>, cores: usize) -> Vec<Vec<Listening>> {
    let mut of_cores: Vec<Vec<Listening>> = (0..cores).map(|_| Vec::new()).collect();
    for group in groups {
        for (core, socket) in of_cores.iter_mut().zip(group.sockets) {
            core.push(Listening {
                socket,
                tls: group.tls.clone(),
                trust: group.trust.clone(),
            });
        }
    }
    of_cores
}
