//! What a provider keeps track of beside one call: its limits and its caches of prompt prefixes.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use super::behaviour::{Behaviour, ProviderLimits};
use super::request::Api;

/// Bytes of prompt in a block of the cache: 64 tokens of four bytes.
const BLOCK_BYTES: usize = 256;
/// Tokens of a block.
pub const BLOCK_TOKENS: u64 = 64;
const MINUTE_NS: f64 = 60e9;
/// Models of endpoints whose limits are kept at once. Names come from the caller, and each is some hundred bytes.
const ACCOUNTS_MAX: usize = 16 * 1024;

/// A place among the calls that are answered at once. Dropping it frees the place.
#[derive(Debug)]
pub struct Permit(Arc<AtomicU32>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// A bucket that refills evenly: what is left of a minute's allowance.
#[derive(Debug)]
struct Bucket {
    left: f64,
    at_ns: u64,
}

impl Bucket {
    fn refill(&mut self, limit: u32, now_ns: u64) {
        let since_ns = now_ns.saturating_sub(self.at_ns) as f64;
        self.left = (self.left + f64::from(limit) * since_ns / MINUTE_NS).min(f64::from(limit));
        self.at_ns = self.at_ns.max(now_ns);
    }

    /// Seconds until `wanted` are there.
    fn wait_s(&self, limit: u32, wanted: f64) -> f64 {
        (wanted - self.left).max(0.0) * 60.0 / f64::from(limit.max(1))
    }
}

#[derive(Debug)]
struct Account {
    requests: Bucket,
    tokens: Bucket,
    active: Arc<AtomicU32>,
}

impl Account {
    /// Whether a new account would say the same: nothing is under way, and a minute has filled the buckets again.
    fn is_forgotten(&self, now_ns: u64) -> bool {
        let since_ns = now_ns.saturating_sub(self.requests.at_ns.max(self.tokens.at_ns));
        self.active.load(Relaxed) == 0 && since_ns as f64 >= MINUTE_NS
    }
}

/// What is known of one model on one endpoint, and of one endpoint's cache.
#[derive(Debug, Default)]
pub struct Provider {
    accounts: Mutex<HashMap<(usize, String), Account>>,
    caches: Mutex<HashMap<usize, PrefixCache>>,
}

/// What the limits say to a call.
#[derive(Debug)]
pub struct Verdict {
    /// Header lines that tell of the limits.
    pub fields: String,
    /// The call's place, or after how many seconds it may come again.
    pub outcome: Result<Option<Permit>, u32>,
}

impl Provider {
    /// Takes a call of `tokens` tokens, prompt and answer, from the limits.
    pub fn admit(
        &self,
        endpoint: usize,
        model: &str,
        api: Api,
        limits: ProviderLimits,
        tokens: u64,
        now_ns: u64,
    ) -> Verdict {
        if limits == ProviderLimits::default() {
            return Verdict {
                fields: String::new(),
                outcome: Ok(None),
            };
        }
        let mut accounts = self.accounts.lock().unwrap_or_else(PoisonError::into_inner);
        let name = (endpoint, model.to_owned());
        if accounts.len() >= ACCOUNTS_MAX && !accounts.contains_key(&name) {
            accounts.retain(|_, account| !account.is_forgotten(now_ns));
            if accounts.len() >= ACCOUNTS_MAX {
                return Verdict {
                    fields: String::new(),
                    outcome: Err((MINUTE_NS / 1e9) as u32),
                };
            }
        }
        let account = accounts.entry(name).or_insert_with(|| Account {
            requests: Bucket {
                left: f64::from(limits.requests_per_minute),
                at_ns: now_ns,
            },
            tokens: Bucket {
                left: f64::from(limits.tokens_per_minute),
                at_ns: now_ns,
            },
            active: Arc::default(),
        });
        account.requests.refill(limits.requests_per_minute, now_ns);
        account.tokens.refill(limits.tokens_per_minute, now_ns);
        let tokens = tokens as f64;
        let mut wait_s: f64 = 0.0;
        if limits.requests_per_minute > 0 {
            wait_s = wait_s.max(account.requests.wait_s(limits.requests_per_minute, 1.0));
        }
        if limits.tokens_per_minute > 0 {
            wait_s = wait_s.max(account.tokens.wait_s(limits.tokens_per_minute, tokens));
        }
        if limits.parallel > 0 && account.active.load(Relaxed) >= limits.parallel {
            wait_s = wait_s.max(1.0);
        }
        let outcome = if wait_s > 0.0 {
            Err(wait_s.ceil() as u32)
        } else {
            account.requests.left -= 1.0;
            account.tokens.left -= tokens;
            account.active.fetch_add(1, Relaxed);
            Ok(Some(Permit(account.active.clone())))
        };
        Verdict {
            fields: fields(api, limits, account),
            outcome,
        }
    }

    /// Looks a prompt up in the endpoint's cache and stores it there; returns its cached tokens.
    pub fn look_up(&self, endpoint: usize, prompt: &[u8], behaviour: &Behaviour) -> u64 {
        if behaviour.cache_blocks == 0 {
            return 0;
        }
        let mut caches = self.caches.lock().unwrap_or_else(PoisonError::into_inner);
        let hits = caches
            .entry(endpoint)
            .or_default()
            .look_up(prompt, behaviour.cache_blocks);
        hits as u64 * BLOCK_TOKENS
    }
}

/// Providers' own header fields: platform.openai.com/docs/guides/rate-limits, docs.anthropic.com/en/api/rate-limits.
fn fields(api: Api, limits: ProviderLimits, account: &Account) -> String {
    let mut fields = String::new();
    let mut line = |kind: &str, limit: u32, bucket: &Bucket| {
        if limit == 0 {
            return;
        }
        let (left, reset_s) = (
            bucket.left.max(0.0) as u64,
            bucket.wait_s(limit, f64::from(limit)),
        );
        match api {
            Api::Messages => fields.push_str(&format!(
                "anthropic-ratelimit-{kind}-limit: {limit}\r\nanthropic-ratelimit-{kind}-remaining: {left}\r\n\
                 anthropic-ratelimit-{kind}-reset: {}\r\n",
                rfc3339(unix_s() + reset_s.ceil() as u64)
            )),
            Api::Gemini | Api::GeminiArray => {}
            _ => fields.push_str(&format!(
                "x-ratelimit-limit-{kind}: {limit}\r\nx-ratelimit-remaining-{kind}: {left}\r\nx-ratelimit-reset-{kind}: {reset_s:.3}s\r\n"
            )),
        }
    };
    line("requests", limits.requests_per_minute, &account.requests);
    line("tokens", limits.tokens_per_minute, &account.tokens);
    fields
}

/// The wall clock, for fields that clients expect to be plausible.
#[allow(clippy::disallowed_methods)] // the harness has no clock module, and nothing is timed with this
pub fn unix_s() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// A time in seconds since 1970 as Anthropic tells it: `2026-11-21T17:40:00Z`.
fn rfc3339(unix_s: u64) -> String {
    let (days, second) = (unix_s / 86_400, unix_s % 86_400);
    // Days since the first of March of the year 0, in eras of 400 years: leap days then stand at the years' ends.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

/// Prefixes that were seen lately, each known by the hash of all its bytes.
#[derive(Debug, Default)]
struct PrefixCache {
    /// When each was used last, as a number that grows.
    used: HashMap<u64, u64>,
    /// The order of use; entries that `used` does not confirm are stale.
    order: VecDeque<(u64, u64)>,
    clock: u64,
}

impl PrefixCache {
    /// Blocks at the prompt's start that were there; all of the prompt's whole blocks are afterwards.
    fn look_up(&mut self, prompt: &[u8], blocks_max: usize) -> usize {
        let mut hash = 0xCBF2_9CE4_8422_2325_u64;
        let mut hits = 0;
        let mut missed = false;
        for block in prompt.chunks_exact(BLOCK_BYTES) {
            // FNV-1a over words: a prefix's hash goes on from that of the one before.
            for word in block.chunks_exact(8) {
                let word = word.iter().fold(0_u64, |word, byte| word << 8 | u64::from(*byte));
                hash = (hash ^ word).wrapping_mul(0x0100_0000_01B3).rotate_left(23);
            }
            missed |= !self.used.contains_key(&hash);
            hits += usize::from(!missed);
            self.clock += 1;
            self.used.insert(hash, self.clock);
            self.order.push_back((hash, self.clock));
        }
        self.evict(blocks_max);
        hits
    }

    fn evict(&mut self, blocks_max: usize) {
        while self.used.len() > blocks_max || self.order.len() > 4 * blocks_max + 1024 {
            let Some((hash, used)) = self.order.pop_front() else {
                return;
            };
            if self.used.get(&hash) == Some(&used) {
                if self.used.len() > blocks_max {
                    self.used.remove(&hash);
                } else {
                    // Still in use: only its stale entries are to go.
                    self.order.push_back((hash, used));
                    self.order
                        .retain(|(hash, used)| self.used.get(hash) == Some(used));
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_dates() {
        for (unix_s, date) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_795_282_800, "2026-11-21T17:40:00Z"),
            (4_102_444_799, "2099-12-31T23:59:59Z"),
        ] {
            assert_eq!(rfc3339(unix_s), date);
        }
    }

    #[test]
    fn prefixes_hit_as_far_as_they_are_equal() {
        let mut cache = PrefixCache::default();
        let mut prompt: Vec<u8> = (0..BLOCK_BYTES * 4).map(|index| (index / 7) as u8).collect();
        assert_eq!(cache.look_up(&prompt, 100), 0);
        assert_eq!(cache.look_up(&prompt, 100), 4);
        prompt[BLOCK_BYTES * 2 + 5] ^= 1;
        assert_eq!(cache.look_up(&prompt, 100), 2);
        // What lies behind a miss is none: its prefix is another one.
        assert_eq!(cache.look_up(&prompt[BLOCK_BYTES..], 100), 0);
    }

    #[test]
    fn a_full_cache_forgets_the_oldest_and_stays_bounded() {
        let mut cache = PrefixCache::default();
        let prompt = |seed: u8| vec![seed; BLOCK_BYTES * 4];
        for seed in 0..10 {
            cache.look_up(&prompt(seed), 8);
        }
        assert_eq!(cache.used.len(), 8);
        assert_eq!(
            (cache.look_up(&prompt(0), 8), cache.look_up(&prompt(9), 8)),
            (0, 4)
        );
        for _ in 0..10_000 {
            cache.look_up(&prompt(9), 8);
        }
        assert!(cache.order.len() <= 4 * 8 + 1024 + 4, "{}", cache.order.len());
    }

    #[test]
    fn limits_refuse_and_refill() {
        let provider = Provider::default();
        let limits = ProviderLimits {
            requests_per_minute: 2,
            tokens_per_minute: 1000,
            parallel: 0,
        };
        let admit = |now_s: u64| provider.admit(0, "m", Api::Chat, limits, 100, now_s * 1_000_000_000);
        assert!(admit(0).outcome.is_ok() && admit(0).outcome.is_ok());
        let refused = admit(0);
        assert_eq!(refused.outcome.err(), Some(30));
        assert!(
            refused.fields.contains("x-ratelimit-remaining-requests: 0\r\n"),
            "{}",
            refused.fields
        );
        assert!(
            refused.fields.contains("x-ratelimit-remaining-tokens: 800\r\n"),
            "{}",
            refused.fields
        );
        assert!(admit(30).outcome.is_ok());
        let one = ProviderLimits {
            parallel: 1,
            ..ProviderLimits::default()
        };
        let first = provider.admit(0, "n", Api::Messages, one, 1, 0);
        assert!(provider.admit(0, "n", Api::Messages, one, 1, 0).outcome.is_err());
        drop(first);
        assert!(provider.admit(0, "n", Api::Messages, one, 1, 0).outcome.is_ok());
    }

    #[test]
    fn names_without_end_are_forgotten_or_refused() {
        let provider = Provider::default();
        let limits = ProviderLimits {
            requests_per_minute: 5,
            ..ProviderLimits::default()
        };
        let admit = |model: usize, now_s: u64| {
            let verdict = provider.admit(0, &model.to_string(), Api::Chat, limits, 1, now_s * 1_000_000_000);
            verdict.outcome
        };
        let under_way = admit(0, 0);
        assert!(matches!(under_way, Ok(Some(_))));
        for model in 1..ACCOUNTS_MAX {
            assert!(admit(model, 0).is_ok());
        }
        assert_eq!(
            admit(ACCOUNTS_MAX, 1).err(),
            Some(60),
            "no more of them within the minute"
        );
        assert!(admit(1, 1).is_ok(), "who is known is served");
        assert!(admit(ACCOUNTS_MAX, 60).is_ok(), "a minute fills every bucket");
        // The call under way, the one that came in the first second, and the newest.
        assert_eq!(provider.accounts.lock().unwrap().len(), 3);
    }
}
