//! The blocks in the kernel: single clients in a bounded LRU hash, other networks in a trie; and who is exempt.

use std::{collections::HashMap, net::IpAddr, time::Duration};

use aya::maps::{HashMap as MapHash, LpmTrie, MapData, MapError, lpm_trie::Key};
use gateway_common::{BLOCKS_MAX, Block, ClientKey, EXEMPT_MAX, NETS_MAX, Prefixes};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{
    clock,
    ends::Ends,
    policy::{Policy, canonical},
    stats::Blocked,
};

/// Why a client was not blocked.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The policy protects it, or it is none that can be blocked; the text says why.
    #[error("{0}")]
    Exempt(String),
    /// The trie of networks is full.
    #[error(
        "{NETS_MAX} networks are blocked already, which is the bound; unblock one, or block single clients"
    )]
    Full,
    /// The kernel refused the map's update.
    #[error("cannot write the block: {0}")]
    Map(#[from] MapError),
}

/// The maps, and what this side must remember of them.
pub struct Blocks {
    clients: MapHash<MapData, ClientKey, Block>,
    nets: LpmTrie<MapData, ClientKey, Block>,
    exempt: LpmTrie<MapData, ClientKey, u32>,
    /// The networks in the trie with the end of their blocks, so that their end is seen without walking it.
    until_ns: HashMap<IpNet, u64>,
    /// When the blocks of clients end.
    ends: Ends,
    policy: Policy,
}

impl Blocks {
    /// Takes over what the maps hold.
    pub fn new(
        clients: MapHash<MapData, ClientKey, Block>,
        nets: LpmTrie<MapData, ClientKey, Block>,
        exempt: LpmTrie<MapData, ClientKey, u32>,
        policy: Policy,
    ) -> Result<Blocks, MapError> {
        let entries = nets.iter().take(NETS_MAX as usize).filter_map(Result::ok);
        let until_ns = entries.filter_map(|(key, block)| Some((net_of(&key)?, block.until_ns)));
        // Expired ones too: the next sweep forgets them.
        let ends = clients.iter().take(BLOCKS_MAX as usize).filter_map(Result::ok);
        let mut blocks = Blocks {
            until_ns: until_ns.collect(),
            ends: Ends::new(ends.map(|(_, block)| block.until_ns)),
            clients,
            nets,
            exempt,
            policy: Policy::new(&[], Prefixes::DEFAULT),
        };
        blocks.exempt(policy)?;
        Ok(blocks)
    }

    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Whether the program must ask the trie.
    pub fn has_nets(&self) -> bool {
        !self.until_ns.is_empty()
    }

    /// Whether the program must ask the hash of clients.
    pub fn has_clients(&self) -> bool {
        self.ends.any_after(clock::now_ns())
    }

    /// Replaces the exempt networks, and lifts the blocks that they now forbid.
    pub fn exempt(&mut self, policy: Policy) -> Result<(), MapError> {
        // New ones first: at no moment is one missing that was and is to be there.
        for net in policy.exempt().iter().take(EXEMPT_MAX as usize) {
            self.exempt.insert(&key_of(net), 0, 0)?;
        }
        if policy.exempt().len() > EXEMPT_MAX as usize {
            tracing::warn!("more than {EXEMPT_MAX} exempt networks: the rest are not known to the kernel");
        }
        for net in self.policy.exempt() {
            if !policy.exempt().contains(net) {
                let _ = self.exempt.remove(&key_of(net));
            }
        }
        self.policy = policy;
        for blocked in self.blocked() {
            if self.policy.refusal(blocked.net).is_some() {
                let _ = self.unblock(blocked.net);
            } else if self.policy.is_client(&blocked.net) {
                self.mark_exempt(blocked.net)?;
            }
        }
        Ok(())
    }

    /// Says of a client's block whether some of its addresses are exempt now.
    fn mark_exempt(&mut self, client: IpNet) -> Result<(), MapError> {
        let exempt_within = u64::from(self.policy.exempts_within(&client));
        match self.find(client)? {
            Some(block) if block.exempt_within != exempt_within => {
                let block = Block {
                    exempt_within,
                    ..block
                };
                self.clients.insert(ClientKey::whole(client.addr()), block, 0)
            }
            _ => Ok(()),
        }
    }

    pub fn block(&mut self, net: IpNet, hold: Duration) -> Result<(), BlockError> {
        let net = canonical(net);
        if let Some(reason) = self.policy.refusal(net) {
            return Err(BlockError::Exempt(reason));
        }
        let now_ns = clock::now_ns();
        let until_ns = now_ns.saturating_add(u64::try_from(hold.as_nanos()).unwrap_or(u64::MAX));
        // What the program counts between this read and the write is lost: a few of many, and only in a counter for people.
        let before = self.find(net)?.filter(|block| block.until_ns > now_ns);
        let block = Block {
            until_ns,
            exempt_within: u64::from(self.policy.exempts_within(&net)),
            ..before.unwrap_or_default()
        };
        if self.policy.is_client(&net) {
            self.clients.insert(ClientKey::whole(net.addr()), block, 0)?;
            if let Some(before) = before {
                self.ends.remove(before.until_ns);
            }
            self.ends.add(until_ns);
            return Ok(());
        }
        if self.until_ns.len() >= NETS_MAX as usize && !self.until_ns.contains_key(&net) {
            return Err(BlockError::Full);
        }
        self.nets.insert(&key_of(&net), block, 0)?;
        self.until_ns.insert(net, until_ns);
        Ok(())
    }

    /// Lifts a block of exactly this network. False: there was none.
    pub fn unblock(&mut self, net: IpNet) -> Result<bool, BlockError> {
        let net = canonical(net);
        let Some(block) = self.find(net)? else {
            return Ok(false);
        };
        let removed = match self.policy.is_client(&net) {
            true => self.clients.remove(&ClientKey::whole(net.addr())),
            false => {
                self.until_ns.remove(&net);
                self.nets.remove(&key_of(&net))
            }
        };
        match removed {
            // The kernel may have evicted the entry since.
            Err(error) if !is_absent(&error) => return Err(error.into()),
            _ => {}
        }
        if self.policy.is_client(&net) {
            self.ends.remove(block.until_ns);
        }
        Ok(block.until_ns > clock::now_ns())
    }

    fn find(&self, net: IpNet) -> Result<Option<Block>, MapError> {
        let found = match self.policy.is_client(&net) {
            true => self.clients.get(&ClientKey::whole(net.addr()), 0),
            // The trie would answer with a wider one.
            false if !self.until_ns.contains_key(&net) => return Ok(None),
            false => self.nets.get(&key_of(&net), 0),
        };
        match found {
            Ok(block) => Ok(Some(block)),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Takes networks out of the trie whose block has ended: an expired one hides a wider one that still holds.
    pub fn sweep(&mut self) {
        let now_ns = clock::now_ns();
        self.ends.sweep(now_ns);
        if self.until_ns.is_empty() {
            return;
        }
        let nets = &mut self.nets;
        self.until_ns.retain(|net, until_ns| {
            let holds = *until_ns > now_ns;
            if !holds {
                let _ = nets.remove(&key_of(net));
            }
            holds
        });
    }

    /// What is blocked now, the one with the most refusals first.
    pub fn blocked(&self) -> Vec<Blocked> {
        let now_ns = clock::now_ns();
        // Bounded, because a walk over a map that changes underneath may start over (`bpf_map_get_next_key`).
        let clients = self.clients.iter().take(BLOCKS_MAX as usize);
        let clients = clients
            .filter_map(Result::ok)
            .map(|(key, block)| (self.policy.net_of(key.address()), block));
        let nets = self.until_ns.keys();
        let nets = nets.filter_map(|net| Some((*net, self.nets.get(&key_of(net), 0).ok()?)));
        let mut blocked: Vec<Blocked> = clients
            .chain(nets)
            .filter(|(_, block)| block.until_ns > now_ns)
            .map(|(net, block)| Blocked {
                net,
                remaining: Duration::from_nanos(block.until_ns - now_ns),
                dropped: block.dropped,
                would_drop: block.would_drop,
            })
            .collect();
        blocked.sort_unstable_by_key(|entry| {
            (std::cmp::Reverse(entry.dropped.max(entry.would_drop)), entry.net)
        });
        blocked.dedup_by_key(|entry| entry.net);
        blocked
    }
}

/// Whether a key was not there.
pub fn is_absent(error: &MapError) -> bool {
    match error {
        MapError::KeyNotFound => true,
        MapError::SyscallError(error) => error.io_error.raw_os_error() == Some(libc::ENOENT),
        _ => false,
    }
}

/// The trie's key: the bits of the v4-mapped form.
fn key_of(net: &IpNet) -> Key<ClientKey> {
    let bits = match net {
        IpNet::V4(v4) => 96 + u32::from(v4.prefix_len()),
        IpNet::V6(v6) => u32::from(v6.prefix_len()),
    };
    Key::new(bits, ClientKey::whole(net.addr()))
}

fn net_of(key: &Key<ClientKey>) -> Option<IpNet> {
    let bits = u8::try_from(key.prefix_len()).ok()?;
    match key.data().address() {
        IpAddr::V4(v4) => Ipv4Net::new(v4, bits.checked_sub(96)?).ok().map(IpNet::V4),
        IpAddr::V6(v6) => Ipv6Net::new(v6, bits).ok().map(IpNet::V6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_the_trie_say_which_network() {
        for text in ["10.0.0.0/8", "192.0.2.7/32", "2001:db8::/32", "2001:db8::1/128"] {
            let net: IpNet = text.parse().expect("a network");
            assert_eq!(net_of(&key_of(&net)), Some(net));
        }
    }
}
