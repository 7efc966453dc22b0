use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::config;

const DOLLAR: u64 = 1_000_000_000;

fn book(prices: &str) -> Book {
    let text = format!("listeners: [{{address: '127.0.0.1:1'}}]\n{prices}");
    let config = config::parse(&text, "test", Path::new("/"), &|_| None).expect("a configuration");
    Book::new(&config)
}

fn usage(prompt: u64, cached: u64, completion: u64) -> Usage {
    Usage {
        prompt,
        cached,
        completion,
        ..Usage::default()
    }
}

#[test]
fn the_list_is_in_force_unless_the_operator_says_otherwise() {
    let price = book("").find("x", Some("openai"), "gpt-4.1", 0).unwrap();
    assert_eq!((price.base.input, price.base.output), (2 * DOLLAR, 8 * DOLLAR));
    assert_eq!(book("").find("x", None, "gpt-4.1", 0), None);
    assert_eq!(book("").find("x", Some("openai"), "gpt-none", 0), None);
    assert_eq!(
        book("builtin_prices: false").find("x", Some("openai"), "gpt-4.1", 0),
        None
    );
    let own = book("prices: [{ provider: x, model: 'gpt-4*', input: 1.25, output: '0.1' }]");
    let price = own.find("x", Some("openai"), "gpt-4.1", 0).unwrap();
    assert_eq!(
        (price.base.input, price.base.output),
        (DOLLAR * 5 / 4, DOLLAR / 10)
    );
    assert_eq!(own.find("x", None, "gpt-5", 0), None);
    let by_vendor = book("prices: [{ provider: openai, model: '*', input: 3 }]");
    assert_eq!(
        by_vendor
            .find("x", Some("openai"), "gpt-4.1", 0)
            .unwrap()
            .base
            .input,
        3 * DOLLAR
    );
}

#[test]
fn a_price_holds_from_its_first_day_to_the_day_before_its_last() {
    let book = book(
        "prices:\n  - { model: m, input: 1, until: 2026-01-31 }\n  - { model: m, input: 2, from: 2026-01-31, until: 2026-02-01 }\n",
    );
    let at = |ms: u64| {
        book.find("p", None, "m", ms)
            .map(|price| price.base.input / DOLLAR)
    };
    // 2026-01-31T00:00Z
    const DAY: u64 = 20_484 * 86_400_000;
    assert_eq!(at(0), Some(1));
    assert_eq!(at(DAY - 1), Some(1));
    assert_eq!(at(DAY), Some(2));
    assert_eq!(at(DAY + 86_399_999), Some(2));
    assert_eq!(at(DAY + 86_400_000), None);
}

#[test]
fn each_kind_of_token_has_its_price() {
    let book = book(
        "prices: [{ model: m, input: 3, output: 15, cached_input: 0.3, cache_write_5m: 3.75, cache_write_1h: 6, \
         over_200k: { input: 6, output: 22.5, cached_input: 0.6 }, flex: { input: 1.5, output: 7.5 } }]",
    );
    let price = book.find("p", None, "m", 0).unwrap();
    let mut used = Usage {
        prompt: 1_000_000 / 10,
        cached: 10_000,
        cache_write_5m: 20_000,
        cache_write_1h: 30_000,
        completion: 1000,
        reasoning: 900,
        ..Usage::default()
    };
    // 40,000 plain at 3, 10,000 at 0.3, 20,000 at 3.75, 30,000 at 6, 1000 at 15 dollars a million.
    let expected = 120_000_000 + 3_000_000 + 75_000_000 + 180_000_000 + 15_000_000;
    assert_eq!(price.cost(&used), expected);
    used.tier = Tier::Flex;
    assert_eq!(price.cost(&used), expected / 2);
    used.tier = Tier::Priority;
    assert_eq!(price.cost(&used), expected);
    assert_eq!(price.cost(&usage(200_000, 0, 0)), 600_000_000);
    assert_eq!(price.cost(&usage(200_001, 0, 0)), 1_200_006_000);
    // In the tier that is cheaper the size is not.
    used = Usage {
        tier: Tier::Flex,
        ..usage(300_000, 0, 1000)
    };
    assert_eq!(price.cost(&used), 1_800_000_000 + 22_500_000);
}

#[test]
fn half_a_nano_dollar_is_rounded_up_once() {
    let price = |rate| Price::flat(Rates::new(rate, rate, None, None, None));
    assert_eq!(price(499_999).cost(&usage(1, 0, 0)), 0);
    assert_eq!(price(500_000).cost(&usage(1, 0, 0)), 1);
    // Two kinds of half a nano-dollar less a bit are one together: rounded is the sum.
    assert_eq!(price(499_999).cost(&usage(1, 0, 1)), 1);
    assert_eq!(price(0).cost(&usage(u64::MAX, 0, u64::MAX)), 0);
    assert_eq!(price(u64::MAX).cost(&usage(u64::MAX, 0, u64::MAX)), u64::MAX);
}

#[test]
fn patterns() {
    for (pattern, text, fits) in [
        ("*", "", true),
        ("*", "any", true),
        ("gpt-5*", "gpt-5-mini", true),
        ("gpt-5*", "gpt-4", false),
        ("*-mini", "gpt-5-mini", true),
        ("a*b*c", "a-b-b-c", true),
        ("a*b*c", "acb", false),
        ("ab*ba", "aba", false),
        ("m", "mm", false),
        ("", "", true),
    ] {
        assert_eq!(glob(pattern, text), fits, "{pattern} {text}");
    }
}

proptest! {
    /// The cost against a reference that adds tokens one by one, in picodollars of a token.
    #[test]
    fn the_cost_is_exact(plain in 0..2000_u64, cached in 0..2000_u64, completion in 0..2000_u64,
        input in 0..100_000_000_000_u64, hit in 0..100_000_000_000_u64, output in 0..100_000_000_000_u64) {
        let price = Price::flat(Rates::new(input, output, Some(hit), None, None));
        let cost = price.cost(&usage(plain + cached, cached, completion));
        let exact = u128::from(plain) * u128::from(input) + u128::from(cached) * u128::from(hit)
            + u128::from(completion) * u128::from(output);
        let error = (u128::from(cost) * 1_000_000).abs_diff(exact);
        prop_assert!(error <= 500_000);
    }

    /// What was reserved covers what is billed.
    #[test]
    fn the_most_is_the_most(prompt in 0..300_000_u64, parts in any::<[u16; 3]>(), completion in 0..10_000_u64,
        rates in any::<[u32; 5]>(), tier in 0..4_u8) {
        let [input, output, cached, write_5m, write_1h] = rates.map(u64::from);
        let base = Rates { input, output, cached, write_5m, write_1h };
        let price = Price { base, over: Some((200_000, base.scaled(input * 2, output, None))),
            priority: Some(base.scaled(input * 3, output * 2, None)), flex: None, batch: None };
        let [cached, cache_write_5m, cache_write_1h] = parts.map(|part| u64::from(part).min(prompt / 3));
        let tier = Tier::from_u8(tier).unwrap();
        let usage = Usage { prompt, cached, cache_write_5m, cache_write_1h, completion, tier, ..Usage::default() };
        prop_assert!(price.cost(&usage) <= price.cost_max(prompt, completion, tier));
    }
}
