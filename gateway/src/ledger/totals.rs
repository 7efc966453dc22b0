//! Sums over records.

use std::collections::HashMap;

use serde::Serialize;

use super::record::{Flags, Outcome, RecordView};
use crate::{
    bounds::{NAME_BYTES_MAX, USAGE_LABELS_MAX},
    dialect::{Api, Usage},
};

/// Label of what came after [`USAGE_LABELS_MAX`] others.
pub const OTHER: &str = "other";

const DAY_MS: u64 = 86_400_000;

/// Sums over records. They stop at `u64::MAX` rather than wrap: providers' figures are foreign input.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// Records; the sum of the next three.
    pub requests: u64,
    pub completed: u64,
    pub client_gone: u64,
    /// Upstream failed, timed out, or the gateway was stopped.
    pub failed: u64,
    /// Records whose tokens are the gateway's estimate.
    pub estimated: u64,
    pub prompt_tokens: u64,
    /// Part of `prompt_tokens`.
    pub cached_tokens: u64,
    pub completion_tokens: u64,
    /// Part of `completion_tokens`.
    pub reasoning_tokens: u64,
    /// Parts of `prompt_tokens`, written to the provider's cache.
    pub cache_write_5m_tokens: u64,
    pub cache_write_1h_tokens: u64,
    /// Nano-dollars of the records whose cost is known.
    pub cost_nano_usd: u64,
    /// Records whose cost nobody knows.
    pub unpriced: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
}

impl Counters {
    /// Number of counters, and of the columns that hold them.
    pub const COUNT: usize = 15;
    /// Names, in the order of [`Counters::to_array`].
    pub const NAMES: [&'static str; Counters::COUNT] = [
        "requests",
        "completed",
        "client_gone",
        "failed",
        "estimated",
        "prompt_tokens",
        "cached_tokens",
        "completion_tokens",
        "reasoning_tokens",
        "cache_write_5m_tokens",
        "cache_write_1h_tokens",
        "cost_nano_usd",
        "unpriced",
        "bytes_in",
        "bytes_out",
    ];

    /// The counters of one record.
    fn of(record: &RecordView<'_>) -> Counters {
        let Usage {
            prompt,
            cached,
            completion,
            reasoning,
            cache_write_5m,
            cache_write_1h,
            ..
        } = record.usage;
        let mut counters = Counters {
            requests: 1,
            estimated: u64::from(record.flags.has(Flags::ESTIMATED)),
            prompt_tokens: prompt,
            cached_tokens: cached,
            completion_tokens: completion,
            reasoning_tokens: reasoning,
            cache_write_5m_tokens: cache_write_5m,
            cache_write_1h_tokens: cache_write_1h,
            cost_nano_usd: record.cost.unwrap_or(0),
            unpriced: u64::from(record.cost.is_none()),
            bytes_in: record.bytes_in,
            bytes_out: record.bytes_out,
            ..Counters::default()
        };
        match record.outcome {
            Outcome::Complete => counters.completed = 1,
            Outcome::ClientGone => counters.client_gone = 1,
            Outcome::UpstreamFailed | Outcome::TimedOut | Outcome::Stopped => counters.failed = 1,
        }
        counters
    }

    /// The values in the order of [`Counters::NAMES`].
    pub fn to_array(self) -> [u64; Counters::COUNT] {
        [
            self.requests,
            self.completed,
            self.client_gone,
            self.failed,
            self.estimated,
            self.prompt_tokens,
            self.cached_tokens,
            self.completion_tokens,
            self.reasoning_tokens,
            self.cache_write_5m_tokens,
            self.cache_write_1h_tokens,
            self.cost_nano_usd,
            self.unpriced,
            self.bytes_in,
            self.bytes_out,
        ]
    }

    /// The inverse of [`Counters::to_array`].
    pub fn from_array(values: [u64; Counters::COUNT]) -> Counters {
        let [
            requests,
            completed,
            client_gone,
            failed,
            estimated,
            prompt_tokens,
            cached_tokens,
            completion_tokens,
            reasoning_tokens,
            cache_write_5m_tokens,
            cache_write_1h_tokens,
            cost_nano_usd,
            unpriced,
            bytes_in,
            bytes_out,
        ] = values;
        Counters {
            requests,
            completed,
            client_gone,
            failed,
            estimated,
            prompt_tokens,
            cached_tokens,
            completion_tokens,
            reasoning_tokens,
            cache_write_5m_tokens,
            cache_write_1h_tokens,
            cost_nano_usd,
            unpriced,
            bytes_in,
            bytes_out,
        }
    }

    /// Adds each counter of `other`.
    pub fn add(&mut self, other: &Counters) {
        let mut sums = self.to_array();
        for (sum, value) in sums.iter_mut().zip(other.to_array()) {
            *sum = sum.saturating_add(value);
        }
        *self = Counters::from_array(sums);
    }
}

/// What one row of the rollup is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Group {
    /// Days since the Unix epoch, UTC.
    pub day: u32,
    pub key: String,
    pub team: String,
    pub organization: String,
    pub user: String,
    pub model: String,
    pub provider: String,
    pub upstream_model: String,
    pub api: Api,
}

/// Records summed by group, in memory. Finding a known group takes no allocation.
#[derive(Debug, Default)]
pub struct Sums {
    /// From the bytes that make up a group (see [`Sums::label`]).
    index: HashMap<Box<[u8]>, usize>,
    groups: Vec<(Group, Counters)>,
}

/// Longest label: day, api, seven names with their lengths.
const LABEL_BYTES_MAX: usize = 4 + 1 + 7 * (1 + NAME_BYTES_MAX);

impl Sums {
    /// Adds one record.
    pub fn add(&mut self, record: &RecordView<'_>) {
        let mut buffer = [0; LABEL_BYTES_MAX];
        let label = Sums::label(record, &mut buffer);
        let place = match self.index.get(label) {
            Some(place) => *place,
            None => {
                self.index.insert(label.into(), self.groups.len());
                self.groups.push((group_of(record), Counters::default()));
                self.groups.len() - 1
            }
        };
        self.groups[place].1.add(&Counters::of(record));
    }

    /// The groups and their sums.
    pub fn groups(&self) -> &[(Group, Counters)] {
        &self.groups
    }

    /// The groups and their sums.
    pub fn into_groups(self) -> Vec<(Group, Counters)> {
        self.groups
    }

    /// A text that two records share when they belong to the same group.
    fn label<'a>(record: &RecordView<'_>, buffer: &'a mut [u8; LABEL_BYTES_MAX]) -> &'a [u8] {
        buffer[..4].copy_from_slice(&day_of(record.time_unix_ms).to_le_bytes());
        buffer[4] = record.api as u8;
        let mut at = 5;
        let names = [
            record.key,
            record.team,
            record.organization,
            record.user,
            record.model,
            record.provider,
            record.upstream_model,
        ];
        for name in names {
            // Decoded names are at most 255 bytes by their length's type; longer than the bound are
            // none, as only such are written.
            let bytes = &name.as_bytes()[..name.len().min(NAME_BYTES_MAX)];
            buffer[at] = bytes.len() as u8;
            buffer[at + 1..at + 1 + bytes.len()].copy_from_slice(bytes);
            at += 1 + bytes.len();
        }
        &buffer[..at]
    }
}

fn group_of(record: &RecordView<'_>) -> Group {
    Group {
        day: day_of(record.time_unix_ms),
        key: record.key.into(),
        team: record.team.into(),
        organization: record.organization.into(),
        user: record.user.into(),
        model: record.model.into(),
        provider: record.provider.into(),
        upstream_model: record.upstream_model.into(),
        api: record.api,
    }
}

/// The UTC day of a time, days since the Unix epoch; the last one that a date can be written for
/// stands for all later ones.
pub fn day_of(time_unix_ms: u64) -> u32 {
    /// 9999-12-30.
    const LAST: u64 = 2_932_895;
    (time_unix_ms / DAY_MS).min(LAST) as u32
}

/// Sums since start by key and model, for metrics. Bounded by [`USAGE_LABELS_MAX`].
#[derive(Debug, Default)]
pub struct Totals {
    by_label: HashMap<(String, String), Counters>,
}

impl Totals {
    /// Adds what a fold has summed.
    pub fn add(&mut self, sums: &Sums) {
        for (group, counters) in sums.groups() {
            let mut label = (group.key.clone(), group.model.clone());
            // One place is kept for the label that takes the rest.
            if self.by_label.len() + 1 >= USAGE_LABELS_MAX && !self.by_label.contains_key(&label) {
                label = (OTHER.into(), OTHER.into());
            }
            self.by_label.entry(label).or_default().add(counters);
        }
    }

    /// All of them, in order of key and model.
    pub fn list(&self) -> Vec<(String, String, Counters)> {
        let mut list: Vec<_> = self
            .by_label
            .iter()
            .map(|((key, model), sum)| (key.clone(), model.clone(), *sum))
            .collect();
        list.sort_by(|a, b| (&a.0, &a.1).cmp(&(&b.0, &b.1)));
        list
    }
}

#[cfg(test)]
mod tests {
    use super::{super::record::tests::numbered, *};

    #[test]
    fn labels_are_bounded_and_nothing_is_lost() {
        let mut totals = Totals::default();
        let records = USAGE_LABELS_MAX as u64 + 100;
        for number in 0..records {
            let mut sums = Sums::default();
            let mut record = numbered(1);
            record.key = format!("key {number}").into();
            sums.add(&record.view());
            sums.add(&record.view());
            totals.add(&sums);
        }
        let list = totals.list();
        assert_eq!(list.len(), USAGE_LABELS_MAX);
        assert_eq!(
            list.iter().map(|(.., counters)| counters.requests).sum::<u64>(),
            2 * records
        );
        let other = list
            .iter()
            .find(|(key, model, _)| key == OTHER && model == OTHER)
            .unwrap();
        assert_eq!(other.2.requests, 2 * 101);
    }

    #[test]
    fn groups_differ_by_each_of_their_parts() {
        let mut sums = Sums::default();
        let base = numbered(1);
        sums.add(&base.view());
        // Names that run together the same way are still different ones.
        for (key, team) in [("al", "ice"), ("", "alice"), ("alice", "x")] {
            let mut record = base.clone();
            (record.key, record.team) = (key.into(), team.into());
            sums.add(&record.view());
        }
        let mut later = base.clone();
        later.time_unix_ms += DAY_MS;
        sums.add(&later.view());
        sums.add(&base.view());
        assert_eq!(sums.groups().len(), 5);
        assert_eq!(sums.groups()[0].1.requests, 2);
        assert_eq!(day_of(u64::MAX), 2_932_895);
    }
}
