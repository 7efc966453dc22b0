//! The list prices that are built in: `list.csv`, made by `refresh.sh`.

use std::{collections::HashMap, sync::LazyLock};

use super::{Price, Rates, SIZE_OVER_TOKENS, nano_dollars};

const TEXT: &str = include_str!("list.csv");

/// The day of the prices, as it stands in the file's first line.
pub const DATE: &str = "2026-11-21";

/// Lines by provider and model; a line is read when its price is asked for.
static LINES: LazyLock<HashMap<(&str, &str), &str>> = LazyLock::new(|| {
    TEXT.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            let (provider, rest) = line.split_once(',')?;
            let (model, prices) = rest.split_once(',')?;
            Some(((provider, model), prices))
        })
        .collect()
});

/// Hosts of the providers in the list; a name that begins with `.` or `-` stands for all that end so.
const HOSTS: [(&str, &str); 19] = [
    ("api.anthropic.com", "anthropic"),
    (".openai.azure.com", "azure"),
    (".cognitiveservices.azure.com", "azure"),
    (".services.ai.azure.com", "azure"),
    (".amazonaws.com", "bedrock"),
    ("api.cerebras.ai", "cerebras"),
    ("api.cohere.com", "cohere"),
    ("api.cohere.ai", "cohere"),
    ("api.deepseek.com", "deepseek"),
    ("api.fireworks.ai", "fireworks"),
    ("generativelanguage.googleapis.com", "gemini"),
    ("api.groq.com", "groq"),
    ("api.mistral.ai", "mistral"),
    ("api.openai.com", "openai"),
    ("api.perplexity.ai", "perplexity"),
    ("api.together.xyz", "together"),
    ("api.together.ai", "together"),
    ("aiplatform.googleapis.com", "vertex"),
    ("api.x.ai", "xai"),
];

/// The list's name of whoever serves at a host.
pub fn vendor_of_host(host: &str) -> Option<&'static str> {
    let host = host.to_ascii_lowercase();
    let fits = |known: &str| {
        host == known
            || known.starts_with('.') && host.ends_with(known)
            // Vertex has a host for each region: `us-central1-aiplatform.googleapis.com`.
            || known.starts_with("aiplatform") && host.ends_with(&format!("-{known}"))
    };
    HOSTS
        .iter()
        .find(|(known, _)| fits(known))
        .map(|(_, vendor)| *vendor)
}

/// Whether the list has prices of a vendor of this name.
pub fn has_vendor(name: &str) -> bool {
    LINES.keys().any(|(vendor, _)| *vendor == name)
}

/// The names of all vendors, in their order.
pub fn vendors() -> Vec<&'static str> {
    let mut names: Vec<&str> = LINES.keys().map(|(vendor, _)| *vendor).collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// All vendors and models, in their order.
pub fn all() -> Vec<(&'static str, &'static str)> {
    let mut all: Vec<_> = LINES.keys().copied().collect();
    all.sort_unstable();
    all
}

/// The list price of a model. A fine-tuned one (`ft:gpt-4.1-2025-04-14:org:name:id`) has its base's own.
pub fn find(vendor: &str, model: &str) -> Option<Price> {
    if let Some(line) = LINES.get(&(vendor, model)) {
        return read(line);
    }
    let base = model.strip_prefix("ft:")?.split(':').next()?;
    let name = &model[..3 + base.len()];
    read(LINES.get(&(vendor, name))?)
}

/// Reads the prices of a line.
fn read(line: &str) -> Option<Price> {
    let mut columns = [None; 14];
    for (column, text) in columns.iter_mut().zip(line.split(',')) {
        if !text.is_empty() {
            *column = Some(nano_dollars(text).ok()?);
        }
    }
    let [
        input,
        output,
        cached,
        write_5m,
        write_1h,
        over_input,
        over_output,
        over_cached,
        ..,
    ] = columns;
    let base = Rates::new(input?, output.unwrap_or(0), cached, write_5m, write_1h);
    let tier = |place: usize| match (columns[place], columns[place + 1]) {
        (None, None) => None,
        (input, output) => {
            Some(base.scaled(input.unwrap_or(base.input), output.unwrap_or(base.output), None))
        }
    };
    let over = match (over_input, over_output) {
        (None, None) => None,
        (input, output) => Some(base.scaled(
            input.unwrap_or(base.input),
            output.unwrap_or(base.output),
            over_cached,
        )),
    };
    Some(Price {
        base,
        over: over.map(|rates| (SIZE_OVER_TOKENS, rates)),
        priority: tier(8),
        flex: tier(10),
        batch: tier(12),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_read_and_its_date_is_the_one_that_is_told() {
        assert!(TEXT.lines().next().unwrap().contains(DATE));
        let lines = TEXT.lines().filter(|line| !line.starts_with('#')).count();
        assert_eq!(LINES.len(), lines, "a line that stands twice");
        for (vendor, model) in all() {
            assert!(find(vendor, model).is_some(), "{vendor} {model}");
        }
    }

    #[test]
    fn vendors_are_known_by_their_hosts() {
        for (host, vendor) in [
            ("api.openai.com", Some("openai")),
            ("API.OpenAI.com", Some("openai")),
            ("mine.openai.azure.com", Some("azure")),
            ("us-east1-aiplatform.googleapis.com", Some("vertex")),
            ("api.openai.com.evil.example", None),
            ("xapi.openai.com", None),
        ] {
            assert_eq!(vendor_of_host(host), vendor, "{host}");
        }
        for (_, vendor) in HOSTS {
            assert!(has_vendor(vendor), "{vendor}");
        }
    }

    #[test]
    fn a_fine_tuned_model_has_the_price_of_its_kind() {
        assert_eq!(
            find("openai", "ft:gpt-4o-2024-08-06:acme:x:1"),
            find("openai", "ft:gpt-4o-2024-08-06")
        );
        assert_eq!(find("openai", "gpt-unknown"), None);
        assert_eq!(find("openai", "ft:gpt-unknown:x"), None);
    }
}
