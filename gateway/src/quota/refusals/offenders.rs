//! How long an offender is turned away: longer each time, shorter again with good behaviour.

use std::{collections::HashMap, time::Duration};

use ipnet::IpNet;

use super::Via;

/// How the time grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Growth {
    /// The first time.
    pub first: Duration,
    /// Each further one is this many times the one before; at least 1.
    pub factor: u32,
    /// The longest. Less than `first` means `first`.
    pub max: Duration,
    /// Good time that takes one step back.
    pub forgive: Duration,
    /// Good time after which nothing is left.
    pub forget: Duration,
}

impl Growth {
    fn hold(&self, step: u32) -> Duration {
        let factor = u64::from(self.factor.max(1)).saturating_pow(step);
        let first = u64::try_from(self.first.as_nanos()).unwrap_or(u64::MAX);
        Duration::from_nanos(first.saturating_mul(factor)).min(self.max.max(self.first))
    }
}

struct Offender {
    /// Drops before this one that count.
    step: u32,
    until_ns: u64,
}

/// Offenders that are remembered. For the control thread alone.
pub struct Offenders {
    known: HashMap<(IpNet, Via), Offender>,
    max: usize,
}

impl Offenders {
    /// Remembers at most `max`; beyond it those are forgotten whose time was over first.
    pub fn new(max: usize) -> Offenders {
        Offenders {
            known: HashMap::new(),
            max,
        }
    }

    /// Notes an offence; for how long the client is to be turned away. One that is turned away already offends with
    /// requests that were under way: nothing grows.
    pub fn offend(&mut self, net: IpNet, via: Via, growth: &Growth, now_ns: u64) -> Duration {
        let before = self.known.get(&(net, via));
        if let Some(known) = before.filter(|known| known.until_ns > now_ns) {
            return Duration::from_nanos(known.until_ns - now_ns);
        }
        let step = before.map_or(0, |known| {
            let good = Duration::from_nanos(now_ns - known.until_ns);
            if good >= growth.forget {
                return 0;
            }
            let forgiven = good.as_nanos() / growth.forgive.as_nanos().max(1);
            (known.step + 1).saturating_sub(u32::try_from(forgiven).unwrap_or(u32::MAX))
        });
        let hold = growth.hold(step);
        let until_ns = now_ns.saturating_add(hold.as_nanos() as u64);
        self.make_room();
        self.known.insert((net, via), Offender { step, until_ns });
        hold
    }

    /// Notes that a request of an offender was accepted: one step back.
    pub fn redeem(&mut self, net: IpNet, via: Via) {
        let Some(known) = self.known.get_mut(&(net, via)) else {
            return;
        };
        match known.step {
            0 => drop(self.known.remove(&(net, via))),
            step => known.step = step - 1,
        }
    }

    /// Forgets a client whose block was lifted by hand.
    pub fn lift(&mut self, net: IpNet) {
        self.known.retain(|(known, _), _| !net.contains(known));
    }

    /// Takes out a sixteenth at once when it is full, so that a flood of new offenders pays for the search only now and
    /// then.
    fn make_room(&mut self) {
        if self.known.len() < self.max {
            return;
        }
        let mut ends: Vec<u64> = self.known.values().map(|known| known.until_ns).collect();
        let place = (ends.len() / 16).min(ends.len().saturating_sub(1));
        let (_, bound, _) = ends.select_nth_unstable(place);
        let bound = *bound;
        self.known.retain(|_, known| known.until_ns > bound);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const GROWTH: Growth = Growth {
        first: Duration::from_secs(30),
        factor: 2,
        max: Duration::from_secs(100),
        forgive: Duration::from_secs(3600),
        forget: Duration::from_secs(86_400),
    };

    fn net(n: u32) -> IpNet {
        IpNet::from(std::net::IpAddr::from((0x0a00_0000 + n).to_be_bytes()))
    }

    /// Offends at `at` seconds; until when it is turned away, seconds.
    fn offend(offenders: &mut Offenders, at: u64) -> u64 {
        at + offenders
            .offend(net(1), Via::Direct, &GROWTH, at * SECOND)
            .as_secs()
    }

    #[test]
    fn time_grows_up_to_the_longest() {
        let mut offenders = Offenders::new(10);
        let mut at = 1;
        for wanted in [30, 60, 100, 100] {
            let until = offend(&mut offenders, at);
            assert_eq!(until - at, wanted);
            assert_eq!(offend(&mut offenders, until - 7), until, "while it lasts");
            at = until + 1;
        }
    }

    #[test]
    fn good_behaviour_takes_it_back() {
        let mut offenders = Offenders::new(10);
        let first = offend(&mut offenders, 1);
        let second = offend(&mut offenders, first);
        assert_eq!(second - first, 60);
        let third = offend(&mut offenders, second + 3600);
        assert_eq!(third - second - 3600, 60, "an hour: one step back");
        offenders.redeem(net(1), Via::Direct);
        let fourth = offend(&mut offenders, third);
        assert_eq!(fourth - third, 60, "an accepted request: one step back");
        let fifth = offend(&mut offenders, fourth + 86_400);
        assert_eq!(fifth - fourth - 86_400, 30, "a day: forgotten");
        offenders.lift("10.0.0.0/8".parse().expect("network"));
        assert!(offenders.known.is_empty());
    }

    #[test]
    fn numbers_that_grow_too_far_end_at_the_longest() {
        let growth = Growth {
            factor: 100,
            ..GROWTH
        };
        assert_eq!(growth.hold(u32::MAX), GROWTH.max);
        let short = Growth {
            max: Duration::from_secs(1),
            ..GROWTH
        };
        assert_eq!(short.hold(5), GROWTH.first);
    }

    #[test]
    fn a_full_table_forgets_whose_time_was_over_first() {
        let mut offenders = Offenders::new(64);
        for n in 0..65 {
            offenders.offend(net(n), Via::Direct, &GROWTH, SECOND + u64::from(n));
        }
        assert!(offenders.known.len() <= 64);
        assert!(!offenders.known.contains_key(&(net(0), Via::Direct)));
        assert!(offenders.known.contains_key(&(net(64), Via::Direct)));
        let mut tiny = Offenders::new(1);
        for n in 0..5 {
            tiny.offend(net(n), Via::Direct, &GROWTH, SECOND);
        }
        assert_eq!(tiny.known.len(), 1);
    }
}
