//! What tokens cost: the operator's own prices, then the built-in list.
//!
//! All money is whole nano-dollars. A price is nano-dollars per million tokens, so that a decimal price with up to nine
//! digits behind the point is exact; a cost is the sum over all kinds of tokens in 128 bits, divided by a million once,
//! half a nano-dollar and more rounded up. Nowhere is a floating point number.

pub mod list;

use std::sync::Arc;

use serde::Serialize;

use crate::{
    config::{
        schema::{self, prices as entries},
        units::Dollars,
    },
    dialect::{Tier, Usage},
};

/// Tokens that the prices are for.
const PER_TOKENS: u128 = 1_000_000;

/// Size of a context, in input tokens, over which providers that tell large contexts apart take their higher price.
pub const SIZE_OVER_TOKENS: u64 = 200_000;

/// Prices of each kind of token, nano-dollars per million.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Rates {
    /// Input that is neither read from the provider's cache nor written to it.
    pub input: u64,
    pub output: u64,
    /// Input read from the cache.
    pub cached: u64,
    /// Input written to the cache for five minutes, and for an hour.
    pub write_5m: u64,
    pub write_1h: u64,
}

impl Rates {
    /// Rates of which some are not named: then cached input costs what other input costs, and so does what is written
    /// to the cache; an hour there costs what five minutes cost.
    pub fn new(
        input: u64,
        output: u64,
        cached: Option<u64>,
        write_5m: Option<u64>,
        write_1h: Option<u64>,
    ) -> Rates {
        let write_5m = write_5m.unwrap_or(input);
        Rates {
            input,
            output,
            cached: cached.unwrap_or(input),
            write_5m,
            write_1h: write_1h.unwrap_or(write_5m),
        }
    }

    /// Rates of another tier or size: what it does not name stands to these rates as its input does, rounded up.
    pub fn scaled(&self, input: u64, output: u64, cached: Option<u64>) -> Rates {
        let scale = |rate: u64| match self.input {
            0 => rate,
            base => {
                let scaled = (u128::from(rate) * u128::from(input)).div_ceil(u128::from(base));
                u64::try_from(scaled).unwrap_or(u64::MAX)
            }
        };
        Rates {
            input,
            output,
            cached: cached.unwrap_or_else(|| scale(self.cached)),
            write_5m: scale(self.write_5m),
            write_1h: scale(self.write_1h),
        }
    }

    fn most(&self, other: &Rates) -> Rates {
        Rates {
            input: self.input.max(other.input),
            output: self.output.max(other.output),
            cached: self.cached.max(other.cached),
            write_5m: self.write_5m.max(other.write_5m),
            write_1h: self.write_1h.max(other.write_1h),
        }
    }
}

/// The price of a model.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Price {
    pub base: Rates,
    /// For requests whose input has more tokens than the number.
    pub over: Option<(u64, Rates)>,
    /// For the tiers other than the default one.
    pub priority: Option<Rates>,
    pub flex: Option<Rates>,
    pub batch: Option<Rates>,
}

impl Price {
    /// A price without tiers.
    pub fn flat(base: Rates) -> Price {
        Price {
            base,
            over: None,
            priority: None,
            flex: None,
            batch: None,
        }
    }

    /// What a request cost, nano-dollars; stops at `u64::MAX`. Output includes reasoning.
    pub fn cost(&self, usage: &Usage) -> u64 {
        let rates = self.rates(usage.tier, usage.prompt);
        let special = [usage.cached, usage.cache_write_5m, usage.cache_write_1h];
        let plain = special
            .iter()
            .fold(usage.prompt, |rest, tokens| rest.saturating_sub(*tokens));
        sum([
            (plain, rates.input),
            (usage.cached, rates.cached),
            (usage.cache_write_5m, rates.write_5m),
            (usage.cache_write_1h, rates.write_1h),
            (usage.completion, rates.output),
        ])
    }

    /// The most that a request of so much input and output can cost, nano-dollars: every token of the input at the
    /// dearest of the input's rates. For reservations.
    pub fn cost_max(&self, input: u64, output: u64, tier: Tier) -> u64 {
        let rates = self.rates(tier, input);
        let dearest = rates
            .input
            .max(rates.cached)
            .max(rates.write_5m)
            .max(rates.write_1h);
        sum([(input, dearest), (output, rates.output)])
    }

    /// The rates of a tier and a size of input. A tier without a price has the default one. Where tier and size both have
    /// one, each kind of token costs the more of the two: no provider's list names the price of both together.
    pub fn rates(&self, tier: Tier, prompt: u64) -> Rates {
        let of_tier = match tier {
            Tier::Default => None,
            Tier::Priority => self.priority,
            Tier::Flex => self.flex,
            Tier::Batch => self.batch,
        };
        let of_size = self
            .over
            .filter(|(tokens, _)| prompt > *tokens)
            .map(|(_, rates)| rates);
        match (of_tier, of_size) {
            (None, None) => self.base,
            (Some(rates), None) | (None, Some(rates)) => rates,
            (Some(tier), Some(size)) => tier.most(&size),
        }
    }
}

/// Tokens times their rates, nano-dollars.
fn sum<const N: usize>(parts: [(u64, u64); N]) -> u64 {
    // 2^64 times 2^64 times five kinds does not fit into 128 bits; providers' figures are bounded by USAGE_TOKENS_MAX.
    let sum = parts.iter().fold(0_u128, |sum, (tokens, rate)| {
        sum.saturating_add(u128::from(*tokens) * u128::from(*rate))
    });
    u64::try_from(sum.saturating_add(PER_TOKENS / 2) / PER_TOKENS).unwrap_or(u64::MAX)
}

/// The prices of one model at one provider over time.
#[derive(Debug, Clone, Default)]
pub struct Tariff {
    /// The first whose time it is counts.
    prices: Vec<Dated>,
}

#[derive(Debug, Clone)]
struct Dated {
    from_unix_ms: u64,
    /// Not included.
    until_unix_ms: u64,
    price: Arc<Price>,
}

impl Tariff {
    /// The price at a time; `None` where nobody knows one.
    pub fn at(&self, unix_ms: u64) -> Option<&Arc<Price>> {
        self.prices
            .iter()
            .find(|dated| (dated.from_unix_ms..dated.until_unix_ms).contains(&unix_ms))
            .map(|dated| &dated.price)
    }

    /// A tariff that never changes.
    pub fn always(price: Price) -> Tariff {
        Tariff {
            prices: vec![Dated {
                from_unix_ms: 0,
                until_unix_ms: u64::MAX,
                price: Arc::new(price),
            }],
        }
    }
}

/// All prices of a configuration.
#[derive(Debug, Clone, Default)]
pub struct Book {
    entries: Vec<entries::Entry>,
    builtin: bool,
}

impl Book {
    /// The prices that a configuration sets.
    pub fn new(config: &schema::Config) -> Book {
        Book {
            entries: config.prices.clone(),
            builtin: config.builtin_prices,
        }
    }

    /// The prices of a provider's model: the operator's entries in their order, then the list's of `vendor`.
    pub fn tariff(&self, provider: &str, vendor: Option<&str>, model: &str) -> Tariff {
        let fits = |entry: &&entries::Entry| {
            let is = |name: &str| glob(&entry.provider, name);
            (is(provider) || vendor.is_some_and(is)) && glob(&entry.model, model)
        };
        let mut prices: Vec<Dated> = self.entries.iter().filter(fits).map(dated).collect();
        let listed = vendor
            .filter(|_| self.builtin)
            .and_then(|vendor| list::find(vendor, model));
        prices.extend(listed.map(|price| Dated {
            from_unix_ms: 0,
            until_unix_ms: u64::MAX,
            price: Arc::new(price),
        }));
        Tariff { prices }
    }

    /// The price of a provider's model at a time, Unix milliseconds.
    pub fn find(
        &self,
        provider: &str,
        vendor: Option<&str>,
        model: &str,
        unix_ms: u64,
    ) -> Option<Arc<Price>> {
        self.tariff(provider, vendor, model).at(unix_ms).cloned()
    }
}

/// Whose list prices a provider of the configuration has: what it says itself, else by the host of its first endpoint,
/// else by its name.
pub fn vendor(name: &str, provider: &schema::Provider) -> Option<String> {
    if let Some(vendor) = &provider.prices {
        return Some(vendor.clone());
    }
    let host = match provider.endpoints.first() {
        Some(url) => crate::config::parse_endpoint(url).ok()?.host,
        None => match provider.kind {
            schema::ProviderKind::Openai => return Some("openai".into()),
        },
    };
    let by_name = || list::has_vendor(name).then_some(name);
    list::vendor_of_host(&host).or_else(by_name).map(str::to_owned)
}

fn dated(entry: &entries::Entry) -> Dated {
    Dated {
        from_unix_ms: entry.from.map_or(0, |date| date.unix_ms()),
        until_unix_ms: entry.until.map_or(u64::MAX, |date| date.unix_ms()),
        price: Arc::new(price(entry)),
    }
}

fn price(entry: &entries::Entry) -> Price {
    let value = |dollars: Option<Dollars>| dollars.map(|dollars| dollars.0);
    let base = Rates::new(
        entry.input.0,
        entry.output.0,
        value(entry.cached_input),
        value(entry.cache_write_5m),
        value(entry.cache_write_1h),
    );
    let part = |part: &Option<entries::Part>| {
        let part = part.as_ref()?;
        let input = part.input.map_or(base.input, |dollars| dollars.0);
        let output = part.output.map_or(base.output, |dollars| dollars.0);
        let mut rates = base.scaled(input, output, value(part.cached_input));
        rates.write_5m = value(part.cache_write_5m).unwrap_or(rates.write_5m);
        rates.write_1h = value(part.cache_write_1h).unwrap_or(rates.write_1h);
        Some(rates)
    };
    Price {
        base,
        over: part(&entry.over_200k).map(|rates| (SIZE_OVER_TOKENS, rates)),
        priority: part(&entry.priority),
        flex: part(&entry.flex),
        batch: part(&entry.batch),
    }
}

/// Whether `text` fits a pattern in which `*` stands for any text.
pub fn glob(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| text.strip_prefix(first)) else {
        return false;
    };
    let Some(last) = parts.next_back() else {
        return rest.is_empty();
    };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

/// Reads a decimal number of dollars as nano-dollars, exactly.
///
/// # Errors
/// Says what an amount looks like.
pub fn nano_dollars(text: &str) -> Result<u64, String> {
    crate::config::units::parse_dollars(text).map(|dollars| dollars.0)
}

#[cfg(test)]
mod tests;
