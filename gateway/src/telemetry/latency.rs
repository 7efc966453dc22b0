//! Latencies of one core, and how the control thread gets a copy of them.

use hdrhistogram::Histogram;

/// Largest latency told apart, microseconds: one hour. A longer one is counted as this.
pub const LATENCY_US_MAX: u64 = 3_600_000_000;

/// Significant decimal digits kept. Two: a recorded value is at most 1 % off.
const DIGITS: u8 = 2;

/// One latency's distribution and its exact sum.
///
/// From 1 µs to 1 h at two digits an hdrhistogram has 26 blocks of 128 counters of 8 bytes: 26 KiB,
/// taken at start. Auto-resize is off, so recording never allocates.
#[derive(Debug, Clone)]
pub struct Latency {
    histogram: Histogram<u64>,
    /// Kept beside the histogram, which would give it only rounded.
    sum_us: u64,
}

impl Default for Latency {
    fn default() -> Self {
        // The bounds are constants that the crate accepts, as the tests show; were it to change its
        // mind, the smallest possible histogram still counts.
        let histogram = Histogram::new_with_bounds(1, LATENCY_US_MAX, DIGITS)
            .or_else(|_| Histogram::new_with_bounds(1, 2, 0))
            .unwrap_or_else(|error| unreachable!("histogram of constant bounds: {error:?}"));
        Latency { histogram, sum_us: 0 }
    }
}

impl Latency {
    /// Records `count` values of `value_us` microseconds. Does not allocate.
    #[inline]
    pub fn record(&mut self, value_us: u64, count: u64) {
        self.histogram.saturating_record_n(value_us, count);
        self.sum_us = self.sum_us.wrapping_add(value_us.wrapping_mul(count));
    }

    /// Adds another core's values.
    pub fn merge(&mut self, other: &Latency) {
        // Both have the same constant bounds, the only thing that could make this fail.
        if self.histogram.add(&other.histogram).is_ok() {
            self.sum_us = self.sum_us.wrapping_add(other.sum_us);
        }
    }

    /// Values recorded.
    pub fn count(&self) -> u64 {
        self.histogram.len()
    }

    /// Sum of the values, microseconds.
    pub fn sum_us(&self) -> u64 {
        self.sum_us
    }

    /// Largest value, microseconds; 0 when there is none.
    pub fn max_us(&self) -> u64 {
        self.histogram.max()
    }

    /// The value that this share of all values does not exceed (`0.5` is the median), microseconds;
    /// 0 when there is none.
    pub fn quantile_us(&self, quantile: f64) -> u64 {
        self.histogram.value_at_quantile(quantile)
    }

    /// For each bound (ascending, microseconds) how many values are at or below it.
    ///
    /// A value within 1 % above a bound may be counted as at it: the histogram keeps no more.
    pub fn cumulative(&self, bounds_us: &[u64]) -> Vec<u64> {
        let mut counts = vec![0; bounds_us.len()];
        for step in self.histogram.iter_recorded() {
            let value_us = self.histogram.lowest_equivalent(step.value_iterated_to());
            let place = bounds_us.partition_point(|bound| *bound < value_us);
            if let Some(count) = counts.get_mut(place) {
                *count += step.count_since_last_iteration();
            }
        }
        let mut sum = 0;
        for count in &mut counts {
            sum += *count;
            *count = sum;
        }
        counts
    }
}

/// The latencies that a core keeps: about 104 KiB.
#[derive(Debug, Clone, Default)]
pub struct Latencies {
    /// From the complete head of a request to the first byte of its answer's body.
    pub ttft: Latency,
    /// Between two events of a stream, as they are passed on.
    pub inter_token: Latency,
    /// From the complete head of a request to the end of its answer.
    pub total: Latency,
    /// The part of a request's time that the gateway itself took until the upstream had it.
    pub overhead: Latency,
}

impl Latencies {
    /// Adds another core's values.
    pub fn merge(&mut self, other: &Latencies) {
        self.ttft.merge(&other.ttft);
        self.inter_token.merge(&other.inter_token);
        self.total.merge(&other.total);
        self.overhead.merge(&other.overhead);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_what_the_comment_says() {
        let latency = Latency::default();
        assert_eq!(latency.histogram.distinct_values() * 8, 26 * 128 * 8);
        assert_eq!(latency.histogram.sigfig(), DIGITS);
        assert!(!latency.histogram.is_auto_resize());
    }

    #[test]
    fn extremes_are_counted() {
        let mut latency = Latency::default();
        latency.record(0, 1);
        latency.record(u64::MAX, 1);
        latency.record(LATENCY_US_MAX, 2);
        assert_eq!(latency.count(), 4);
        assert_eq!(latency.cumulative(&[1, u64::MAX]), [1, 4]);
    }

    #[test]
    fn values_at_a_bound_are_within_it() {
        let mut latency = Latency::default();
        for value_us in [1_000, 5_000, 10_000, 10_500, 250_000, 1_000_000] {
            latency.record(value_us, 1);
        }
        let bounds = [1_000, 5_000, 10_000, 250_000, 500_000, 1_000_000];
        assert_eq!(latency.cumulative(&bounds), [1, 2, 3, 5, 5, 6]);
        assert_eq!(latency.sum_us(), 1_276_500);
    }

    #[test]
    fn quantiles_are_within_one_percent() {
        let mut latency = Latency::default();
        (1..=10_000).for_each(|value_us| latency.record(value_us, 1));
        let close = |value: u64, wanted: u64| value.abs_diff(wanted) * 100 <= wanted;
        assert!(close(latency.quantile_us(0.5), 5_000));
        assert!(close(latency.quantile_us(0.99), 9_900));
        assert!(close(latency.max_us(), 10_000));
    }

    #[test]
    fn merging_adds() {
        let (mut a, mut b) = (Latencies::default(), Latencies::default());
        a.ttft.record(100, 2);
        b.ttft.record(300, 1);
        b.total.record(7, 1);
        a.merge(&b);
        assert_eq!((a.ttft.count(), a.ttft.sum_us()), (3, 500));
        assert_eq!(a.total.count(), 1);
        assert_eq!(a.overhead.count(), 0);
    }
}
