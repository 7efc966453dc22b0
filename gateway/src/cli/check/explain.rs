//! `gateway check --explain`: which policies and budgets would bind a request.

use std::{collections::BTreeMap, net::IpAddr};

use anyhow::{Context, bail};

use crate::{
    config::{Config, schema::Per},
    dialect::Api,
    quota::{Budgets, Facts, Ids, Policies, Unit, rule::Rule},
};

/// A request, as the words after `--explain` describe it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Described {
    key: String,
    model: String,
    user: String,
    provider: Option<String>,
    path: Option<String>,
    client: Option<IpAddr>,
    /// By name in lower case.
    headers: BTreeMap<String, String>,
}

impl Described {
    fn parse(words: &[String]) -> anyhow::Result<Described> {
        let mut described = Described::default();
        for word in words {
            let (name, value) = word
                .split_once('=')
                .with_context(|| format!("`{word}`: write name=value, for example key=alice"))?;
            match name {
                "key" => described.key = value.into(),
                "model" => described.model = value.into(),
                "user" => described.user = value.into(),
                "provider" => described.provider = Some(value.into()),
                "path" => described.path = Some(value.into()),
                "client" => {
                    let client = value
                        .parse()
                        .with_context(|| format!("`{value}` is no IP address"))?;
                    described.client = Some(client);
                }
                _ => match name.strip_prefix("header.") {
                    Some(header) => {
                        described
                            .headers
                            .insert(header.to_ascii_lowercase(), value.into());
                    }
                    None => bail!(
                        "`{name}` is not known; there are key, model, user, provider, path, client and header.NAME"
                    ),
                },
            }
        }
        Ok(described)
    }
}

/// The lines that explain which policies and budgets bind a request, in the order in which they are asked.
///
/// # Errors
/// Words that describe nothing, or a key or model that the configuration does not have.
pub fn explain(config: &Config, words: &[String]) -> anyhow::Result<Vec<String>> {
    let described = Described::parse(words)?;
    let key = config.keys.iter().find(|key| key.name == described.key);
    if key.is_none() && !described.key.is_empty() {
        bail!("no key `{}` in the configuration", described.key);
    }
    let model = config.models.iter().find(|model| model.name == described.model);
    if model.is_none() && !described.model.is_empty() {
        bail!("no model `{}` in the configuration", described.model);
    }
    let team = key.and_then(|key| key.team.as_deref()).unwrap_or_default();
    let of_team = config.teams.iter().find(|other| other.name == team);
    let organization = of_team
        .and_then(|team| team.organization.as_deref())
        .unwrap_or_default();
    let header = |name: &str| {
        described
            .headers
            .get(&name.to_ascii_lowercase())
            .map(String::as_bytes)
    };
    let user_header = config.limit_state.user_header.as_deref().and_then(header);
    let user = user_header.map(String::from_utf8_lossy);
    let facts = Facts {
        ids: Ids::new(&described.key, team, organization),
        user: user.as_deref().unwrap_or(&described.user),
        model: &described.model,
        path: described.path.as_deref().unwrap_or(Api::ChatCompletions.path()),
        client: described.client.unwrap_or(IpAddr::from([127, 0, 0, 1])),
        header: &header,
        own: &[],
    };
    let providers: Vec<&str> = match (&described.provider, model) {
        (Some(provider), _) => vec![provider],
        (None, Some(model)) => model
            .targets
            .iter()
            .map(|target| target.provider.as_str())
            .collect(),
        (None, None) => Vec::new(),
    };
    let policies = Policies::new(config);
    let (mut first, mut chosen) = (Vec::new(), Vec::new());
    for place in policies.of(&facts) {
        let policy = policies.get(place);
        let line = format!("{}, per {}", describe(&policy.rule), per(policy.per()));
        if !policy.wants_provider() {
            first.push(line);
            continue;
        }
        let fitting: Vec<&str> = providers
            .iter()
            .copied()
            .filter(|name| policy.fits_provider(name))
            .collect();
        if !fitting.is_empty() {
            chosen.push(format!("{line}; when it is sent to {}", fitting.join(", ")));
        }
    }
    let budgets = Budgets::default();
    budgets.set_file(config);
    first.extend(budgets.of(&facts.ids).map(|budget| describe(&budget.rule)));
    first.append(&mut chosen);
    Ok(first)
}

fn describe(rule: &Rule) -> String {
    let soft = if rule.hard { "" } else { ", counts only" };
    let amount = rule.unit.show(rule.amount());
    let what = match rule.unit {
        Unit::Usd => format!("{amount} per {}", rule.every()),
        Unit::Parallel => format!("{amount} requests at a time"),
        unit => format!("{amount} {} per {}", unit.name().replace('_', " "), rule.every()),
    };
    format!("{}: {what}{soft}", rule.name)
}

fn per(per: &[Per]) -> String {
    let words: Vec<String> = per.iter().map(|per| format!("{per:?}").to_lowercase()).collect();
    words.join(" and ")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn lines(words: &[&str]) -> Vec<String> {
        let text = "listeners: [{ address: 127.0.0.1:0 }]\nproviders: { p: { kind: openai }, q: { kind: openai } }\n\
            models: [{ name: m, targets: [{ provider: p }, { provider: q, priority: 1 }] }]\n\
            organizations: [{ name: o }]\nteams: [{ name: t, organization: o, budget: { usd: 5, every: 1mo, hard: false } }]\n\
            keys: [{ name: a, team: t, sha256: 2bd806c97f0e00af1a1fc3328fa763a9269723c8db8fac4f93af71db186d6e90 }]\n\
            limits:\n  - { match: { provider: q }, parallel: 3, per: shared }\n  - { match: { organization: o }, tokens: 10, every: 1m, per: [team, user] }\n\
            \x20 - { name: gold, match: { header: { name: X-Tier, value: 'gold*' } }, usd: 0.5, every: 1d, window: calendar }\n";
        let config = crate::config::parse(text, "test", Path::new("/"), &|_| None).expect("a configuration");
        let words: Vec<String> = words.iter().map(ToString::to_string).collect();
        explain(&config, &words).unwrap_or_else(|error| vec![error.to_string()])
    }

    #[test]
    fn policies_stand_in_the_order_in_which_they_are_asked() {
        assert_eq!(
            lines(&["key=a", "model=m", "header.x-tier=golden"]),
            [
                "limits[1]: 10 tokens per 1m, per team and user",
                "gold: $0.5 per calendar 1d, per key",
                "budget of team t: $5 per calendar 1mo, counts only",
                "limits[0]: 3 requests at a time, per shared; when it is sent to q",
            ]
        );
        assert_eq!(lines(&["model=m", "provider=p"]), Vec::<String>::new());
    }

    #[test]
    fn words_that_say_nothing_are_told() {
        assert_eq!(
            lines(&["alice"]),
            ["`alice`: write name=value, for example key=alice"]
        );
        assert_eq!(lines(&["key=b"]), ["no key `b` in the configuration"]);
        assert!(lines(&["colour=red"])[0].contains("there are key, model"));
    }
}
