//! Durations (`250ms 30s 5m 1h 1d 1mo`), sizes (`64KiB 8MiB`) and secrets of the configuration.

use std::{borrow::Cow, fmt, time::Duration};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, de::Error as _};

/// A time span; a month is 30 days.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

/// A size in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

/// A secret, resolved from `${env:…}`, `${file:…}` or `${credential:…}`; never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a value.
    pub fn new(value: impl Into<String>) -> Secret {
        Secret(value.into())
    }

    /// The value itself, for the one place that sends or compares it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<secret>")
    }
}

impl Span {
    /// A span of whole seconds.
    pub const fn secs(secs: u64) -> Span {
        Span(Duration::from_secs(secs))
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Span, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        parse_span(&text).map_err(D::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        parse_bytes(&text).map_err(D::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Secret, D::Error> {
        Ok(Secret(String::deserialize(deserializer)?))
    }
}

/// Splits `250ms` into its number and its unit.
fn number_and_unit(text: &str) -> Option<(u64, &str)> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    Some((number.parse().ok()?, unit.trim_start()))
}

/// Parses a duration of the configuration.
pub fn parse_span(text: &str) -> Result<Span, String> {
    let wrong = || format!("`{text}` is not a duration; write for example 250ms, 30s, 5m, 1h, 1d or 1mo");
    let (number, unit) = number_and_unit(text).ok_or_else(wrong)?;
    let unit_ms: u64 = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        "w" => 7 * 86_400_000,
        "mo" => 30 * 86_400_000,
        "" if number == 0 => 0,
        _ => return Err(wrong()),
    };
    let ms = number
        .checked_mul(unit_ms)
        .ok_or_else(|| format!("`{text}` is too long"))?;
    Ok(Span(Duration::from_millis(ms)))
}

/// Parses a size of the configuration.
pub fn parse_bytes(text: &str) -> Result<Bytes, String> {
    let wrong = || format!("`{text}` is not a size; write for example 512B, 64KiB, 8MiB or 1GiB");
    let (number, unit) = number_and_unit(text).ok_or_else(wrong)?;
    let unit_bytes: u64 = match unit {
        "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        "" if number == 0 => 0,
        _ => return Err(wrong()),
    };
    number
        .checked_mul(unit_bytes)
        .map(Bytes)
        .ok_or_else(|| format!("`{text}` is too large"))
}

macro_rules! string_schema {
    ($type:ty, $name:literal, $schema:tt) => {
        impl JsonSchema for $type {
            fn schema_name() -> Cow<'static, str> {
                $name.into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!($schema)
            }
        }
    };
}

string_schema!(Span, "Duration", {
    "type": "string",
    "pattern": "^(0|[0-9]+ ?(ms|s|m|h|d|w|mo))$",
    "description": "A duration: 250ms, 30s, 5m, 1h, 1d, 1w or 1mo (30 days)."
});
string_schema!(Bytes, "Size", {
    "type": "string",
    "pattern": "^(0|[0-9]+ ?(B|KiB|MiB|GiB|TiB))$",
    "description": "A size in bytes: 512B, 64KiB, 8MiB, 1GiB."
});
string_schema!(Secret, "Secret", {
    "type": "string",
    "description": "A secret: ${env:NAME}, ${file:/path} or ${credential:NAME} (a systemd credential), or the value itself."
});
