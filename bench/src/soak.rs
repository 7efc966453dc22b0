//! A long run that looks for what grows: memory and descriptors of the target.

use std::fmt;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::process::Snapshot;

/// Samples that are kept.
const SAMPLES_MAX: usize = 100_000;
/// Growth over the second half that counts as a leak: more than this, and more than this share of what there was.
const GROWTH_BYTES: f64 = 4.0 * 1024.0 * 1024.0;
const GROWTH_SHARE: f64 = 0.05;
/// Descriptors that may be open after the load beyond what was open before it: pools of kept connections.
const DESCRIPTORS_SPARE: u64 = 64;

/// The processes at one time, added up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Sample {
    pub at_s: f64,
    pub resident_bytes: u64,
    pub descriptors: u64,
    pub threads: u64,
}

impl Sample {
    fn read(pids: &[u32], at_s: f64) -> Self {
        let mut sample = Self {
            at_s,
            ..Self::default()
        };
        for pid in pids {
            sample.resident_bytes += Snapshot::read(*pid).map_or(0, |snapshot| snapshot.resident_bytes);
            sample.descriptors += entries(&format!("/proc/{pid}/fd"));
            sample.threads += entries(&format!("/proc/{pid}/task"));
        }
        sample
    }
}

fn entries(path: &str) -> u64 {
    fs::read_dir(path).map_or(0, |entries| entries.count() as u64)
}

/// Takes samples until `stop` is set.
pub fn watch(pids: &[u32], every: Duration, stop: &AtomicBool) -> Vec<Sample> {
    const LOOK: Duration = Duration::from_millis(20);
    let start = Instant::now();
    let mut samples = vec![Sample::read(pids, 0.0)];
    let mut next = every;
    while !stop.load(Relaxed) && samples.len() < SAMPLES_MAX {
        std::thread::sleep(LOOK.min(every));
        let since = start.elapsed();
        if since >= next {
            samples.push(Sample::read(pids, since.as_secs_f64()));
            next += every;
        }
    }
    samples
}

/// What a soak found out.
#[derive(Clone, Debug, Serialize)]
pub struct Soak {
    /// Before the load, at the highest, and after the load when connections had time to close.
    pub before: Sample,
    pub peak_bytes: u64,
    pub peak_descriptors: u64,
    pub after: Sample,
    /// Slope of the resident memory in the second half, in bytes per hour.
    pub growth_bytes_per_hour: f64,
    pub memory_grows: bool,
    pub descriptors_leak: bool,
    pub samples: Vec<Sample>,
}

impl Soak {
    /// Judges samples taken under load, and one taken after it. The first half is not judged: caches and pools fill.
    pub fn judge(samples: Vec<Sample>, after: Sample) -> Self {
        let before = samples.first().copied().unwrap_or_default();
        let half = &samples[samples.len() / 2..];
        let slope = slope(half);
        let first = half.first().copied().unwrap_or_default();
        let seconds = half.last().copied().unwrap_or_default().at_s - first.at_s;
        let grown = slope * seconds;
        let most = |of: fn(&Sample) -> u64| samples.iter().map(of).max().unwrap_or(0);
        Self {
            before,
            peak_bytes: most(|sample| sample.resident_bytes),
            peak_descriptors: most(|sample| sample.descriptors),
            after,
            growth_bytes_per_hour: slope * 3600.0,
            memory_grows: grown > GROWTH_BYTES && grown > GROWTH_SHARE * first.resident_bytes as f64,
            descriptors_leak: after.descriptors > before.descriptors + DESCRIPTORS_SPARE,
            samples,
        }
    }

    /// Waits until descriptors stop falling, at most `most`, and returns the last sample.
    pub fn settle(pids: &[u32], most: Duration) -> Sample {
        const STEP: Duration = Duration::from_millis(250);
        const QUIET_STEPS: u32 = 8;
        let deadline = Instant::now() + most;
        let mut last = Sample::read(pids, 0.0);
        let mut quiet = 0;
        while quiet < QUIET_STEPS && Instant::now() < deadline {
            std::thread::sleep(STEP);
            let now = Sample::read(pids, 0.0);
            quiet = if now.descriptors < last.descriptors {
                0
            } else {
                quiet + 1
            };
            last = now;
        }
        last
    }

    pub fn is_sound(&self) -> bool {
        !self.memory_grows && !self.descriptors_leak
    }
}

/// Bytes per second by least squares.
fn slope(samples: &[Sample]) -> f64 {
    let count = samples.len() as f64;
    if samples.len() < 3 {
        return 0.0;
    }
    let mean_x = samples.iter().map(|sample| sample.at_s).sum::<f64>() / count;
    let mean_y = samples
        .iter()
        .map(|sample| sample.resident_bytes as f64)
        .sum::<f64>()
        / count;
    let (mut over, mut under) = (0.0, 0.0);
    for sample in samples {
        over += (sample.at_s - mean_x) * (sample.resident_bytes as f64 - mean_y);
        under += (sample.at_s - mean_x).powi(2);
    }
    if under > 0.0 { over / under } else { 0.0 }
}

impl fmt::Display for Soak {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / 1_048_576.0;
        let verdict = |bad: bool| if bad { "GROWS" } else { "steady" };
        writeln!(
            out,
            "memory      {:.1} MiB before, {:.1} peak, {:.1} after; second half {:+.2} MiB/h: {}",
            mib(self.before.resident_bytes),
            mib(self.peak_bytes),
            mib(self.after.resident_bytes),
            self.growth_bytes_per_hour / 1_048_576.0,
            verdict(self.memory_grows)
        )?;
        writeln!(
            out,
            "descriptors {} before, {} peak, {} after: {}",
            self.before.descriptors,
            self.peak_descriptors,
            self.after.descriptors,
            verdict(self.descriptors_leak)
        )?;
        writeln!(
            out,
            "threads     {} before, {} after",
            self.before.threads, self.after.threads
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(of: impl Fn(u64) -> u64) -> Vec<Sample> {
        (0..100)
            .map(|second| Sample {
                at_s: second as f64,
                resident_bytes: of(second),
                descriptors: 10,
                threads: 1,
            })
            .collect()
    }

    #[test]
    fn warming_up_is_no_leak_and_a_leak_is() {
        let warm = |second: u64| 50_000_000 + 1_000_000 * second.min(40);
        let soak = Soak::judge(samples(warm), Sample::default());
        assert!(soak.is_sound(), "{soak}");
        let leak = |second: u64| 50_000_000 + 300_000 * second;
        let soak = Soak::judge(samples(leak), Sample::default());
        assert!(soak.memory_grows, "{soak}");
        assert!((soak.growth_bytes_per_hour / 1.08e9 - 1.0).abs() < 0.01);
    }

    #[test]
    fn descriptors_that_stay_open_are_a_leak() {
        let after = Sample {
            descriptors: 200,
            ..Sample::default()
        };
        assert!(Soak::judge(samples(|_| 1), after).descriptors_leak);
    }

    #[test]
    fn this_process_can_be_watched() {
        let stop = AtomicBool::new(false);
        let samples = std::thread::scope(|scope| {
            let watch = scope.spawn(|| watch(&[std::process::id()], Duration::from_millis(5), &stop));
            while !watch.is_finished() && Sample::read(&[std::process::id()], 0.0).descriptors == 0 {}
            std::thread::sleep(Duration::from_millis(60));
            stop.store(true, Relaxed);
            watch.join().unwrap()
        });
        assert!(samples.len() >= 2 && samples[0].resident_bytes > 0 && samples[0].descriptors > 0);
    }
}
