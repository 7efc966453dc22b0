//! Providers and models.

use std::{
    collections::{BTreeMap, HashMap},
    iter,
};

use super::{DAY, MILLISECOND, hint, name, quote, root, span, unique_names};
use crate::config::{
    Config, Endpoint,
    defaults::{ENDPOINTS_MAX, TARGETS_MAX},
    load::Report,
    parse_endpoint,
    schema::{Model, Provider, Timeouts},
    tls,
    tree::Path,
    units::Span,
};

pub(super) fn providers(config: &Config, report: &mut Report<'_>) {
    for (text, provider) in &config.providers {
        let path = root("providers").name(text);
        name(&path, text, report);
        endpoints(&path.name("endpoints"), provider, report);
        if let Some(Err(message)) = provider.ca.as_deref().map(tls::authorities) {
            report.error(&path.name("ca"), message);
        }
    }
}

fn endpoints(path: &Path, provider: &Provider, report: &mut Report<'_>) {
    if provider.endpoints.is_empty() && report.is_written(path) {
        report.warning(path, "the list is empty: https://api.openai.com is used");
    }
    if provider.endpoints.len() > ENDPOINTS_MAX {
        let count = provider.endpoints.len();
        report.error(path, format!("{count} endpoints; the most is {ENDPOINTS_MAX}"));
    }
    let mut first: HashMap<Endpoint, usize> = HashMap::new();
    for (index, text) in provider.endpoints.iter().enumerate() {
        let path = path.index(index);
        let endpoint = match parse_endpoint(text) {
            Ok(endpoint) => endpoint,
            Err(message) => {
                report.error(&path, message);
                continue;
            }
        };
        if endpoint.prefix.ends_with("/v1") {
            report.warning(
                &path,
                "the prefix ends with /v1, which the gateway adds itself: requests go to /v1/v1/…",
            );
        }
        match first.get(&endpoint) {
            Some(other) => report.error(&path, format!("the same endpoint as [{other}]")),
            None => drop(first.insert(endpoint, index)),
        }
    }
}

pub(super) fn models(config: &Config, report: &mut Report<'_>) {
    unique_names(
        "models",
        config.models.iter().map(|model| model.name.as_str()),
        report,
    );
    if config.models.is_empty() {
        report.warning(
            &Path::default(),
            "no `models`: there is nothing that a client can ask for",
        );
    }
    for (index, model) in config.models.iter().enumerate() {
        let path = root("models").index(index);
        targets(&path.name("targets"), model, &config.providers, report);
        timeouts(&path.name("timeouts"), &model.timeouts, report);
    }
}

fn targets(path: &Path, model: &Model, providers: &BTreeMap<String, Provider>, report: &mut Report<'_>) {
    if model.targets.is_empty() {
        report.error(path, "a model needs at least one target");
        return;
    }
    if model.targets.len() > TARGETS_MAX {
        let count = model.targets.len();
        report.error(path, format!("{count} targets; the most is {TARGETS_MAX}"));
    }
    if model.targets.iter().all(|target| target.weight == 0) {
        report.error(path, "every target has weight 0: none would take a request");
    }
    for (index, target) in model.targets.iter().enumerate() {
        let path = path.index(index);
        if !providers.contains_key(&target.provider) {
            let names = providers.keys().map(String::as_str);
            let message = format!(
                "unknown provider {}{}",
                quote(&target.provider),
                hint(&target.provider, names)
            );
            report.error(&path.name("provider"), message);
        }
        if let Some(text) = &target.model {
            name(&path.name("model"), text, report);
        }
    }
}

fn timeouts(path: &Path, timeouts: &Timeouts, report: &mut Report<'_>) {
    let parts: [(&str, Span); 3] = [
        ("connect", timeouts.connect),
        ("first_token", timeouts.first_token),
        ("idle", timeouts.idle),
    ];
    for (text, value) in parts.into_iter().chain(iter::once(("total", timeouts.total))) {
        span(&path.name(text), value, MILLISECOND, DAY, report);
    }
    // A default that is longer than a short total does no harm: the total ends the request.
    for (text, value) in parts {
        let path_of_part = path.name(text);
        let written = report.is_written(&path_of_part);
        if written && value > timeouts.total {
            let message = format!("{value} is longer than `total`, which is {}", timeouts.total);
            report.error(&path_of_part, message);
        }
    }
}
