//! The gateway as a host of the cluster: what it tells the others and what it hears from them.

use std::time::Duration;

use ipnet::IpNet;

use super::Node;
use crate::{control::plane::State, kernel::BlockError};

impl State {
    /// Tells the other hosts that a client was blocked here; `None`: that the block was lifted.
    pub(in crate::control) fn tell_block(&self, client: IpNet, hold: Option<Duration>) {
        if let Some(cluster) = &self.cluster {
            cluster.tell_block(client, hold);
        }
    }
}

impl Node for State {
    fn block_from_peer(&self, client: IpNet, hold: Duration) {
        let Ok(kernel) = self.kernel() else { return };
        match kernel.block(client, hold) {
            Ok(()) => {
                // Only then: without the kernel's block a client is served on (control/drops.rs).
                if kernel.net_of(client.addr()) == client {
                    self.drops.block_client(&self.shared, client, hold);
                } else if let Err(error) = self.drops.block_net(&self.shared, client, hold) {
                    tracing::warn!(%client, error, "open connections of a network that another host blocked go on");
                }
                tracing::info!(%client, seconds = hold.as_secs(), "another host blocked a client: blocked here")
            }
            // Each host has its own exempt networks.
            Err(BlockError::Exempt(reason)) => {
                tracing::debug!(%client, reason, "another host's block is not taken over")
            }
            Err(error) => tracing::warn!(%client, %error, "cannot take over another host's block"),
        }
    }

    fn unblock_from_peer(&self, client: IpNet) {
        self.drops.lift(&self.shared, client);
        let Ok(kernel) = self.kernel() else { return };
        if let Err(error) = kernel.unblock(client) {
            tracing::warn!(%client, %error, "cannot lift a block that another host lifted");
        }
    }
}
