//! How limits and budgets stand, for people: looks at levels without taking anything.

use std::net::IpAddr;

use super::{
    Levels,
    identity::{of_client, of_name},
    levels::{Moment, Query},
    policy::{Ids, Policies, Policy, Subjects},
    window::{Standing, Window},
};
use crate::config::schema::Per;

/// A request as far as somebody describes it. What is absent may be anything.
#[derive(Debug, Clone, Default)]
pub struct Given<'a> {
    pub ids: Ids,
    pub user: Option<&'a str>,
    /// The virtual model.
    pub model: Option<&'a str>,
    pub provider: Option<&'a str>,
    pub path: Option<&'a str>,
    pub client: Option<IpAddr>,
}

impl Policies {
    /// The places of all that bind some request of those that are described, in their order.
    pub fn of_given<'p>(&'p self, given: &'p Given<'_>) -> impl Iterator<Item = u32> + 'p {
        self.of_ids(given.ids)
            .filter(|&place| self.get(place).matches.may_fit(given))
    }
}

impl Policy {
    /// What the level is known by that such requests share; `None` where they have several.
    pub fn level_of_given(&self, given: &Given<'_>) -> Option<u64> {
        let is_known = |per: &Per| match per {
            Per::Key | Per::Team | Per::Organization | Per::Shared => true,
            Per::User => given.user.is_some(),
            Per::Model => given.model.is_some(),
            Per::Provider => given.provider.is_some(),
            Per::Client => given.client.is_some(),
        };
        let subjects = Subjects {
            ids: given.ids,
            user: given.user.map_or(0, of_name),
            model: given.model.map_or(0, of_name),
            client: given.client.map_or(0, of_client),
        };
        let provider = given.provider.unwrap_or_default();
        self.per()
            .iter()
            .all(is_known)
            .then(|| self.level_id(&subjects, provider))
    }
}

impl Levels {
    /// When nothing of a level will be used up any more, milliseconds of the Unix clock; `None` where time does not
    /// help or nothing is used.
    pub fn resets_at_ms(&self, query: &Query<'_>, standing: &Standing, now: Moment) -> Option<u64> {
        match query.window {
            Window::Calendar(calendar) => Some(calendar.period(now.unix_ms).end_ms),
            Window::Bucket { .. } | Window::Sliding { .. } if standing.reset_ns > 0 => {
                Some(now.unix_ms.saturating_add(standing.reset_ns.div_ceil(1_000_000)))
            }
            _ => None,
        }
    }
}
