//! A key's own limits.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Failure, Key};
use crate::{
    config::{
        defaults::LIMIT_MAX,
        schema,
        units::{Dollars, Span},
    },
    quota::{own, rule::Rule},
};

/// Limits of one key.
pub const LIMITS_MAX: usize = 8;

/// A limit of one key: at least one amount, and in what time it may be used. What is used is earned back continuously.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct KeyLimit {
    /// Requests, 1 to 10^15.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = LIMIT_MAX))]
    pub requests: Option<u64>,
    /// Input tokens, 1 to 10^15.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = LIMIT_MAX))]
    pub input_tokens: Option<u64>,
    /// Output tokens, 1 to 10^15.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = LIMIT_MAX))]
    pub output_tokens: Option<u64>,
    /// Tokens, input and output together, 1 to 10^15.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = LIMIT_MAX))]
    pub tokens: Option<u64>,
    /// Cost, US dollars.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usd: Option<Dollars>,
    /// Requests that run at the same time, 1 to 10^15; needs no `every`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = LIMIT_MAX))]
    pub parallel: Option<u64>,
    /// In what time, 1s to 1mo.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every: Option<Span>,
}

impl KeyLimit {
    /// As the configuration would have it.
    pub fn as_in_file(&self) -> schema::Limit {
        schema::Limit {
            requests: self.requests,
            input_tokens: self.input_tokens,
            output_tokens: self.output_tokens,
            tokens: self.tokens,
            usd: self.usd,
            parallel: self.parallel,
            every: self.every,
            ..schema::Limit::default()
        }
    }

    fn check(&self) -> Result<(), &'static str> {
        let counts = [self.requests, self.input_tokens, self.output_tokens, self.tokens];
        let is_timed = self.usd.is_some() || counts.iter().any(Option::is_some);
        if !is_timed && self.parallel.is_none() {
            return Err("it needs an amount, for example `requests`");
        }
        let mut given = counts.into_iter().chain([self.parallel]).flatten();
        if !given.all(|amount| (1..=LIMIT_MAX).contains(&amount)) {
            return Err("an amount is from 1 to 10^15");
        }
        if self.usd.is_some_and(|usd| usd.0 == 0) {
            return Err("`usd` is zero, which permits nothing");
        }
        match self.every {
            None if is_timed => Err("it needs `every`, for example `1m`"),
            Some(every) if !(Span::secs(1)..=Span::secs(30 * 86_400)).contains(&every) => {
                Err("`every` is from 1s to 1mo")
            }
            _ => Ok(()),
        }
    }
}

impl Key {
    /// What its own limits are in force as; `None` where it has none.
    pub fn rules(&self) -> Option<Arc<[Arc<Rule>]>> {
        let limits: Vec<schema::Limit> = self.limits.iter().map(KeyLimit::as_in_file).collect();
        (!limits.is_empty()).then(|| own::rules(&self.id, &self.name, &limits))
    }
}

/// Reports what limits of a key must not be.
pub(super) fn check(limits: &[KeyLimit]) -> Result<(), Failure> {
    if limits.len() > LIMITS_MAX {
        let count = limits.len();
        return Err(Failure::invalid(format!(
            "`limits` has {count} entries; the most is {LIMITS_MAX}"
        )));
    }
    for (place, limit) in limits.iter().enumerate() {
        limit
            .check()
            .map_err(|what| Failure::invalid(format!("`limits[{place}]`: {what}")))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_limit_may_be() {
        let read = |text: &str| -> KeyLimit { serde_json::from_str(text).expect("a limit") };
        for good in [
            r#"{"requests":60,"every":"1m"}"#,
            r#"{"parallel":2}"#,
            r#"{"usd":"0.5","tokens":1000,"every":"1mo"}"#,
        ] {
            assert_eq!(read(good).check(), Ok(()), "{good}");
        }
        for wrong in [
            "{}",
            r#"{"every":"1m"}"#,
            r#"{"requests":60}"#,
            r#"{"requests":0,"every":"1m"}"#,
            r#"{"usd":"0","every":"1m"}"#,
            r#"{"requests":1,"every":"2mo"}"#,
        ] {
            assert!(read(wrong).check().is_err(), "{wrong}");
        }
        assert!(check(&vec![read(r#"{"parallel":2}"#); LIMITS_MAX + 1]).is_err());
    }
}
