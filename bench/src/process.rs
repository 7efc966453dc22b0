//! What a process costs, read from `/proc` (proc(5)): CPU time, memory, context switches.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Unit of the CPU times in `/proc/PID/stat`: `USER_HZ`, 100 on every architecture that this program serves.
const TICKS_PER_S: f64 = 100.0;

/// A process at one moment. All counts are since its start and of all its threads.
#[derive(Clone, Copy, Debug, Default)]
pub struct Snapshot {
    /// CPU time by the scheduler's account in nanoseconds; threads that have ended are missing.
    pub run_ns: u64,
    /// CPU time in user mode in seconds, in steps of 10 ms.
    pub user_s: f64,
    /// CPU time in the kernel in seconds, in steps of 10 ms.
    pub system_s: f64,
    /// Resident memory in bytes.
    pub resident_bytes: u64,
    pub voluntary_switches: u64,
    pub involuntary_switches: u64,
}

impl Snapshot {
    /// Reads process `pid`; `None` where it is gone or hidden.
    pub fn read(pid: u32) -> Option<Self> {
        let root = Path::new("/proc").join(pid.to_string());
        let stat = fs::read_to_string(root.join("stat")).ok()?;
        // The name in the second field may hold blanks and parentheses: fields are counted from its end.
        let fields: Vec<&str> = stat[stat.rfind(')')? + 1..].split_whitespace().collect();
        let ticks = |index: usize| fields.get(index)?.parse::<f64>().ok();
        let mut snapshot = Self {
            user_s: ticks(11)? / TICKS_PER_S,
            system_s: ticks(12)? / TICKS_PER_S,
            resident_bytes: status_number(&fs::read_to_string(root.join("status")).ok()?, "VmRSS:") * 1024,
            ..Self::default()
        };
        for task in fs::read_dir(root.join("task")).ok()?.flatten() {
            snapshot.add_thread(&task.path());
        }
        Some(snapshot)
    }

    /// Adds what is told by thread; a thread that ends meanwhile adds nothing.
    fn add_thread(&mut self, task: &Path) {
        if let Ok(schedstat) = fs::read_to_string(task.join("schedstat")) {
            self.run_ns += schedstat
                .split(' ')
                .next()
                .and_then(|first| first.parse().ok())
                .unwrap_or(0);
        }
        if let Ok(status) = fs::read_to_string(task.join("status")) {
            self.voluntary_switches += status_number(&status, "voluntary_ctxt_switches:");
            self.involuntary_switches += status_number(&status, "nonvoluntary_ctxt_switches:");
        }
    }
}

/// Process `pid` and all that came from it.
pub fn family(pid: u32) -> Vec<u32> {
    let mut children: Vec<(u32, u32)> = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(child) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        if let Ok(status) = fs::read_to_string(entry.path().join("status")) {
            children.push((status_number(&status, "PPid:") as u32, child));
        }
    }
    let mut family = vec![pid];
    let mut at = 0;
    while let Some(parent) = family.get(at).copied() {
        family.extend(
            children
                .iter()
                .filter(|(of, _)| *of == parent)
                .map(|(_, child)| *child),
        );
        at += 1;
    }
    family
}

fn status_number(status: &str, key: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}

/// What a process cost between two moments.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    pub pid: u32,
    /// CPU time in seconds: the scheduler's account where there is one, else the sum of the next two.
    pub cpu_s: f64,
    pub user_s: f64,
    pub system_s: f64,
    /// Share of one core while it was measured.
    pub cores: f64,
    pub resident_before_bytes: u64,
    pub resident_after_bytes: u64,
    pub voluntary_switches: u64,
    pub involuntary_switches: u64,
    pub cpu_us_per_request: Option<f64>,
    pub cpu_us_per_event: Option<f64>,
    /// Context switches of both sorts.
    pub switches_per_request: Option<f64>,
    pub switches_per_event: Option<f64>,
    /// Growth of the resident memory per open stream, where streams were held open.
    pub bytes_per_open_stream: Option<f64>,
}

impl Cost {
    /// The difference of two snapshots `elapsed_s` seconds apart.
    pub fn between(pid: u32, before: &Snapshot, after: &Snapshot, elapsed_s: f64) -> Self {
        let (user_s, system_s) = (after.user_s - before.user_s, after.system_s - before.system_s);
        let run_s = after.run_ns.saturating_sub(before.run_ns) as f64 / 1e9;
        let cpu_s = if after.run_ns > 0 {
            run_s
        } else {
            user_s + system_s
        };
        Self {
            pid,
            cpu_s,
            user_s,
            system_s,
            cores: if elapsed_s > 0.0 { cpu_s / elapsed_s } else { 0.0 },
            resident_before_bytes: before.resident_bytes,
            resident_after_bytes: after.resident_bytes,
            voluntary_switches: after.voluntary_switches.saturating_sub(before.voluntary_switches),
            involuntary_switches: after
                .involuntary_switches
                .saturating_sub(before.involuntary_switches),
            ..Self::default()
        }
    }

    /// Shares the CPU time and the context switches out.
    pub fn share(&mut self, requests: u64, events: u64) {
        let per = |all: f64, count: u64| (count > 0).then(|| all / count as f64);
        let (cpu_us, switches) = (
            self.cpu_s * 1e6,
            self.voluntary_switches + self.involuntary_switches,
        );
        self.cpu_us_per_request = per(cpu_us, requests);
        self.cpu_us_per_event = per(cpu_us, events);
        self.switches_per_request = per(switches as f64, requests);
        self.switches_per_event = per(switches as f64, events);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_a_cost() {
        let pid = std::process::id();
        let before = Snapshot::read(pid).expect("this process runs");
        let mut sum = 0_u64;
        for number in 0..20_000_000_u64 {
            sum = std::hint::black_box(sum.wrapping_add(number));
        }
        let after = Snapshot::read(pid).expect("this process runs");
        let mut cost = Cost::between(pid, &before, &after, 1.0);
        cost.share(10, 0);
        assert!(cost.cpu_s > 0.0, "{cost:?} {sum}");
        assert!(cost.resident_after_bytes > 100_000);
        assert_eq!((cost.cpu_us_per_event, cost.switches_per_event), (None, None));
        assert!(cost.switches_per_request.is_some());
        assert!(Snapshot::read(u32::MAX).is_none());
    }
}
