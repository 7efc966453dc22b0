//! How long a client is dropped that comes back and is refused again.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::units::Span;

/// Beyond it the second drop is the longest.
pub const ESCALATION_FACTOR_MAX: u32 = 100;

/// 30 s, 1 min, 2 min …: a broken client is back soon, an attack is paid for ever more rarely.
const FACTOR: u32 = 2;
const MAX: Span = Span::secs(3_600);
const FORGIVE: Span = Span::secs(3_600);
const FORGET: Span = Span::secs(86_400);

/// How the time of a drop grows with repetition and shrinks with good behaviour.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Escalation {
    /// Each further drop lasts this many times the one before, 1 to 100; 1 keeps them alike.
    #[schemars(range(min = 1, max = ESCALATION_FACTOR_MAX))]
    pub factor: u32,
    /// The longest drop, at least `for`, at most 30d.
    pub max: Span,
    /// One step back for each such time without a drop, and one when a request of the client is accepted after it; 1s to
    /// 30d.
    pub forgive: Span,
    /// After this time without a drop nothing is left of it, 1s to 30d.
    pub forget: Span,
}

impl Default for Escalation {
    fn default() -> Self {
        Escalation {
            factor: FACTOR,
            max: MAX,
            forgive: FORGIVE,
            forget: FORGET,
        }
    }
}
