//! What a limit policy and a budget have in common: what they count, how much of it, in what time.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use super::{
    levels::{Query, Shelf},
    window::Window,
};
use crate::config::schema::{OnExhausted, Unpriced};

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Unit {
    /// Requests, when they are accepted.
    Requests,
    /// Input tokens, cached ones included.
    InputTokens,
    /// Output tokens, reasoning included.
    OutputTokens,
    /// Tokens, input and output.
    Tokens,
    /// Cost, nano-dollars.
    Usd,
    /// Requests that run.
    Parallel,
}

impl Unit {
    /// The word used in answers and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Unit::Requests => "requests",
            Unit::InputTokens => "input_tokens",
            Unit::OutputTokens => "output_tokens",
            Unit::Tokens => "tokens",
            Unit::Usd => "usd",
            Unit::Parallel => "parallel",
        }
    }

    /// A number of these units for people; cost in dollars.
    pub fn show(self, units: u64) -> String {
        match self {
            Unit::Usd => format!("${}", crate::config::units::Dollars(units)),
            _ => units.to_string(),
        }
    }

    /// Whether more of it is used while an answer is being written.
    pub fn grows(self) -> bool {
        matches!(self, Unit::OutputTokens | Unit::Tokens | Unit::Usd)
    }
}

/// Prices of the dearest way to serve a model, nano-dollars for a million tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rates {
    pub input: u64,
    pub output: u64,
}

impl Rates {
    /// What that many tokens cost, nano-dollars, rounded up.
    pub fn cost(&self, input: u64, output: u64) -> u64 {
        let product =
            u128::from(input) * u128::from(self.input) + u128::from(output) * u128::from(self.output);
        u64::try_from(product.div_ceil(1_000_000)).unwrap_or(u64::MAX)
    }

    /// Output tokens that `nano` pays for beside the input.
    pub fn output_for(&self, input: u64, nano: u64) -> u64 {
        if self.output == 0 {
            return u64::MAX;
        }
        let left = (u128::from(nano) * 1_000_000).saturating_sub(u128::from(input) * u128::from(self.input));
        u64::try_from(left / u128::from(self.output)).unwrap_or(u64::MAX)
    }
}

/// What a request used, or may use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Amounts {
    pub input: u64,
    pub output: u64,
    /// Cost; 0 where no price is known.
    pub nano_usd: u64,
}

impl Amounts {
    /// The part that a unit counts.
    pub fn of(&self, unit: Unit) -> u64 {
        match unit {
            Unit::Requests | Unit::Parallel => 1,
            Unit::InputTokens => self.input,
            Unit::OutputTokens => self.output,
            Unit::Tokens => self.input.saturating_add(self.output),
            Unit::Usd => self.nano_usd,
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Rule {
    /// How answers, logs and metrics call it.
    pub name: Arc<str>,
    pub unit: Unit,
    /// Units of a window; credit grows when it is topped up.
    amount: AtomicU64,
    pub window: Window,
    /// What its levels are known by, before the subject.
    pub id: u64,
    pub shelf: Shelf,
    /// Its subjects are chosen by clients.
    pub by_clients: bool,
    /// Refuses what does not fit.
    pub hard: bool,
    pub on_exhausted: OnExhausted,
    pub unpriced: Unpriced,
}

impl Rule {
    /// A hard rule.
    pub fn new(name: Arc<str>, unit: Unit, amount: u64, window: Window, id: u64, shelf: Shelf) -> Rule {
        Rule {
            name,
            unit,
            amount: AtomicU64::new(amount),
            window,
            id,
            shelf,
            by_clients: shelf == Shelf::Guests,
            hard: true,
            on_exhausted: OnExhausted::default(),
            unpriced: Unpriced::default(),
        }
    }

    /// Units of a window.
    pub fn amount(&self) -> u64 {
        self.amount.load(Ordering::Relaxed)
    }

    /// Adds to the amount, as credit is topped up; the new amount.
    pub fn add(&self, more: u64) -> u64 {
        let add = |amount: u64| Some(amount.saturating_add(more));
        let before = self
            .amount
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
        before.unwrap_or_default().saturating_add(more)
    }

    /// What a level of this rule is asked.
    pub fn query(&self, id: u64) -> Query<'_> {
        Query {
            window: &self.window,
            amount: self.amount(),
            id,
            overflow_id: self.id,
            shelf: self.shelf,
            by_clients: self.by_clients,
            hard: self.hard,
            // Requests count when they are accepted; parallel ones end with the process.
            note_held: !matches!(self.unit, Unit::Requests | Unit::Parallel),
        }
    }

    /// The window for people: `1m`, or `month`.
    pub fn every(&self) -> String {
        use crate::config::units::Span;
        let span = |ns: u64| Span(std::time::Duration::from_nanos(ns)).to_string();
        match &self.window {
            Window::Bucket { ns } => span(*ns),
            Window::Sliding { ns } => format!("any {}", span(*ns)),
            Window::Calendar(calendar) => format!("calendar {}", calendar.part().name()),
            Window::Never => "in all".into(),
            Window::Parallel => "at a time".into(),
        }
    }
}
