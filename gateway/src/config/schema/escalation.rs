//! How long a client is dropped that comes back and is refused again.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::{defaults::ESCALATION_FACTOR_MAX, units::Span};

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
