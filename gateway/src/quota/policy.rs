//! Limit policies: which of them bind a request, and which level of each.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use jiff::tz::TimeZone;

use super::{
    calendar::{Calendar, Part},
    identity::{mix, of_client, of_name},
    levels::Shelf,
    rule::{Rule, Unit},
    window::Window,
};
use crate::config::{
    Config,
    schema::{Limit, Match, Per, WindowKind},
    units::Span,
};

mod matcher;

use matcher::Matcher;

/// Whose request it is, as limits know them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ids {
    pub key: u64,
    /// 0 for none.
    pub team: u64,
    /// 0 for none.
    pub organization: u64,
}

impl Ids {
    /// Of names; the empty one stands for none.
    pub fn new(key: &str, team: &str, organization: &str) -> Ids {
        Ids {
            key: of_name(key),
            team: of_name(team),
            organization: of_name(organization),
        }
    }
}

/// A request as policies look at it.
pub struct Facts<'a> {
    pub ids: Ids,
    /// Empty where the request names none.
    pub user: &'a str,
    /// The virtual model.
    pub model: &'a str,
    pub path: &'a str,
    pub client: IpAddr,
    /// Values of the request's headers, by name.
    pub header: &'a dyn Fn(&str) -> Option<&'a [u8]>,
    /// The key's own limits.
    pub own: &'a [Arc<Rule>],
}

/// The subjects of a request, as far as policies count by them.
#[derive(Debug, Clone, Copy)]
pub struct Subjects {
    pub ids: Ids,
    pub(super) user: u64,
    pub(super) model: u64,
    pub(super) client: u64,
}

/// A policy, ready to be asked.
#[derive(Debug)]
pub struct Policy {
    pub rule: Rule,
    /// What it matches, as the configuration has it.
    pub described: Match,
    pub(super) matches: Matcher,
    per: Vec<Per>,
}

/// All policies of a configuration, in its order.
#[derive(Debug, Default)]
pub struct Policies {
    all: Vec<Policy>,
    /// Places of those that name no key, team or organization, and of those that do: so that a request looks at its own
    /// only, however many keys have limits of their own.
    general: Vec<u32>,
    by_key: HashMap<u64, Vec<u32>>,
    by_team: HashMap<u64, Vec<u32>>,
    by_organization: HashMap<u64, Vec<u32>>,
    /// Whether any counts by user or client.
    counts_users: bool,
    /// Whether any counts by model.
    counts_models: bool,
    /// Names of the headers that any looks at.
    headers: Vec<Box<str>>,
}

impl Policies {
    /// Compiles the limits of a valid configuration.
    pub fn new(config: &Config) -> Policies {
        let mut policies = Policies::default();
        let mut places = HashMap::new();
        for (index, limit) in config.limits.iter().enumerate() {
            for (unit, amount) in amounts(limit) {
                policies.add(policy(limit, index, unit, amount, &mut places));
            }
        }
        policies
    }

    fn add(&mut self, policy: Policy) {
        let index = self.all.len() as u32;
        let matches = &policy.matches;
        if let Some((name, _)) = &matches.header
            && !self.headers.contains(name)
        {
            self.headers.push(name.clone());
        }
        let list = match (matches.key, matches.team, matches.organization) {
            (Some(key), ..) => self.by_key.entry(key).or_default(),
            (_, Some(team), _) => self.by_team.entry(team).or_default(),
            (.., Some(organization)) => self.by_organization.entry(organization).or_default(),
            _ => &mut self.general,
        };
        list.push(index);
        self.counts_users |= policy
            .per
            .iter()
            .any(|per| matches!(per, Per::User | Per::Client));
        self.counts_models |= policy.per.contains(&Per::Model);
        self.all.push(policy);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Names of the headers that policies look at; few.
    pub fn headers(&self) -> &[Box<str>] {
        &self.headers
    }

    /// The policy at a place.
    pub fn get(&self, place: u32) -> &Policy {
        &self.all[place as usize]
    }

    /// The places of all that bind a request, in their order. Those that ask for a provider are among them, whatever
    /// it is.
    pub fn of<'p>(&'p self, facts: &'p Facts<'_>) -> impl Iterator<Item = u32> + 'p {
        self.of_ids(facts.ids)
            .filter(|&place| self.get(place).matches.fits(facts))
    }

    /// The places of those that may bind requests of a key, in their order.
    pub(super) fn of_ids(&self, ids: Ids) -> impl Iterator<Item = u32> {
        fn list(map: &HashMap<u64, Vec<u32>>, id: u64) -> &[u32] {
            match map.is_empty() || id == 0 {
                true => &[],
                false => map.get(&id).map_or(&[], Vec::as_slice),
            }
        }
        let mut lists = [
            &self.general[..],
            list(&self.by_key, ids.key),
            list(&self.by_team, ids.team),
            list(&self.by_organization, ids.organization),
        ];
        std::iter::from_fn(move || {
            let heads = lists.iter_mut().filter(|list| !list.is_empty());
            let first = heads.min_by_key(|list| list[0])?;
            let (head, rest) = first.split_first()?;
            *first = rest;
            Some(*head)
        })
    }

    /// The subjects of a request.
    pub fn subjects(&self, facts: &Facts<'_>) -> Subjects {
        let (mut user, mut client) = (0, 0);
        if self.counts_users {
            user = of_name(facts.user);
            client = of_client(facts.client);
        }
        Subjects {
            ids: facts.ids,
            user,
            model: if self.counts_models {
                of_name(facts.model)
            } else {
                0
            },
            client,
        }
    }
}

impl Policy {
    /// Whether it can be asked only when a target has been chosen.
    pub fn wants_provider(&self) -> bool {
        self.matches.provider.is_some() || self.per.contains(&Per::Provider)
    }

    /// Whether it concerns requests to a provider.
    pub fn fits_provider(&self, provider: &str) -> bool {
        let wanted = &self.matches.provider;
        wanted
            .as_ref()
            .is_none_or(|wanted| wanted.matches(provider.as_bytes()))
    }

    /// What a request's level is known by.
    pub fn level_id(&self, subjects: &Subjects, provider: &str) -> u64 {
        self.per.iter().fold(self.rule.id, |id, per| {
            let subject = match per {
                Per::Key => subjects.ids.key,
                Per::Team => subjects.ids.team,
                Per::Organization => subjects.ids.organization,
                Per::User => subjects.user,
                Per::Model => subjects.model,
                Per::Provider => of_name(provider),
                Per::Client => subjects.client,
                Per::Shared => 0,
            };
            mix(id, subject)
        })
    }

    /// Who has an own count, for people.
    pub fn per(&self) -> &[Per] {
        &self.per
    }
}

/// The amounts that a limit names.
pub(super) fn amounts(limit: &Limit) -> impl Iterator<Item = (Unit, u64)> {
    let amounts = [
        (Unit::Requests, limit.requests),
        (Unit::InputTokens, limit.input_tokens),
        (Unit::OutputTokens, limit.output_tokens),
        (Unit::Tokens, limit.tokens),
        (Unit::Usd, limit.usd.map(|usd| usd.0)),
        (Unit::Parallel, limit.parallel),
    ];
    let given = amounts.into_iter();
    given.filter_map(|(unit, amount)| Some((unit, amount?.max(1))))
}

fn policy(
    limit: &Limit,
    index: usize,
    unit: Unit,
    amount: u64,
    places: &mut HashMap<String, usize>,
) -> Policy {
    let per_client = |per: &Per| matches!(per, Per::User | Per::Client);
    let by_clients = limit.per.0.iter().any(per_client);
    let shelf = match unit {
        Unit::Parallel => Shelf::Parallel,
        _ if by_clients => Shelf::Guests,
        _ => Shelf::Own,
    };
    let name = match &limit.name {
        Some(name) => name.as_str().into(),
        None => format!("limits[{index}]").into(),
    };
    let window = match unit {
        Unit::Parallel => Window::Parallel,
        _ => window(limit.window, limit.every, limit.time_zone.as_deref()),
    };
    let mut rule = Rule::new(name, unit, amount, window, identity(limit, unit, places), shelf);
    rule.by_clients = by_clients;
    rule.on_exhausted = limit.on_exhausted;
    rule.unpriced = limit.unpriced;
    Policy {
        rule,
        described: limit.matches.clone(),
        matches: Matcher::new(&limit.matches),
        per: limit.per.0.clone(),
    }
}

/// A policy is known by its name or else by what it matches, and by its window, not by its amount or its place: changing the
/// amount keeps what is used up. Policies that are alike in all that are told apart by their order, which `places`
/// counts: two of them on one level would each pay for the other.
fn identity(limit: &Limit, unit: Unit, places: &mut HashMap<String, usize>) -> u64 {
    let what = match &limit.name {
        Some(name) => format!("name {name}"),
        None => format!("match {:?}", limit.matches),
    };
    let mut identity = format!(
        "{what} {:?} {:?} {:?} {:?} {:?}",
        limit.per.0, limit.window, limit.time_zone, limit.every, unit
    );
    let place = places.entry(identity.clone()).or_default();
    identity.push_str(&format!(" {place}"));
    *place += 1;
    of_name(&identity)
}

/// The window of a valid configuration.
pub fn window(kind: WindowKind, every: Option<Span>, zone: Option<&str>) -> Window {
    let every = every.unwrap_or(Span::secs(60));
    let ns = every.0.as_nanos() as u64;
    match (kind, part(every)) {
        (WindowKind::Bucket, _) => Window::Bucket { ns },
        (WindowKind::Calendar, Some(part)) => {
            // What is no zone has been reported.
            let zone = zone
                .and_then(|name| TimeZone::get(name).ok())
                .unwrap_or(TimeZone::UTC);
            Window::Calendar(Arc::new(Calendar::new(part, zone)))
        }
        (WindowKind::Sliding | WindowKind::Calendar, _) => Window::Sliding { ns },
    }
}

/// The part of the calendar that a span stands for.
pub fn part(every: Span) -> Option<Part> {
    match every.0.as_secs() {
        3_600 => Some(Part::Hour),
        86_400 => Some(Part::Day),
        604_800 => Some(Part::Week),
        2_592_000 => Some(Part::Month),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{matcher::Glob, *};
    use proptest::prelude::*;
    use std::path::Path;

    fn policies(limits: &str) -> Policies {
        let text = format!(
            "listeners: [{{ address: 127.0.0.1:0 }}]\nproviders: {{ p: {{ kind: openai }} }}\n\
            models: [{{ name: m, targets: [{{ provider: p }}] }}]\nteams: [{{ name: t }}]\nlimits:\n{limits}"
        );
        let config = crate::config::parse(&text, "test", Path::new("/"), &|_| None)
            .unwrap_or_else(|errors| panic!("{errors}"));
        Policies::new(&config)
    }

    fn facts<'a>(key: &str, team: &str, model: &'a str) -> Facts<'a> {
        Facts {
            ids: Ids::new(key, team, ""),
            user: "",
            model,
            path: "/v1/chat/completions",
            client: IpAddr::from([192, 0, 2, 7]),
            header: &|_| None,
            own: &[],
        }
    }

    fn names(policies: &Policies, facts: &Facts<'_>) -> Vec<String> {
        let of = policies.of(facts);
        of.map(|place| policies.get(place).rule.name.to_string())
            .collect()
    }

    #[test]
    fn all_that_match_apply_in_their_order() {
        let policies = policies(
            "  - { match: { key: a }, requests: 1, every: 1m }\n  - { match: { team: t }, requests: 1, every: 1m }\n\
             \x20 - { match: { model: m }, requests: 1, every: 1m }\n  - { match: { user: 'x*' }, requests: 1, every: 1m }\n\
             \x20 - { name: named, match: { client: [192.0.2.0/24], path: '*/completions' }, requests: 1, every: 1m }\n\
             \x20 - { match: { header: { name: x-tier, value: gold } }, requests: 1, every: 1m }\n\
             \x20 - { match: { key: a, team: t }, requests: 1, every: 1m }",
        );
        assert_eq!(
            names(&policies, &facts("a", "", "m")),
            ["limits[0]", "limits[2]", "named"]
        );
        let own = ["limits[0]", "limits[1]", "limits[2]", "named", "limits[6]"];
        assert_eq!(names(&policies, &facts("a", "t", "m")), own);
        let mut other = facts("b", "", "other");
        other.user = "xavier";
        other.client = IpAddr::from([198, 51, 100, 1]);
        other.header = &|name| (name == "x-tier").then_some(b"gold");
        assert_eq!(names(&policies, &other), ["limits[3]", "limits[5]"]);
    }

    #[test]
    fn subjects_have_levels_of_their_own() {
        let policies = policies(
            "  - { requests: 1, every: 1m }\n  - { per: shared, requests: 1, every: 1m }\n\
             \x20 - { per: [team, user], requests: 1, every: 1m }",
        );
        let id = |place: u32, key: &str, team: &str, user: &str| {
            let facts = Facts {
                user,
                ..facts(key, team, "m")
            };
            policies.get(place).level_id(&policies.subjects(&facts), "")
        };
        assert_ne!(id(0, "a", "", ""), id(0, "b", "", ""));
        assert_eq!(id(1, "a", "", ""), id(1, "b", "", ""));
        assert_eq!(id(2, "a", "t", "u"), id(2, "b", "t", "u"));
        assert_ne!(id(2, "a", "t", "u"), id(2, "a", "t", "v"));
        assert_ne!(id(2, "a", "t", "u"), id(2, "a", "w", "u"));
        assert_eq!(policies.get(2).rule.shelf, Shelf::Guests);
    }

    #[test]
    fn an_identity_outlives_amounts_and_places() {
        let id = |limits: &str, place: u32| policies(limits).get(place).rule.id;
        let before = id("  - { requests: 1, every: 1m }", 0);
        assert_eq!(id("  - { requests: 9, every: 1m }", 0), before);
        assert_eq!(
            id("  - { tokens: 9, every: 1h }\n  - { requests: 9, every: 1m }", 1),
            before
        );
        assert_ne!(id("  - { requests: 1, every: 1h }", 0), before);
        assert_ne!(
            id(
                "  - { requests: 9, every: 1m }\n  - { requests: 9, every: 1m }",
                1
            ),
            before
        );
        let named = id("  - { name: n, requests: 1, every: 1m }", 0);
        assert_eq!(
            id("  - { name: n, match: { model: m }, requests: 1, every: 1m }", 0),
            named
        );
    }

    #[test]
    fn globs() {
        for (pattern, text, fits) in [
            ("abc", "abc", true),
            ("abc", "abcd", false),
            ("a*", "a", true),
            ("*", "", true),
            ("a*c*e", "abcde", true),
            ("a*c*e", "abcd", false),
            ("*b*b", "abab", true),
            ("", "", true),
            ("", "x", false),
            ("**a", "bba", true),
        ] {
            assert_eq!(
                Glob::new(pattern).matches(text.as_bytes()),
                fits,
                "{pattern} {text}"
            );
        }
    }

    proptest! {
        #[test]
        fn a_glob_is_what_it_says(pattern in "[ab*]{0,8}", text in "[ab]{0,10}") {
            fn slow(pattern: &[u8], text: &[u8]) -> bool {
                match pattern.split_first() {
                    None => text.is_empty(),
                    Some((b'*', rest)) => (0..=text.len()).any(|n| slow(rest, &text[n..])),
                    Some((byte, rest)) => text.first() == Some(byte) && slow(rest, &text[1..]),
                }
            }
            let fits = Glob::new(&pattern).matches(text.as_bytes());
            prop_assert_eq!(fits, slow(pattern.as_bytes(), text.as_bytes()));
        }
    }
}
