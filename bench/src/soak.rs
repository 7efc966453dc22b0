//! A long run that looks for what grows: memory and descriptors of the target.
//!
//! Memory is judged by its slope over the second half of the load, when caches and pools are full. Descriptors are judged
//! after the load: a pool keeps as many connections as were ever needed at once, so that their number under load says
//! nothing; when the pool's time for idle connections is over, only what leaked is left.

use std::fmt;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::process::Snapshot;

/// Samples that are kept.
const SAMPLES_MAX: usize = 100_000;
/// Growth over the second half that counts as a leak: more than this, and more than this share of what there was.
const GROWTH_BYTES: f64 = 4.0 * 1024.0 * 1024.0;
const GROWTH_SHARE: f64 = 0.05;
/// Descriptors that may be open after the load, and after `--settle`, beyond what was open before it: files that are opened
/// when they are first needed, the connections of health checks.
const DESCRIPTORS_SPARE: u64 = 16;
/// Looks at the processes that a verdict needs at least.
pub const LOOKS_MIN: u32 = 5;

/// The processes at one time, added up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Sample {
    pub at_s: f64,
    pub resident_bytes: u64,
    pub descriptors: u64,
    pub threads: u64,
}

impl Sample {
    /// Reads the processes.
    ///
    /// # Errors
    /// One that has ended, and one whose descriptors may not be read: a count of nothing must not look steady.
    pub fn read(pids: &[u32], at_s: f64) -> Result<Self> {
        let mut sample = Self {
            at_s,
            ..Self::default()
        };
        for pid in pids {
            let resident_bytes = Snapshot::read(*pid).map_or(0, |snapshot| snapshot.resident_bytes);
            // One that has ended and was not waited for still stands in /proc, without memory.
            ensure!(resident_bytes > 0, "process {pid} is not there, or has ended");
            sample.resident_bytes += resident_bytes;
            sample.descriptors += entries(*pid, "fd")?;
            sample.threads += entries(*pid, "task")?;
        }
        Ok(sample)
    }
}

fn entries(pid: u32, folder: &str) -> Result<u64> {
    let entries = fs::read_dir(format!("/proc/{pid}/{folder}"));
    let entries = entries.with_context(|| format!("cannot read /proc/{pid}/{folder}"))?;
    Ok(entries.count() as u64)
}

/// What was seen under load.
#[derive(Debug, Default)]
pub struct Watched {
    pub samples: Vec<Sample>,
    /// Why the processes could not be watched to the end.
    pub trouble: Option<String>,
}

/// Takes samples until `stop` is set, or a process ends. The first is `before`, which was taken before the load.
pub fn watch(pids: &[u32], before: Sample, every: Duration, stop: &AtomicBool) -> Watched {
    const LOOK: Duration = Duration::from_millis(20);
    let start = Instant::now();
    let mut watched = Watched {
        samples: vec![before],
        trouble: None,
    };
    let mut next = every;
    while !stop.load(Relaxed) && watched.samples.len() < SAMPLES_MAX {
        let since = start.elapsed();
        if since >= next {
            match Sample::read(pids, since.as_secs_f64()) {
                Ok(sample) => watched.samples.push(sample),
                Err(error) => {
                    watched.trouble =
                        Some(format!("{error:#}, {:.0} s after the start", since.as_secs_f64()));
                    break;
                }
            }
            next += every;
        }
        std::thread::sleep(LOOK.min(every));
    }
    watched
}

/// What a soak found out.
#[derive(Clone, Debug, Serialize)]
pub struct Soak {
    /// Before the load, at the highest, and after the load when connections had time to close.
    pub before: Sample,
    pub peak_bytes: u64,
    pub peak_descriptors: u64,
    /// Its time is that since the end of the load.
    pub after: Sample,
    /// Length of the second half, in seconds: that of which memory is judged.
    pub judged_s: f64,
    /// Slope of the resident memory in the second half, in bytes per hour.
    pub growth_bytes_per_hour: f64,
    pub memory_grows: bool,
    pub descriptors_leak: bool,
    /// Why the processes could not be watched to the end.
    pub trouble: Option<String>,
    pub samples: Vec<Sample>,
}

impl Soak {
    /// Judges what was seen under load, and what was left after it: `after`, or the reason why that could not be read.
    pub fn judge(watched: Watched, after: Result<Sample>) -> Self {
        let Watched { samples, trouble } = watched;
        let before = samples.first().copied().unwrap_or_default();
        let half = &samples[samples.len() / 2..];
        let slope = slope(half);
        let first = half.first().copied().unwrap_or_default();
        let judged_s = half.last().copied().unwrap_or_default().at_s - first.at_s;
        let grown = slope * judged_s;
        let most = |of: fn(&Sample) -> u64| samples.iter().map(of).max().unwrap_or(0);
        let (after, trouble_after) = match after {
            Ok(after) => (after, None),
            Err(error) => (Sample::default(), Some(format!("{error:#}, after the load"))),
        };
        Self {
            before,
            peak_bytes: most(|sample| sample.resident_bytes),
            peak_descriptors: most(|sample| sample.descriptors),
            after,
            judged_s,
            growth_bytes_per_hour: slope * 3600.0,
            memory_grows: grown > GROWTH_BYTES && grown > GROWTH_SHARE * first.resident_bytes as f64,
            descriptors_leak: after.descriptors > before.descriptors + DESCRIPTORS_SPARE,
            trouble: trouble.or(trouble_after),
            samples,
        }
    }

    /// Waits until hardly more descriptors are open than in `before`, at most `most`, and returns the last sample.
    ///
    /// # Errors
    /// Those of [`Sample::read`].
    pub fn settle(pids: &[u32], before: &Sample, most: Duration) -> Result<Sample> {
        const STEP: Duration = Duration::from_millis(250);
        let start = Instant::now();
        loop {
            let since = start.elapsed();
            let now = Sample::read(pids, since.as_secs_f64())?;
            if now.descriptors <= before.descriptors + DESCRIPTORS_SPARE || since >= most {
                return Ok(now);
            }
            std::thread::sleep(STEP);
        }
    }

    /// Whether memory could be judged: too few samples have no slope.
    fn is_judged(&self) -> bool {
        self.samples.len() >= LOOKS_MIN as usize
    }

    pub fn is_sound(&self) -> bool {
        self.trouble.is_none() && self.is_judged() && !self.memory_grows && !self.descriptors_leak
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
        let verdict = |bad: bool| match (bad, self.is_judged() && self.trouble.is_none()) {
            (true, _) => "GROWS",
            (false, true) => "steady",
            (false, false) => "not judged",
        };
        if let Some(trouble) = &self.trouble {
            writeln!(out, "FAILED      {trouble}")?;
        }
        writeln!(
            out,
            "memory      {:.1} MiB before, {:.1} peak, {:.1} after; last {:.0} s of the load {:+.2} MiB/h: {}",
            mib(self.before.resident_bytes),
            mib(self.peak_bytes),
            mib(self.after.resident_bytes),
            self.judged_s,
            self.growth_bytes_per_hour / 1_048_576.0,
            verdict(self.memory_grows)
        )?;
        writeln!(
            out,
            "descriptors {} before, {} peak, {} {:.0} s after the load: {}",
            self.before.descriptors,
            self.peak_descriptors,
            self.after.descriptors,
            self.after.at_s,
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

    fn judge(samples: Vec<Sample>, after: Sample) -> Soak {
        let trouble = None;
        Soak::judge(Watched { samples, trouble }, Ok(after))
    }

    #[test]
    fn warming_up_is_no_leak_and_a_leak_is() {
        let warm = |second: u64| 50_000_000 + 1_000_000 * second.min(40);
        let soak = judge(samples(warm), Sample::default());
        assert!(soak.is_sound(), "{soak}");
        let leak = |second: u64| 50_000_000 + 300_000 * second;
        let soak = judge(samples(leak), Sample::default());
        assert!(soak.memory_grows, "{soak}");
        assert!((soak.growth_bytes_per_hour / 1.08e9 - 1.0).abs() < 0.01);
    }

    #[test]
    fn descriptors_that_stay_open_are_a_leak_and_a_pool_under_load_is_none() {
        let after = |descriptors| Sample {
            descriptors,
            ..Sample::default()
        };
        let mut pooled = samples(|_| 1 << 20);
        pooled[50..]
            .iter_mut()
            .for_each(|sample| sample.descriptors = 400);
        assert!(judge(pooled.clone(), after(12)).is_sound());
        assert!(judge(pooled, after(30)).descriptors_leak);
    }

    #[test]
    fn what_could_not_be_watched_is_not_sound() {
        assert!(!judge(samples(|_| 1)[..2].to_vec(), Sample::default()).is_sound());
        let ended = Watched {
            samples: samples(|_| 1),
            trouble: Some("process 7 has ended".to_owned()),
        };
        let soak = Soak::judge(ended, Ok(Sample::default()));
        assert!(
            !soak.is_sound() && soak.to_string().contains("process 7 has ended"),
            "{soak}"
        );
    }

    #[test]
    fn a_process_that_ends_is_told() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pids = [child.id()];
        let stop = AtomicBool::new(false);
        let before = Sample::read(&pids, 0.0).unwrap();
        assert!(before.descriptors > 0);
        // Killed and not waited for: it stays in /proc.
        child.kill().unwrap();
        let watched = watch(&pids, before, Duration::from_millis(5), &stop);
        assert!(watched.trouble.unwrap().contains(&pids[0].to_string()));
        child.wait().unwrap();
        assert!(Sample::read(&pids, 0.0).is_err());
    }

    #[test]
    fn a_process_whose_descriptors_stay_has_until_the_end_of_its_time() {
        let pids = [std::process::id()];
        let before = Sample::default();
        let now = Soak::settle(&pids, &before, Duration::ZERO).unwrap();
        assert!(now.resident_bytes > 0);
        let before = Sample {
            descriptors: u64::MAX / 2,
            ..before
        };
        let now = Soak::settle(&pids, &before, Duration::from_secs(600)).unwrap();
        assert!(now.at_s < 60.0, "it does not wait for what is there");
    }

    #[test]
    fn this_process_can_be_watched() {
        let stop = AtomicBool::new(false);
        let pids = [std::process::id()];
        let before = Sample::read(&pids, 0.0).unwrap();
        let watched = std::thread::scope(|scope| {
            let watch = scope.spawn(|| watch(&pids, before, Duration::from_millis(5), &stop));
            std::thread::sleep(Duration::from_millis(60));
            stop.store(true, Relaxed);
            watch.join().unwrap()
        });
        assert!(watched.trouble.is_none() && watched.samples.len() >= 2);
        let last = watched.samples.last().unwrap();
        assert!(last.resident_bytes > 0 && last.descriptors > 0 && last.at_s > 0.0);
    }
}
