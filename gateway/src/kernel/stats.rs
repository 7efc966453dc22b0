//! What the programs have counted, as plain figures.

use std::{net::IpAddr, time::Duration};

use gateway_common::{Client, ClientKey, LIFE_BUCKETS, Port, Totals};
use ipnet::IpNet;

/// A client or network that the kernel refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocked {
    /// A client as `kernel.drop.prefix_v4` and `prefix_v6` cut it, or a network blocked by hand.
    pub net: IpNet,
    /// Time until the block ends.
    pub remaining: Duration,
    /// Connection attempts refused since it began.
    pub dropped: u64,
    /// Attempts that would have been refused, were the mode not observe.
    pub would_drop: u64,
}

/// Totals since the pinned maps were made, or since [`super::Kernel::load`] where they are not pinned. All only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Connection attempts of blocked clients refused.
    pub dropped: u64,
    /// Attempts let in though blocked or over a bound, because the mode is observe.
    pub would_drop: u64,
    /// Attempts refused for `kernel.connections.per_client_rate`.
    pub over_rate: u64,
    /// Attempts refused for `kernel.connections.per_client_open`.
    pub over_open: u64,
    /// Attempts refused for `kernel.connections.half_open`.
    pub over_half_open: u64,
    /// SYNs of blocked clients dropped by XDP.
    pub xdp_dropped: u64,
    /// SYNs that XDP would have dropped, were the mode not observe.
    pub xdp_would_drop: u64,
    /// Attempts steered to a core, whichever.
    pub steered: u64,
    /// Of those, the ones moved off an overloaded core.
    pub steered_away: u64,
    /// Attempts that the kernel's hash placed.
    pub fallback: u64,
    /// Packets on a listener that were no attempts (SYN cookies, strays).
    pub stray: u64,
    /// Packets whose client could not be read.
    pub unreadable: u64,
    /// Client connections established.
    pub opened: u64,
    /// Of those, ended.
    pub closed: u64,
    /// Payload bytes from clients; open connections' up to a second late.
    pub bytes_in: u64,
    /// Payload bytes to clients, acknowledged; as `bytes_in`.
    pub bytes_out: u64,
    /// Segments sent again; as `bytes_in`.
    pub retransmits: u64,
    /// Connections that no client's entry counts.
    pub untracked: u64,
    /// Ended connections by their life: bucket n has those shorter than 2^n ms that are in no bucket below; the last one
    /// has no upper bound.
    pub life: [u64; LIFE_BUCKETS],
    /// Sum of the lives of ended connections, milliseconds.
    pub life_ms: u64,
}

impl Stats {
    /// Adds one CPU's counters.
    pub(super) fn add(&mut self, cpu: &Totals) {
        self.dropped += cpu.dropped;
        self.would_drop += cpu.would_drop;
        self.over_rate += cpu.over_rate;
        self.over_open += cpu.over_open;
        self.over_half_open += cpu.over_half_open;
        self.xdp_dropped += cpu.xdp_dropped;
        self.xdp_would_drop += cpu.xdp_would_drop;
        self.steered += cpu.steered_own + cpu.steered_away;
        self.steered_away += cpu.steered_away;
        self.fallback += cpu.fallback;
        self.stray += cpu.stray;
        self.unreadable += cpu.unreadable;
        self.untracked += cpu.untracked;
    }

    /// Adds what was counted of connections, whatever their port.
    pub(super) fn add_ports(&mut self, ports: &Port) {
        self.opened += ports.opened;
        self.closed += ports.closed;
        self.bytes_in += ports.bytes_in;
        self.bytes_out += ports.bytes_out;
        self.retransmits += ports.retransmits;
        self.life_ms += ports.life_ms;
        for (sum, count) in self.life.iter_mut().zip(ports.life) {
            *sum += count;
        }
    }
}

/// One client's connections, since it was first seen or last fell out of the bounded map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientStats {
    /// The client's address, the first of its prefix.
    pub client: IpAddr,
    pub opened: u64,
    pub closed: u64,
    /// Attempts refused, for whatever reason.
    pub refused: u64,
    /// Payload bytes received; open connections' up to a second late.
    pub bytes_in: u64,
    /// Payload bytes sent and acknowledged; as `bytes_in`.
    pub bytes_out: u64,
    /// Segments sent again; as `bytes_in`.
    pub retransmits: u64,
    /// Smoothed round trip time as last measured.
    pub srtt: Duration,
    /// Time since a connection of it last opened or closed.
    pub idle: Duration,
    /// Ended connections by their life, as [`Stats::life`].
    pub life: [u32; LIFE_BUCKETS],
}

impl ClientStats {
    pub(super) fn new(key: &ClientKey, client: &Client, now_ns: u64) -> ClientStats {
        ClientStats {
            client: key.address(),
            opened: client.opened,
            closed: client.closed,
            refused: client.refused,
            bytes_in: client.bytes_in,
            bytes_out: client.bytes_out,
            retransmits: client.retransmits,
            srtt: Duration::from_micros(client.srtt_us),
            idle: Duration::from_nanos(now_ns.saturating_sub(client.seen_ns)),
            life: client.life,
        }
    }

    /// Connections open now.
    pub fn open(&self) -> u64 {
        self.opened.saturating_sub(self.closed)
    }
}

/// The connections of the listeners on one port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortStats {
    pub port: u16,
    pub opened: u64,
    pub closed: u64,
    /// Attempts refused, for whatever reason.
    pub refused: u64,
    /// Payload bytes received; open connections' up to a second late.
    pub bytes_in: u64,
    /// Payload bytes sent and acknowledged; as `bytes_in`.
    pub bytes_out: u64,
    /// Segments sent again; as `bytes_in`.
    pub retransmits: u64,
    /// Ended connections by their life, as [`Stats::life`].
    pub life: [u64; LIFE_BUCKETS],
}

impl PortStats {
    pub(super) fn new(port: u32, counts: &Port) -> PortStats {
        PortStats {
            port: port as u16,
            opened: counts.opened,
            closed: counts.closed,
            refused: counts.refused,
            bytes_in: counts.bytes_in,
            bytes_out: counts.bytes_out,
            retransmits: counts.retransmits,
            life: counts.life,
        }
    }

    /// Connections open now.
    pub fn open(&self) -> u64 {
        self.opened.saturating_sub(self.closed)
    }
}
