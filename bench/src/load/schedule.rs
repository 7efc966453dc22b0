//! When requests are due in the open loop.

use std::time::Duration;

use crate::random::Random;

/// The rate changes evenly from one figure to another over some time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stage {
    /// Requests per second at its start and at its end.
    pub from: f64,
    pub to: f64,
    pub time: Duration,
}

/// How requests of an open loop are spread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Arrivals {
    /// As evenly as the rate says.
    #[default]
    Even,
    /// As if by many who know nothing of each other.
    Poisson,
}

/// Tells when each request is due. The rate of the last stage's end holds on.
#[derive(Clone, Debug)]
pub(super) struct Schedule {
    stages: Vec<Stage>,
    arrivals: Arrivals,
    random: Random,
    /// Requests that are due before the present stage, and its start in seconds.
    before: f64,
    start_s: f64,
    stage: usize,
    /// Requests that are due before the next one; a fraction where arrivals are random.
    next: f64,
}

impl Schedule {
    pub fn new(stages: &[Stage], arrivals: Arrivals, seed: u64) -> Self {
        let mut schedule = Self {
            stages: stages.to_vec(),
            arrivals,
            random: Random::new(seed),
            before: 0.0,
            start_s: 0.0,
            stage: 0,
            next: 0.0,
        };
        if arrivals == Arrivals::Poisson {
            schedule.next = schedule.random.exponential();
        }
        schedule
    }

    /// When the next request is due, in nanoseconds since the start; `None` where none will be.
    pub fn due_ns(&mut self) -> Option<u64> {
        while let Some(stage) = self.stages.get(self.stage) {
            let seconds = stage.time.as_secs_f64();
            let requests = (stage.from + stage.to) / 2.0 * seconds;
            if self.next < self.before + requests {
                let into = reached(stage, self.next - self.before);
                return Some(((self.start_s + into) * 1e9) as u64);
            }
            self.before += requests;
            self.start_s += seconds;
            self.stage += 1;
        }
        let rate = self.stages.last().map_or(0.0, |stage| stage.to);
        (rate > 0.0).then(|| ((self.start_s + (self.next - self.before) / rate) * 1e9) as u64)
    }

    /// Goes on to the request after this one.
    pub fn advance(&mut self) {
        self.next += match self.arrivals {
            Arrivals::Even => 1.0,
            Arrivals::Poisson => self.random.exponential(),
        };
    }
}

/// Seconds into `stage` until `requests` have been due: the rate is `from + slope × t`, its integral is solved for t.
fn reached(stage: &Stage, requests: f64) -> f64 {
    let slope = (stage.to - stage.from) / stage.time.as_secs_f64();
    if slope.abs() < 1e-9 {
        return requests / stage.from;
    }
    let root = (stage.from * stage.from + 2.0 * slope * requests).max(0.0).sqrt();
    // The form that does not subtract nearly equal numbers.
    2.0 * requests / (stage.from + root)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(from: f64, to: f64, seconds: u64) -> Stage {
        Stage {
            from,
            to,
            time: Duration::from_secs(seconds),
        }
    }

    fn due(schedule: &mut Schedule, count: usize) -> Vec<u64> {
        let mut times = Vec::new();
        for _ in 0..count {
            times.push(schedule.due_ns().expect("more are due"));
            schedule.advance();
        }
        times
    }

    #[test]
    fn an_even_rate_is_even() {
        let mut schedule = Schedule::new(&[stage(200.0, 200.0, 0)], Arrivals::Even, 1);
        assert_eq!(due(&mut schedule, 3), [0, 5_000_000, 10_000_000]);
    }

    #[test]
    fn ramps_rise_and_then_hold() {
        let mut schedule = Schedule::new(&[stage(0.0, 100.0, 2), stage(100.0, 100.0, 1)], Arrivals::Even, 1);
        let times = due(&mut schedule, 300);
        assert!(times.windows(2).all(|pair| pair[0] <= pair[1]));
        // 100 requests in the ramp: half of them after its time over root 2.
        assert!((times[50] as f64 / 1e9 - 2.0_f64.sqrt()).abs() < 0.01);
        assert!((times[100] as f64 / 1e9 - 2.0).abs() < 0.01);
        assert!((times[299] as f64 / 1e9 - 3.99).abs() < 0.02);
        let mut down = Schedule::new(&[stage(100.0, 0.0, 2)], Arrivals::Even, 1);
        assert_eq!(due(&mut down, 100).len(), 100);
        assert_eq!(down.due_ns(), None);
    }

    #[test]
    fn random_arrivals_keep_the_rate() {
        let mut schedule = Schedule::new(&[stage(1000.0, 1000.0, 1)], Arrivals::Poisson, 9);
        let times = due(&mut schedule, 10_000);
        assert!((times[9_999] as f64 / 1e9 - 10.0).abs() < 0.4);
        let gaps: Vec<u64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let short = gaps.iter().filter(|gap| **gap < 1_000_000).count();
        // 1 − 1/e of exponential gaps are shorter than their mean.
        assert!((6000..6650).contains(&short), "{short}");
    }
}
