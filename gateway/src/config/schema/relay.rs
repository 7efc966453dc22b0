//! How streams are passed on.

use std::{fmt, time::Duration};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// The longest that events may be gathered, microseconds: a person does not feel it, and it is far below the time
/// between two tokens.
pub const GATHER_US_MAX: u64 = 2_000;

/// See [`Relay::gather`]. Measured with `bench/run.sh` (docs/performance.md).
const GATHER_US: u64 = 2_000;

/// How streams are passed on.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Relay {
    /// While streams run, how long a data-plane thread may gather events before it passes them on, at most 2ms, for example
    /// `500us`; 0 passes each on as it comes. Saves CPU time. Needs io_uring of Linux 6.12; without it nothing is gathered.
    pub gather: Gather,
}

/// A short time in microseconds or milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gather(pub Duration);

impl Default for Gather {
    fn default() -> Gather {
        Gather(Duration::from_micros(GATHER_US))
    }
}

impl fmt::Display for Gather {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}us", self.0.as_micros())
    }
}

impl Serialize for Gather {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Gather {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Gather, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse(&text).map_err(D::Error::custom)
    }
}

impl JsonSchema for Gather {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Gather".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": "^(0|[0-9]{1,4}us|[0-2]ms)$" })
    }
}

fn parse(text: &str) -> Result<Gather, String> {
    let (number, unit_us) = match text {
        _ if text.ends_with("us") => (&text[..text.len() - 2], 1),
        _ if text.ends_with("ms") => (&text[..text.len() - 2], 1_000),
        _ if text == "0" => (text, 1),
        _ => return Err(format!("`{text}` is not a time like `500us` or `1ms`")),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| format!("`{text}` is not a time like `500us` or `1ms`"))?;
    let time_us = number.saturating_mul(unit_us);
    if time_us > GATHER_US_MAX {
        return Err(format!("{text} is too long; the most is 2ms"));
    }
    Ok(Gather(Duration::from_micros(time_us)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_to_gather() {
        let us = |text: &str| parse(text).map(|gather| gather.0.as_micros());
        assert_eq!(us("0"), Ok(0));
        assert_eq!(us("500us"), Ok(500));
        assert_eq!(us("2ms"), Ok(2_000));
        assert!(us("3ms").is_err_and(|error| error.contains("too long")));
        assert!(us("1s").is_err_and(|error| error.contains("not a time")));
        assert!(us("ms").is_err() && us("-1us").is_err() && us("99999999999999999999us").is_err());
        assert_eq!(Gather::default().to_string(), "2000us");
    }
}
