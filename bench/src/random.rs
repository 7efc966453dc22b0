//! A small generator of random numbers, seeded so that a run can be had again, and distributions over it.

use std::sync::Arc;
use std::time::Duration;

/// xoshiro256** would be better; for delays and choices SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) is enough.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// From 0 up to, not including, 1.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// From 0 up to, not including, `bound`; 0 for a bound of 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// Normally distributed around 0 with a deviation of 1 (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// Exponentially distributed with a mean of 1.
    pub fn exponential(&mut self) -> f64 {
        -(1.0 - self.unit()).ln()
    }
}

/// How a figure is spread. Negative samples count as 0.
#[derive(Clone, Debug, PartialEq)]
pub enum Spread {
    Fixed(f64),
    Uniform {
        low: f64,
        high: f64,
    },
    Normal {
        mean: f64,
        deviation: f64,
    },
    /// `median × e^(sigma × normal)`: what the times of real services look like.
    LogNormal {
        median: f64,
        sigma: f64,
    },
    Exponential {
        mean: f64,
    },
    /// One of these, each as likely as the next.
    Listed(Arc<[f64]>),
}

/// Values of one file at most.
const LISTED_MAX: usize = 1_000_000;

impl Spread {
    /// Reads `VALUE`, `uniform:LOW:HIGH`, `normal:MEAN:DEVIATION`, `lognormal:MEDIAN:SIGMA`, `exp:MEAN`. `value` reads
    /// one value with its unit.
    pub fn parse(text: &str, value: impl Fn(&str) -> Option<f64>) -> Option<Self> {
        let words: Vec<&str> = text.split(':').collect();
        let plain = |word: &str| {
            word.parse::<f64>()
                .ok()
                .filter(|number| number.is_finite() && *number >= 0.0)
        };
        Some(match words[..] {
            [one] => Self::Fixed(value(one)?),
            ["uniform", low, high] => {
                let (low, high) = (value(low)?, value(high)?);
                (low <= high).then_some(Self::Uniform { low, high })?
            }
            ["normal", mean, deviation] => Self::Normal {
                mean: value(mean)?,
                deviation: value(deviation)?,
            },
            ["lognormal", median, sigma] => Self::LogNormal {
                median: value(median)?,
                sigma: plain(sigma).filter(|sigma| *sigma <= 10.0)?,
            },
            ["exp", mean] => Self::Exponential { mean: value(mean)? },
            _ => return None,
        })
    }

    /// Reads a file with one value a line; empty lines and lines that begin with `#` are left out.
    pub fn parse_list(text: &str, value: impl Fn(&str) -> Option<f64>) -> Option<Self> {
        let lines = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        let values: Option<Vec<f64>> = lines.take(LISTED_MAX).map(value).collect();
        values
            .filter(|values| !values.is_empty())
            .map(|values| Self::Listed(values.into()))
    }

    pub fn sample(&self, random: &mut Random) -> f64 {
        let value = match self {
            Self::Fixed(value) => return *value,
            Self::Uniform { low, high } => low + (high - low) * random.unit(),
            Self::Normal { mean, deviation } => mean + deviation * random.normal(),
            Self::LogNormal { median, sigma } => median * (sigma * random.normal()).exp(),
            Self::Exponential { mean } => mean * random.exponential(),
            Self::Listed(values) => values[random.below(values.len() as u64) as usize],
        };
        value.max(0.0)
    }

    /// Where every sample is the same, that one.
    pub fn fixed(&self) -> Option<f64> {
        match self {
            Self::Fixed(value) => Some(*value),
            _ => None,
        }
    }
}

/// A sample in seconds as a time, at most a day.
pub fn seconds(sample: f64) -> Duration {
    Duration::from_secs_f64(sample.clamp(0.0, 86_400.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(text: &str) -> Option<f64> {
        text.parse().ok()
    }

    fn mean(spread: &str) -> f64 {
        let spread = Spread::parse(spread, plain).unwrap();
        let mut random = Random::new(7);
        (0..20_000).map(|_| spread.sample(&mut random)).sum::<f64>() / 20_000.0
    }

    #[test]
    fn spreads_have_their_means() {
        assert_eq!(mean("3"), 3.0);
        assert!((mean("uniform:2:4") - 3.0).abs() < 0.05);
        assert!((mean("normal:10:1") - 10.0).abs() < 0.05);
        assert!((mean("exp:5") - 5.0).abs() < 0.2);
        // The mean of a lognormal is median × e^(sigma²/2).
        assert!((mean("lognormal:1:0.5") - 0.125_f64.exp()).abs() < 0.05);
    }

    #[test]
    fn what_is_no_spread_is_refused() {
        for text in [
            "",
            "uniform:4:2",
            "uniform:1",
            "normal:1",
            "lognormal:1:-1",
            "zipf:1:2",
            "exp:x",
        ] {
            assert_eq!(Spread::parse(text, plain), None, "{text}");
        }
        assert_eq!(Spread::parse_list("# none\n\n", plain), None);
        let listed = Spread::parse_list("# ms\n1\n\n 2 \n", plain).unwrap();
        let sample = listed.sample(&mut Random::new(1));
        assert!(sample == 1.0 || sample == 2.0);
    }

    #[test]
    fn the_same_seed_gives_the_same_numbers() {
        let (mut left, mut right) = (Random::new(3), Random::new(3));
        assert!((0..100).all(|_| left.next() == right.next()));
        assert!((0..1000).all(|_| left.below(10) < 10 && left.unit() < 1.0));
    }
}
