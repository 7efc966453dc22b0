//! The ports whose connections are counted, and their counters.

use std::collections::BTreeMap;

use aya::maps::{HashMap, MapData, MapError, PerCpuArray, PerCpuValues};
use gateway_common::{LIFE_BUCKETS, PORTS_MAX, Port};

/// The slot with the sums of ports that are no longer listened on, so that totals never go back.
const RETIRED: u32 = 0;

/// The maps, and which slot a port has.
pub struct Ports {
    index: HashMap<MapData, u32, u32>,
    counts: PerCpuArray<MapData, Port>,
    slots: BTreeMap<u32, u32>,
}

impl Ports {
    /// Takes over what the maps hold.
    pub fn new(
        index: HashMap<MapData, u32, u32>,
        counts: PerCpuArray<MapData, Port>,
    ) -> Result<Ports, MapError> {
        let entries = index.iter().take(PORTS_MAX as usize);
        let slots = entries.collect::<Result<BTreeMap<u32, u32>, MapError>>()?;
        Ok(Ports { index, counts, slots })
    }

    /// Counts connections of one more port from now on; one that is counted already goes on. Returns the slot of its counters.
    ///
    /// # Errors
    /// All slots are taken, or the kernel refused.
    pub fn add(&mut self, port: u16) -> Result<u32, MapError> {
        let port = u32::from(port);
        if let Some(slot) = self.slots.get(&port) {
            return Ok(*slot);
        }
        let free = (RETIRED + 1..=PORTS_MAX).find(|slot| self.slots.values().all(|taken| taken != slot));
        // What the kernel says of a map that is full.
        let full = || MapError::OutOfBounds {
            index: PORTS_MAX + 1,
            max_entries: PORTS_MAX,
        };
        let slot = free.ok_or_else(full)?;
        self.counts.set(slot, self.values(&Port::default())?, 0)?;
        self.index.insert(port, slot, 0)?;
        self.slots.insert(port, slot);
        Ok(slot)
    }

    /// Forgets ports that are not `wanted`, and books connections as ended that were open in an earlier process. Nothing
    /// may be counted meanwhile. Returns how many those were.
    pub fn take_over(&mut self, wanted: &[u16]) -> Result<u64, MapError> {
        let mut ended = 0;
        for (port, slot) in self.slots.clone() {
            let mut sum = self.read(slot)?;
            let open = sum.opened.saturating_sub(sum.closed);
            sum.closed += open;
            ended += open;
            if wanted.iter().any(|wanted| u32::from(*wanted) == port) {
                if open != 0 {
                    self.counts.set(slot, self.values(&sum)?, 0)?;
                }
                continue;
            }
            let mut retired = self.read(RETIRED)?;
            add(&mut retired, &sum);
            // In this order: a kill in between must not count it twice.
            self.index.remove(&port)?;
            self.slots.remove(&port);
            self.counts.set(RETIRED, self.values(&retired)?, 0)?;
        }
        Ok(ended)
    }

    /// Each port's counters, ascending; at most [`PORTS_MAX`].
    pub fn list(&self) -> impl Iterator<Item = (u32, Port)> {
        let read = |(port, slot): (&u32, &u32)| Some((*port, self.read(*slot).ok()?));
        self.slots.iter().filter_map(read)
    }

    /// The sum of all that was ever counted.
    pub fn sum(&self) -> Port {
        let mut sum = self.read(RETIRED).unwrap_or_default();
        for (_, counts) in self.list() {
            add(&mut sum, &counts);
        }
        sum
    }

    fn read(&self, slot: u32) -> Result<Port, MapError> {
        let mut sum = Port::default();
        for cpu in self.counts.get(&slot, 0)?.iter() {
            add(&mut sum, cpu);
        }
        Ok(sum)
    }

    /// A slot's values that sum up to this.
    fn values(&self, counts: &Port) -> Result<PerCpuValues<Port>, MapError> {
        let cpus = self.counts.get(&RETIRED, 0)?.len();
        let mut values = vec![Port::default(); cpus];
        if let Some(first) = values.first_mut() {
            *first = *counts;
        }
        PerCpuValues::try_from(values).map_err(MapError::IoError)
    }
}

fn add(sum: &mut Port, counts: &Port) {
    sum.opened += counts.opened;
    sum.closed += counts.closed;
    sum.refused += counts.refused;
    sum.bytes_in += counts.bytes_in;
    sum.bytes_out += counts.bytes_out;
    sum.retransmits += counts.retransmits;
    sum.life_ms += counts.life_ms;
    for bucket in 0..LIFE_BUCKETS {
        sum.life[bucket] += counts.life[bucket];
    }
}
