//! Budgets: what keys, teams, organizations and the whole gateway may spend, one within the other.
//!
//! A budget is a rule in dollars whose subject is fixed. The configuration file's are replaced at a reload; those made at run
//! time replace the file's for the same subject, take effect with the next request on every core, and are kept by
//! whoever made them ([`crate::control`]): here is only what is in force. Found by subject in a sharded map, so that
//! a change copies one shard and a million keys may have one each.

use std::{collections::HashMap, sync::Arc};

use arc_swap::ArcSwap;
use crossbeam::queue::ArrayQueue;

use super::{
    identity::{mix, of_name},
    levels::{Levels, Moment, Query, Shelf},
    policy::{Ids, part, window},
    rule::{Rule, Unit},
    window::{Standing, Window},
};
use crate::{
    bounds::ALERTS_WAITING_MAX,
    config::{
        Config,
        schema::{self, WindowKind},
    },
};

/// Shards of the map of budgets: with a million budgets a change copies some 4,000 pointers.
const SHARDS: usize = 256;

/// Who has a budget.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Subject {
    Key(String),
    Team(String),
    Organization(String),
    Gateway,
}

/// A budget in force.
#[derive(Debug)]
pub struct Budget {
    pub subject: Subject,
    pub rule: Rule,
    /// Shares at which its alerts are due, per cent, rising.
    alerts: Box<[u16]>,
    /// Made at run time.
    pub at_run_time: bool,
}

/// An alert that is due.
#[derive(Debug, Clone)]
pub struct Alert {
    pub budget: Arc<Budget>,
    /// The share that was reached, per cent.
    pub percent: u16,
    /// What is used for good, nano-dollars.
    pub used: u64,
    /// Of how much, nano-dollars.
    pub amount: u64,
    /// When, milliseconds of the Unix clock.
    pub unix_ms: u64,
}

/// How a budget stands.
#[derive(Debug, Clone)]
pub struct Status {
    pub budget: Arc<Budget>,
    /// Nano-dollars in all.
    pub amount: u64,
    /// Nano-dollars used for good in this period; may be more than the amount: that is debt.
    pub used: u64,
    /// Nano-dollars that running requests of this host hold.
    pub reserved: u64,
    /// When the period ends, milliseconds of the Unix clock; `None` for credit, and where nothing is used.
    pub resets_at_ms: Option<u64>,
    /// Shares at which was told in this period, per cent, rising.
    pub told: Vec<u16>,
    /// How the level stands, with what running requests have reserved.
    pub standing: Standing,
}

/// The part of the word of alerts that counts them; shares are percents, and there are some few.
const TOLD_MASK: u64 = 0xff;

/// All budgets in force.
pub struct Budgets {
    shards: [ArcSwap<HashMap<u64, Slot>>; SHARDS],
    /// The file's, in the order of their subjects.
    of_file: ArcSwap<Vec<Arc<Budget>>>,
    /// Alerts that are due and not yet told.
    alerts: ArrayQueue<Alert>,
}

/// A subject's budgets, of which that of the run time counts where there are both.
#[derive(Debug, Clone, Default)]
struct Slot {
    file: Option<Arc<Budget>>,
    run: Option<Arc<Budget>>,
}

impl Slot {
    fn in_force(&self) -> Option<&Arc<Budget>> {
        self.run.as_ref().or(self.file.as_ref())
    }

    fn is_empty(&self) -> bool {
        self.file.is_none() && self.run.is_none()
    }
}

impl Subject {
    /// What its budget's levels are known by.
    pub fn id(&self) -> u64 {
        match self {
            Subject::Key(name) => of_key(of_name(name)),
            Subject::Team(name) => of_team(of_name(name)),
            Subject::Organization(name) => of_organization(of_name(name)),
            Subject::Gateway => mix(4, 0),
        }
    }

    /// The kind's word: `key`, `team`, `organization` or `gateway`.
    pub fn kind(&self) -> &'static str {
        match self {
            Subject::Key(_) => "key",
            Subject::Team(_) => "team",
            Subject::Organization(_) => "organization",
            Subject::Gateway => "gateway",
        }
    }

    /// The name; empty for the gateway.
    pub fn name(&self) -> &str {
        match self {
            Subject::Key(name) | Subject::Team(name) | Subject::Organization(name) => name,
            Subject::Gateway => "",
        }
    }

    /// Of a kind's word and a name.
    pub fn new(kind: &str, name: &str) -> Option<Subject> {
        Some(match kind {
            "key" => Subject::Key(name.into()),
            "team" => Subject::Team(name.into()),
            "organization" => Subject::Organization(name.into()),
            "gateway" => Subject::Gateway,
            _ => return None,
        })
    }
}

/// `budget of team search`.
impl std::fmt::Display for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Subject::Gateway => f.write_str("budget of the gateway"),
            other => write!(f, "budget of {} {}", other.kind(), other.name()),
        }
    }
}

fn of_key(id: u64) -> u64 {
    mix(1, id)
}

fn of_team(id: u64) -> u64 {
    mix(2, id)
}

fn of_organization(id: u64) -> u64 {
    mix(3, id)
}

impl Budget {
    /// Compiles a valid one.
    pub fn new(subject: Subject, schema: &schema::Budget, at_run_time: bool) -> Budget {
        let (amount, window) = match (schema.credit, schema.usd) {
            (Some(credit), _) => (credit.0, Window::Never),
            (None, usd) => {
                let kind = match schema.every.and_then(part) {
                    Some(_) => WindowKind::Calendar,
                    None => WindowKind::Sliding,
                };
                let amount = usd.map_or(0, |usd| usd.0);
                (amount, window(kind, schema.every, schema.time_zone.as_deref()))
            }
        };
        // Spent credit stays spent when the budget becomes one of periods, and the other way round.
        let kind = u64::from(matches!(window, Window::Never));
        let id = mix(subject.id(), mix(5, kind));
        let mut rule = Rule::new(
            subject.to_string().into(),
            Unit::Usd,
            amount,
            window,
            id,
            Shelf::Own,
        );
        rule.hard = schema.hard;
        rule.on_exhausted = schema.on_exhausted;
        rule.unpriced = schema.unpriced;
        let mut alerts: Vec<u16> = schema.alerts.iter().map(|percent| percent.0).collect();
        alerts.sort_unstable();
        alerts.dedup();
        Budget {
            subject,
            rule,
            alerts: alerts.into(),
            at_run_time,
        }
    }

    /// What its level is asked.
    pub fn query(&self) -> Query<'_> {
        self.rule.query(self.rule.id)
    }

    /// Prepaid credit rather than a sum for each period.
    pub fn is_credit(&self) -> bool {
        matches!(self.rule.window, Window::Never)
    }

    /// Shares at which its alerts are due, per cent, rising.
    pub fn alerts(&self) -> &[u16] {
        &self.alerts
    }
}

impl Default for Budgets {
    fn default() -> Self {
        Budgets {
            shards: std::array::from_fn(|_| ArcSwap::default()),
            of_file: ArcSwap::default(),
            alerts: ArrayQueue::new(ALERTS_WAITING_MAX),
        }
    }
}

impl Budgets {
    /// The budgets that a request must fit into, the innermost first.
    pub fn of(&self, ids: &Ids) -> impl Iterator<Item = Arc<Budget>> {
        let found = |known: bool, id: u64| {
            let slot = known.then(|| self.shard(id).load());
            slot.and_then(|shard| shard.get(&id)?.in_force().cloned())
        };
        [
            found(true, of_key(ids.key)),
            found(ids.team != 0, of_team(ids.team)),
            found(ids.organization != 0, of_organization(ids.organization)),
            found(true, Subject::Gateway.id()),
        ]
        .into_iter()
        .flatten()
    }

    fn shard(&self, id: u64) -> &ArcSwap<HashMap<u64, Slot>> {
        &self.shards[(id >> 56) as usize % SHARDS]
    }

    fn change(&self, id: u64, change: impl Fn(&mut Slot)) {
        self.shard(id).rcu(|shard| {
            let mut shard = HashMap::clone(shard);
            let slot = shard.entry(id).or_default();
            change(slot);
            if slot.is_empty() {
                shard.remove(&id);
            }
            shard
        });
    }

    /// Puts the configuration file's budgets in the place of those that it had before.
    pub fn set_file(&self, config: &Config) {
        let mut of_file: HashMap<u64, Arc<Budget>> = HashMap::new();
        let mut add = |subject: Subject, schema: &Option<schema::Budget>| {
            if let Some(schema) = schema {
                of_file.insert(subject.id(), Arc::new(Budget::new(subject, schema, false)));
            }
        };
        for key in &config.keys {
            add(Subject::Key(key.name.clone()), &key.budget);
        }
        for team in &config.teams {
            add(Subject::Team(team.name.clone()), &team.budget);
        }
        for organization in &config.organizations {
            add(
                Subject::Organization(organization.name.clone()),
                &organization.budget,
            );
        }
        add(Subject::Gateway, &config.budget);
        let mut sorted: Vec<Arc<Budget>> = of_file.values().cloned().collect();
        sorted.sort_by(|a, b| a.subject.cmp(&b.subject));
        self.of_file.store(Arc::new(sorted));
        for (place, shard) in self.shards.iter().enumerate() {
            shard.rcu(|shard| {
                let mut shard = HashMap::clone(shard);
                for slot in shard.values_mut() {
                    slot.file = None;
                }
                let here = |(id, _): &(&u64, _)| (**id >> 56) as usize % SHARDS == place;
                for (id, budget) in of_file.iter().filter(here) {
                    shard.entry(*id).or_default().file = Some(budget.clone());
                }
                shard.retain(|_, slot| !slot.is_empty());
                shard
            });
        }
    }

    /// Puts a budget of the run time in force, for the next request on every core. What was used under an earlier one of
    /// the same kind stays used.
    pub fn set(&self, subject: Subject, schema: &schema::Budget) -> Arc<Budget> {
        let budget = Arc::new(Budget::new(subject, schema, true));
        self.change(budget.subject.id(), |slot| slot.run = Some(budget.clone()));
        budget
    }

    /// Takes a budget of the run time out of force; the file's, if there is one, counts again. False: there was none.
    pub fn remove(&self, subject: &Subject) -> bool {
        let was = self
            .shard(subject.id())
            .load()
            .get(&subject.id())
            .is_some_and(|slot| slot.run.is_some());
        self.change(subject.id(), |slot| slot.run = None);
        was
    }

    /// Adds credit; the sum of all credit ever given, nano-dollars. `None`: the subject has no credit budget.
    pub fn top_up(&self, subject: &Subject, nano: u64) -> Option<u64> {
        let budget = self.get(subject)?;
        budget.is_credit().then(|| budget.rule.add(nano))
    }

    /// The budget of a subject that is in force.
    pub fn get(&self, subject: &Subject) -> Option<Arc<Budget>> {
        let id = subject.id();
        self.shard(id).load().get(&id)?.in_force().cloned()
    }

    /// A budget as it is in force now, for a request that was admitted a while ago: with the amount that it has been
    /// given since. Where it is none of the same kind any more, the one that the request was admitted by goes on.
    pub fn current(&self, budget: &Arc<Budget>) -> Arc<Budget> {
        let now = self.get(&budget.subject);
        now.filter(|now| now.rule.id == budget.rule.id)
            .unwrap_or_else(|| budget.clone())
    }

    /// All budgets in force, in the order of their subjects.
    pub fn all(&self) -> Vec<Arc<Budget>> {
        let mut all = Vec::new();
        for shard in &self.shards {
            all.extend(shard.load().values().filter_map(Slot::in_force).cloned());
        }
        all.sort_by(|a, b| a.subject.cmp(&b.subject));
        all
    }

    /// The configuration file's budgets in the order of their subjects, those too in whose place one of the run time is.
    pub fn of_file(&self) -> Arc<Vec<Arc<Budget>>> {
        self.of_file.load_full()
    }

    /// Notes alerts that have become due with a settlement. Each share alerts once a period, and of credit once for each
    /// amount that it is topped up to; what was alerted is kept with the levels, so a restart alerts nothing again.
    pub fn note_alerts(&self, budget: &Arc<Budget>, levels: &Levels, now: Moment) {
        if budget.alerts.is_empty() {
            return;
        }
        let query = budget.query();
        let (used, amount) = (levels.settled(&query, now), query.amount);
        let share = u128::from(used) * 100 / u128::from(amount.max(1));
        let due = budget
            .alerts
            .partition_point(|percent| u128::from(*percent) <= share);
        if due == 0 {
            return;
        }
        // How many were told, behind the amount of which they are shares: that of credit only grows.
        let of = match budget.is_credit() {
            true => amount & !TOLD_MASK,
            false => 0,
        };
        let before = levels.raise(&told(&query), of | (due as u64).min(TOLD_MASK), now);
        let before = match before & !TOLD_MASK {
            other if other < of => 0,
            other if other > of => due,
            _ => ((before & TOLD_MASK) as usize).min(due),
        };
        for &percent in &budget.alerts[before..due] {
            // Where the control thread is that far behind, the oldest alert is the least worth.
            self.alerts.force_push(Alert {
                budget: budget.clone(),
                percent,
                used,
                amount,
                unix_ms: now.unix_ms,
            });
        }
    }

    /// The next alert to be told.
    pub fn next_alert(&self) -> Option<Alert> {
        self.alerts.pop()
    }

    /// How a budget stands.
    pub fn status(&self, budget: &Arc<Budget>, levels: &Levels) -> Status {
        let (query, now) = (budget.query(), levels.now());
        let standing = levels.standing(&query, now);
        let told = (levels.settled(&told(&query), now) & TOLD_MASK) as usize;
        Status {
            budget: budget.clone(),
            amount: query.amount,
            used: levels.settled(&query, now),
            reserved: levels.held(&query, now),
            resets_at_ms: levels.resets_at_ms(&query, &standing, now),
            told: budget.alerts[..told.min(budget.alerts.len())].to_vec(),
            standing,
        }
    }
}

/// The level that counts how many of a budget's alerts were told in a period.
fn told<'a>(query: &Query<'a>) -> Query<'a> {
    Query {
        id: mix(query.id, 6),
        overflow_id: mix(query.id, 6),
        amount: u64::MAX,
        hard: false,
        note_held: false,
        ..*query
    }
}
