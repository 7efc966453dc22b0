//! What a request may use, taken from every rule that binds it before it is sent: from all or from none.
//!
//! A reservation belongs to the request's account. It grows while a stream runs and its rules have something left, and
//! is settled exactly once with what was really used. Dropped unsettled it gives back what it can: no way out of a
//! request leaks a level or a parallel slot.

use std::sync::Arc;

use super::{
    Quota,
    budget::Budget,
    levels::{Moment, Refused, Taken},
    policy::{Facts, Policies, Subjects},
    rule::{Amounts, Rates, Rule, Unit},
    window::Standing,
};
use crate::config::schema::{OnExhausted, Unpriced};

/// Fewest output tokens for which a stream that names no bound is begun where a limit has little left.
const STREAM_OUTPUT_MIN: u64 = 16;

/// Tries to fit into what a limit has left while others take from it too.
const SHRINK_TRIES: u32 = 4;

/// Output tokens by which a running stream's reservation grows: a quarter of it, within these. The steps bound how much
/// a stream holds that it may not need, and how often it asks.
const STEP_MIN: u64 = 32;
const STEP_MAX: u64 = 8192;

/// What a request may use at most, as far as that is known before it runs.
#[derive(Debug, Clone, Copy)]
pub struct Ask {
    /// Input tokens, estimated from the body.
    pub input: u64,
    /// Output tokens that the request permits, or the model's default.
    pub output: u64,
    /// The client named its output limit itself. Otherwise the reservation shrinks to what a limit can
    /// grant at all, because the client cannot know of the default.
    pub output_is_explicit: bool,
    /// The answer is a stream, which can be ended when nothing is left: without an explicit limit it is begun with what
    /// is left now.
    pub stream: bool,
    /// What it costs at most; `None` where no price is known.
    pub rates: Option<Rates>,
}

/// Why a request was not admitted, or a stream not continued.
#[derive(Debug, Clone)]
pub struct Denied {
    /// The policy or budget that refused.
    pub name: Arc<str>,
    pub unit: Unit,
    pub amount: u64,
    /// Its window, for people.
    pub every: String,
    pub standing: Standing,
    /// Units that were asked for.
    pub asked: u64,
    pub why: Why,
}

/// See [`Denied`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// It does not fit now.
    Exhausted,
    /// It can never be admitted: it asks for more than a whole window grants.
    Never,
    /// Cost is limited, and what it costs is not known.
    Unpriced,
    /// There is no place to count it at.
    NoPlace,
    /// Hosts share the limit, and the store in which they do is gone.
    StoreGone,
    /// A budget or credit is spent.
    Spent,
}

/// How the tightest limit of each kind stands, for `x-ratelimit-*`: amount and standing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Report {
    pub requests: Option<(u64, Standing)>,
    pub tokens: Option<(u64, Standing)>,
}

/// A granted request.
pub struct Admission {
    pub reservation: Reservation,
    pub report: Report,
}

/// What ends a running stream: the rule that has nothing left.
#[derive(Debug, Clone)]
pub struct Exhausted {
    pub name: Arc<str>,
    pub on_exhausted: OnExhausted,
}

/// What an admitted request holds. See the module.
pub struct Reservation {
    quota: Arc<Quota>,
    policies: Arc<Policies>,
    subjects: Subjects,
    ask: Ask,
    holds: Vec<Hold>,
    /// Holds that were made at the admission, before those of the chosen provider.
    admitted: u32,
    /// Policies that are asked when a target is chosen.
    of_providers: Vec<u32>,
    /// The request has been sent to the provider that was chosen last.
    sent: bool,
    /// Output tokens that the holds permit; without a bound `u64::MAX`.
    output_allowed: u64,
    settled: bool,
}

struct Hold {
    source: Source,
    /// What the level is known by.
    id: u64,
    taken: Taken,
    /// Units.
    reserved: u64,
    /// The first hold of the same rule; its own place for that one.
    root: usize,
}

enum Source {
    Policy(u32),
    Budget(Arc<Budget>),
    /// One of the key's own limits.
    Own(Arc<Rule>),
}

impl Source {
    fn rule<'a>(&'a self, policies: &'a Policies) -> &'a Rule {
        match self {
            Source::Policy(place) => &policies.get(*place).rule,
            Source::Budget(budget) => &budget.rule,
            Source::Own(rule) => rule,
        }
    }
}

/// Reserves against all policies and budgets that bind a request, all or nothing.
///
/// # Errors
/// The first one, in their order, that says no.
pub fn admit(
    quota: &Arc<Quota>,
    policies: &Arc<Policies>,
    facts: &Facts<'_>,
    ask: Ask,
) -> Result<Admission, Box<Denied>> {
    let now = quota.levels.now();
    let mut report = Report::default();
    let mut reservation = Reservation {
        quota: quota.clone(),
        policies: policies.clone(),
        subjects: policies.subjects(facts),
        ask,
        holds: Vec::new(),
        admitted: 0,
        of_providers: Vec::new(),
        sent: false,
        output_allowed: u64::MAX,
        settled: false,
    };
    for place in policies.of(facts) {
        let policy = policies.get(place);
        if policy.wants_provider() {
            reservation.of_providers.push(place);
            continue;
        }
        let id = policy.level_id(&reservation.subjects, "");
        // On a refusal the reservation is dropped, and gives back what it has.
        let standing = reservation.hold(policies, Source::Policy(place), id, now)?;
        report.note(&policy.rule, standing);
    }
    for rule in facts.own {
        let standing = reservation.hold(policies, Source::Own(rule.clone()), rule.id, now)?;
        report.note(rule, standing);
    }
    for budget in quota.budgets.of(&facts.ids) {
        let id = budget.rule.id;
        reservation.hold(policies, Source::Budget(budget), id, now)?;
    }
    reservation.admitted = reservation.holds.len() as u32;
    Ok(Admission { reservation, report })
}

impl Reservation {
    /// Takes from one rule what the request may use.
    fn hold(
        &mut self,
        policies: &Policies,
        source: Source,
        id: u64,
        now: Moment,
    ) -> Result<Standing, Box<Denied>> {
        let rule = source.rule(policies);
        let (least, whole) = self.asked(rule)?;
        let mut asked = whole;
        let mut tries = 0;
        let (taken, standing) = loop {
            match self.quota.levels.reserve(&rule.query(id), asked, now) {
                Ok(granted) => break granted,
                Err(Refused::StoreGone) => {
                    return Err(denied(rule, Why::StoreGone, Standing::default(), asked));
                }
                // What only counts never refuses; that it does not count here is counted.
                Err(Refused::Full) if !rule.hard => return Ok(Standing::default()),
                Err(Refused::Full) => return Err(denied(rule, Why::NoPlace, Standing::default(), asked)),
                Err(Refused::Exhausted(standing)) => {
                    let left = standing.remaining.min(whole);
                    tries += 1;
                    if !self.may_shrink(rule) || left < least || tries > SHRINK_TRIES || left >= asked {
                        return Err(denied(rule, why(rule, &source, asked), standing, asked));
                    }
                    asked = left;
                }
            }
        };
        if rule.hard && rule.unit.grows() {
            self.output_allowed = self.output_allowed.min(self.output_for(rule.unit, asked));
        }
        let root = self.holds.len();
        // Most requests have one or two, which are held for as long as a stream runs; a vector's first place would be four.
        if root < 2 {
            self.holds.reserve_exact(1);
        }
        self.holds.push(Hold {
            source,
            id,
            taken,
            reserved: asked,
            root,
        });
        Ok(standing)
    }

    /// Whether a stream is begun with less than it may use.
    fn may_shrink(&self, rule: &Rule) -> bool {
        self.ask.stream && !self.ask.output_is_explicit && rule.unit.grows()
    }

    /// The fewest units with which the request is begun, and those that it asks for.
    fn asked(&self, rule: &Rule) -> Result<(u64, u64), Box<Denied>> {
        let ask = &self.ask;
        let rates = match (ask.rates, rule.unit) {
            (None, Unit::Usd) if rule.hard && rule.unpriced == Unpriced::Refuse => {
                return Err(denied(rule, Why::Unpriced, Standing::default(), 0));
            }
            (rates, _) => rates.unwrap_or_default(),
        };
        let units = |output: u64| {
            let amounts = Amounts {
                input: ask.input,
                output,
                nano_usd: rates.cost(ask.input, output),
            };
            amounts.of(rule.unit)
        };
        let (whole, base, amount) = (units(ask.output), units(0), rule.amount());
        if ask.output_is_explicit || base > amount || !rule.hard {
            return Ok((whole, whole));
        }
        let least = units(STREAM_OUTPUT_MIN.min(ask.output));
        Ok((least, whole.min(amount)))
    }

    /// Output tokens that so many units of a rule permit.
    fn output_for(&self, unit: Unit, units: u64) -> u64 {
        match unit {
            Unit::OutputTokens => units,
            Unit::Tokens => units.saturating_sub(self.ask.input),
            Unit::Usd => match self.ask.rates {
                Some(rates) => rates.output_for(self.ask.input, units),
                None => u64::MAX,
            },
            Unit::Requests | Unit::InputTokens | Unit::Parallel => u64::MAX,
        }
    }

    /// Reserves against the policies that concern a provider, before the request is sent there; what was held for
    /// another provider goes back, but for the request itself where it was sent: it counts there, as it does in the
    /// provider's own books.
    ///
    /// # Errors
    /// The first that says no: this target is not to be used.
    pub fn choose_provider(&mut self, provider: &str) -> Result<(), Box<Denied>> {
        if self.of_providers.is_empty() {
            return Ok(());
        }
        let now = self.quota.levels.now();
        if std::mem::take(&mut self.sent) {
            self.keep_requests();
        }
        self.release_from(self.admitted(), now);
        self.output_allowed = self.holds.iter().fold(u64::MAX, |least, hold| {
            let rule = hold.source.rule(&self.policies);
            let bounds = rule.hard && rule.unit.grows();
            let output = self.output_for(rule.unit, hold.reserved);
            if bounds { least.min(output) } else { least }
        });
        let policies = self.policies.clone();
        for at in 0..self.of_providers.len() {
            let place = self.of_providers[at];
            let policy = policies.get(place);
            if !policy.fits_provider(provider) {
                continue;
            }
            let id = policy.level_id(&self.subjects, provider);
            if let Err(denied) = self.hold(&policies, Source::Policy(place), id, now) {
                self.release_from(self.admitted(), now);
                return Err(denied);
            }
        }
        Ok(())
    }

    /// Notes that the request was sent to the provider that was chosen.
    pub fn sent(&mut self) {
        self.sent = true;
    }

    /// Notes that it did not reach the provider after all.
    pub fn unsent(&mut self) {
        self.sent = false;
    }

    fn admitted(&self) -> usize {
        self.admitted as usize
    }

    /// Lets stand what limits of requests have counted for the provider that was chosen.
    fn keep_requests(&mut self) {
        let from = self.admitted();
        let of_provider = from..self.holds.len();
        for place in of_provider.rev() {
            let hold = &self.holds[place];
            if hold.source.rule(&self.policies).unit == Unit::Requests {
                self.quota.levels.keep(&hold.taken, hold.reserved);
                self.holds.remove(place);
            }
        }
        self.holds[from..]
            .iter_mut()
            .zip(from..)
            .for_each(|(hold, place)| hold.root = place);
    }

    /// Output tokens that may be delivered before [`Reservation::extend`] is to be asked; without a bound `u64::MAX`.
    pub fn output_allowed(&self) -> u64 {
        self.output_allowed
    }

    /// Whether the client named the output limit itself.
    pub fn output_is_explicit(&self) -> bool {
        self.ask.output_is_explicit
    }

    /// A stream has delivered `delivered` output tokens, more than is allowed: takes more from every rule that bounds
    /// it, all or nothing; in smaller steps where little is left.
    ///
    /// # Errors
    /// Nothing is left: the stream is to be ended.
    pub fn extend(&mut self, delivered: u64) -> Result<(), Exhausted> {
        let missing = delivered.saturating_sub(self.output_allowed);
        let mut step = (self.output_allowed / 4).clamp(STEP_MIN, STEP_MAX).max(missing);
        loop {
            match self.try_extend(step) {
                Ok(()) => return Ok(()),
                Err(exhausted) if step <= missing.max(1) => return Err(exhausted),
                Err(_) => step = (step / 2).max(missing).max(1),
            }
        }
    }

    fn try_extend(&mut self, output: u64) -> Result<(), Exhausted> {
        let now = self.quota.levels.now();
        let from = self.holds.len();
        for place in 0..from {
            let hold = &self.holds[place];
            if hold.root != place {
                continue;
            }
            let source = match &hold.source {
                Source::Policy(policy) => Source::Policy(*policy),
                // It may have been changed or topped up since the stream began.
                Source::Budget(budget) => Source::Budget(self.quota.budgets.current(budget)),
                Source::Own(rule) => Source::Own(rule.clone()),
            };
            let rule = source.rule(&self.policies);
            if !rule.hard || !rule.unit.grows() {
                continue;
            }
            let more = match (rule.unit, self.ask.rates) {
                (Unit::Usd, Some(rates)) => rates.cost(0, output),
                (Unit::Usd, None) => continue,
                _ => output,
            };
            match self.quota.levels.reserve(&rule.query(hold.id), more, now) {
                Ok((taken, _)) => {
                    let id = hold.id;
                    self.holds.push(Hold {
                        source,
                        id,
                        taken,
                        reserved: more,
                        root: place,
                    });
                }
                Err(_) => {
                    let exhausted = Exhausted {
                        name: rule.name.clone(),
                        on_exhausted: rule.on_exhausted,
                    };
                    self.release_from(from, now);
                    return Err(exhausted);
                }
            }
        }
        self.output_allowed = self.output_allowed.saturating_add(output);
        Ok(())
    }

    /// Trues everything up with what was really used. What it was more than reserved is debt.
    pub fn settle(mut self, used: Amounts) {
        self.settled = true;
        let now = self.quota.levels.now();
        let grew = self
            .holds
            .iter()
            .enumerate()
            .any(|(place, hold)| hold.root != place);
        for place in 0..self.holds.len() {
            let hold = &self.holds[place];
            if hold.root != place {
                continue;
            }
            let rule = hold.source.rule(&self.policies);
            let mut left = match rule.unit {
                // Those of a provider that was not sent it.
                Unit::Requests if place >= self.admitted() && !self.sent => 0,
                // Accepted is used, whatever came of it.
                Unit::Requests => {
                    self.quota.levels.keep(&hold.taken, hold.reserved);
                    continue;
                }
                Unit::Parallel => 0,
                unit => used.of(unit),
            };
            let further = if grew {
                &self.holds[place..]
            } else {
                &self.holds[place..=place]
            };
            for hold in further.iter().filter(|hold| hold.root == place) {
                let here = left.min(hold.reserved);
                let query = rule.query(hold.id);
                self.quota
                    .levels
                    .give_back(&query, &hold.taken, hold.reserved, here, now);
                left -= here;
            }
            if left > 0 {
                // By the amount of now: what is above it is debt, though more was left when the request came.
                match &hold.source {
                    Source::Budget(budget) => {
                        let budget = self.quota.budgets.current(budget);
                        self.quota.levels.charge(&budget.rule.query(hold.id), left, now);
                    }
                    _ => self.quota.levels.charge(&rule.query(hold.id), left, now),
                }
            }
            if let Source::Budget(budget) = &hold.source {
                self.quota.budgets.note_alerts(budget, &self.quota.levels, now);
            }
        }
    }

    /// Gives everything back, the request itself too: it is refused after all.
    pub fn release(&mut self) {
        let now = self.quota.levels.now();
        self.release_from(0, now);
    }

    fn release_from(&mut self, from: usize, now: Moment) {
        for hold in self.holds.drain(from..) {
            let rule = hold.source.rule(&self.policies);
            let query = rule.query(hold.id);
            self.quota
                .levels
                .give_back(&query, &hold.taken, hold.reserved, 0, now);
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.settled {
            let now = self.quota.levels.now();
            self.release_from(0, now);
        }
    }
}

fn why(rule: &Rule, source: &Source, asked: u64) -> Why {
    match source {
        _ if asked > rule.amount() && !matches!(source, Source::Budget(_)) => Why::Never,
        Source::Budget(_) => Why::Spent,
        Source::Policy(_) | Source::Own(_) => Why::Exhausted,
    }
}

fn denied(rule: &Rule, why: Why, standing: Standing, asked: u64) -> Box<Denied> {
    Box::new(Denied {
        name: rule.name.clone(),
        unit: rule.unit,
        amount: rule.amount(),
        every: rule.every(),
        standing,
        asked,
        why,
    })
}

impl Report {
    fn note(&mut self, rule: &Rule, standing: Standing) {
        if let Some(place) = self.place(rule.unit)
            && place.is_none_or(|(_, seen)| standing.remaining < seen.remaining)
        {
            *place = Some((rule.amount(), standing));
        }
    }

    fn place(&mut self, unit: Unit) -> Option<&mut Option<(u64, Standing)>> {
        match unit {
            Unit::Requests => Some(&mut self.requests),
            Unit::Tokens | Unit::InputTokens | Unit::OutputTokens => Some(&mut self.tokens),
            Unit::Usd | Unit::Parallel => None,
        }
    }

    /// The standing of one limit alone.
    pub fn of(denied: &Denied) -> Report {
        let mut report = Report::default();
        if let Some(place) = report.place(denied.unit) {
            *place = Some((denied.amount, denied.standing));
        }
        report
    }
}

#[cfg(test)]
mod tests;
