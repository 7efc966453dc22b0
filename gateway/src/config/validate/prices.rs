//! Prices, and models that have none.

use std::collections::BTreeSet;

use super::{hint, quote, root};
use crate::{
    config::{Config, load::Report, schema::prices::ENTRIES_MAX},
    ledger::prices::{self, Book, list},
    net::clock,
};

pub(super) fn check(config: &Config, report: &mut Report<'_>) {
    let path = root("prices");
    if config.prices.len() > ENTRIES_MAX {
        let count = config.prices.len();
        return report.error(&path, format!("{count} entries; the most is {ENTRIES_MAX}"));
    }
    for (index, entry) in config.prices.iter().enumerate() {
        let path = path.index(index);
        if let (Some(from), Some(until)) = (entry.from, entry.until)
            && from >= until
        {
            report.error(&path.name("until"), "not after `from`: the price never holds");
        }
        let providers = config.providers.keys().map(String::as_str);
        let mut names = providers.chain(list::vendors());
        if !names.any(|name| prices::glob(&entry.provider, name)) {
            let names: BTreeSet<&str> = config.providers.keys().map(String::as_str).collect();
            let message = format!(
                "no provider fits {}{}",
                quote(&entry.provider),
                hint(&entry.provider, names)
            );
            report.warning(&path.name("provider"), message);
        }
    }
    for (name, provider) in &config.providers {
        if let Some(vendor) = provider
            .prices
            .as_deref()
            .filter(|vendor| !list::has_vendor(vendor))
        {
            let message = format!(
                "no list prices of {}{}",
                quote(vendor),
                hint(vendor, list::vendors())
            );
            report.error(&root("providers").name(name).name("prices"), message);
        }
    }
    unpriced(config, report);
}

/// Warns of targets whose price nobody knows: their cost is `null` in the books. Only where money is counted at all, or
/// some target has a price: a fleet of one's own has none.
fn unpriced(config: &Config, report: &mut Report<'_>) {
    let book = Book::new(config);
    let now_unix_ms = clock::unix_ms();
    let mut unpriced = Vec::new();
    let mut any = !config.prices.is_empty();
    for (index, model) in config.models.iter().enumerate() {
        for (place, target) in model.targets.iter().enumerate() {
            let Some(provider) = config.providers.get(&target.provider) else {
                continue;
            };
            let vendor = prices::vendor(&target.provider, provider);
            let name = target.model.as_deref().unwrap_or(&model.name);
            match book.find(&target.provider, vendor.as_deref(), name, now_unix_ms) {
                Some(_) => any = true,
                None => {
                    any |= vendor.is_some();
                    let path = root("models").index(index).name("targets").index(place);
                    unpriced.push((path, target.provider.clone(), name.to_owned()));
                }
            }
        }
    }
    for (path, provider, model) in unpriced.into_iter().filter(|_| any) {
        let message = format!(
            "no price of {} at {} is known: its cost is null in the books; add an entry to `prices`",
            quote(&model),
            quote(&provider)
        );
        report.warning(&path, message);
    }
}
