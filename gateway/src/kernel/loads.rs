//! How many streams the cores have open, as the steering sees it: a map in shared memory.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    ptr::{self, NonNull},
    sync::atomic::{AtomicU64, Ordering},
};

use aya::maps::MapData;
use gateway_common::{CORES_MAX, LOAD_LEAST, load_slot};

/// The slots of the map: the number of the least loaded core, and a core's each.
const SLOTS: usize = CORES_MAX as usize + 1;

/// Of what the program has steered to a core, the share that is still counted after a tick: a half. What became a stream by
/// then counts twice for a moment; kept longer, that would weigh more than the connections whose request is on its way.
const PENDING_KEPT: (u64, u64) = (1, 2);

/// The map `LOADS`, mapped into memory: publishing costs no system call.
pub struct Loads {
    slots: NonNull<AtomicU64>,
    bytes: usize,
    cores: Vec<Core>,
}

/// A core's load as last published.
#[derive(Clone, Copy, Default)]
struct Core {
    published: u64,
    /// Of that, connections steered and not seen as streams.
    pending: u64,
}

// SAFETY: the mapping is shared memory of atomics, and lives until the drop.
unsafe impl Send for Loads {}
// SAFETY: as above.
unsafe impl Sync for Loads {}

impl Loads {
    pub fn new(map: &MapData, cores: usize) -> io::Result<Loads> {
        // SAFETY: sysconf has no preconditions.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
        let bytes = (SLOTS * size_of::<AtomicU64>()).next_multiple_of(page);
        let (access, fd) = (libc::PROT_READ | libc::PROT_WRITE, map.fd().as_fd().as_raw_fd());
        // SAFETY: a new mapping of a map made with BPF_F_MMAPABLE, whose values stand 8 bytes apart (array_map_mmap,
        // kernel/bpf/arraymap.c); the kernel checks the length.
        let slots = unsafe { libc::mmap(ptr::null_mut(), bytes, access, libc::MAP_SHARED, fd, 0) };
        if slots == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let slots = NonNull::new(slots.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let cores = vec![Core::default(); cores];
        Ok(Loads { slots, bytes, cores })
    }

    fn slot(&self, slot: u32) -> &AtomicU64 {
        let slot = slot as usize;
        debug_assert!(slot < SLOTS);
        // SAFETY: within the mapping; page aligned, so aligned for the atomic; the program too accesses it by word.
        unsafe { self.slots.add(slot.min(SLOTS - 1)).as_ref() }
    }

    /// Publishes open streams by core; a core beyond the ones there are is ignored. What has not changed is not written, so
    /// that its cache line stays with the CPUs that read it.
    pub fn publish(&mut self, open: impl IntoIterator<Item = (usize, u32)>) {
        for (number, open) in open {
            let Some(mut core) = self.cores.get(number).copied() else {
                continue;
            };
            let slot = self.slot(load_slot(number as u32));
            let now = slot.load(Ordering::Relaxed);
            // What the program has added since the last time.
            let steered = now.saturating_sub(core.published);
            core.pending = (core.pending + steered) * PENDING_KEPT.0 / PENDING_KEPT.1;
            core.published = u64::from(open) + core.pending;
            if core.published != now {
                // A connection steered in between is forgotten; the next tick has it as a stream.
                slot.store(core.published, Ordering::Relaxed);
            }
            self.cores[number] = core;
        }
        let least = (0..self.cores.len())
            .min_by_key(|core| self.cores[*core].published)
            .unwrap_or(0) as u64;
        let slot = self.slot(LOAD_LEAST);
        if slot.load(Ordering::Relaxed) != least {
            slot.store(least, Ordering::Relaxed);
        }
    }
}

impl Drop for Loads {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, with its length; nothing refers to it any more.
        unsafe { libc::munmap(self.slots.as_ptr().cast(), self.bytes) };
    }
}
