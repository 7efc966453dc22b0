//! Which requests a policy counts.

use ipnet::IpNet;

use super::Facts;
use crate::{
    config::schema::Match,
    quota::{identity::of_name, inspect::Given},
};

/// Text in which `*` stands for any text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Glob(Box<str>);

/// What a policy asks of a request; what is absent may be anything.
#[derive(Debug, Default)]
pub struct Matcher {
    pub key: Option<u64>,
    pub team: Option<u64>,
    pub organization: Option<u64>,
    user: Option<Glob>,
    model: Option<Glob>,
    pub provider: Option<Glob>,
    pub header: Option<(Box<str>, Option<Glob>)>,
    path: Option<Glob>,
    client: Option<Vec<IpNet>>,
}

impl Glob {
    /// A pattern.
    pub fn new(pattern: &str) -> Glob {
        Glob(pattern.into())
    }

    /// Whether a text is one of those that the pattern stands for. Time: the product of both lengths at most.
    pub fn matches(&self, text: &[u8]) -> bool {
        let pattern = self.0.as_bytes();
        let (mut at, mut from) = (0, 0);
        // Where to go on when what follows the last star does not fit: the star takes one byte more.
        let mut retry = None;
        while from < text.len() {
            if pattern.get(at) == Some(&b'*') {
                retry = Some((at + 1, from));
                at += 1;
            } else if pattern.get(at) == Some(&text[from]) {
                (at, from) = (at + 1, from + 1);
            } else if let Some((behind, taken)) = retry {
                retry = Some((behind, taken + 1));
                (at, from) = (behind, taken + 1);
            } else {
                return false;
            }
        }
        pattern[at..].iter().all(|&byte| byte == b'*')
    }
}

impl Matcher {
    /// Compiles what the configuration says.
    pub fn new(matches: &Match) -> Matcher {
        let id = |name: &Option<String>| name.as_deref().map(of_name);
        let glob = |pattern: &Option<String>| pattern.as_deref().map(Glob::new);
        Matcher {
            key: id(&matches.key),
            team: id(&matches.team),
            organization: id(&matches.organization),
            user: glob(&matches.user),
            model: glob(&matches.model),
            provider: glob(&matches.provider),
            header: matches
                .header
                .as_ref()
                .map(|header| (header.name.as_str().into(), glob(&header.value))),
            path: glob(&matches.path),
            client: matches.client.clone(),
        }
    }

    /// Whether a request that is as far as described as wanted can be found.
    pub fn may_fit(&self, given: &Given<'_>) -> bool {
        let is = |wanted: Option<u64>, id: u64| wanted.is_none_or(|wanted| wanted == id);
        is(self.key, given.ids.key)
            && is(self.team, given.ids.team)
            && is(self.organization, given.ids.organization)
            && may_read(&self.user, given.user)
            && may_read(&self.model, given.model)
            && may_read(&self.provider, given.provider)
            && may_read(&self.path, given.path)
            && match (&self.client, given.client) {
                (Some(networks), Some(client)) => networks.iter().any(|network| network.contains(&client)),
                _ => true,
            }
    }

    /// Whether all but the provider is as wanted.
    pub fn fits(&self, facts: &Facts<'_>) -> bool {
        let is = |wanted: Option<u64>, id: u64| wanted.is_none_or(|wanted| wanted == id);
        let reads = |wanted: &Option<Glob>, text: &str| may_read(wanted, Some(text));
        is(self.key, facts.ids.key)
            && is(self.team, facts.ids.team)
            && is(self.organization, facts.ids.organization)
            && reads(&self.model, facts.model)
            && reads(&self.user, facts.user)
            && reads(&self.path, facts.path)
            && self.header.as_ref().is_none_or(|(name, wanted)| {
                (facts.header)(name)
                    .is_some_and(|value| wanted.as_ref().is_none_or(|wanted| wanted.matches(value)))
            })
            && self
                .client
                .as_ref()
                .is_none_or(|networks| networks.iter().any(|network| network.contains(&facts.client)))
    }
}

/// Whether a text is as wanted; one that is not given may be anything.
fn may_read(wanted: &Option<Glob>, text: Option<&str>) -> bool {
    match (wanted, text) {
        (Some(wanted), Some(text)) => wanted.matches(text.as_bytes()),
        _ => true,
    }
}
