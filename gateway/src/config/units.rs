//! Durations (`250ms 30s 5m 1h 1d 1mo`), sizes (`64KiB 8MiB`) and secrets of the configuration.

use std::{borrow::Cow, fmt, net::SocketAddr, time::Duration};

use ipnet::IpNet;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::error::quote;

/// A time span; a month is 30 days.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

/// A size in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

/// An amount of money in US dollars, exact to the nano-dollar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Dollars(pub u64);

/// A day, beginning at midnight UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Date(jiff::civil::Date);

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

impl<'de> Deserialize<'de> for Dollars {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Dollars, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        parse_dollars(&text).map_err(D::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Date {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Date, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        parse_date(&text).map_err(D::Error::custom)
    }
}

impl Serialize for Dollars {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for Date {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl Date {
    /// Its midnight, milliseconds since the Unix epoch; 0 for days before it.
    pub fn unix_ms(self) -> u64 {
        let midnight = self.0.to_zoned(jiff::tz::TimeZone::UTC);
        midnight.map_or(0, |time| {
            u64::try_from(time.timestamp().as_millisecond()).unwrap_or(0)
        })
    }
}

/// As the configuration writes it, without needless zeros: `1.25`, `0.000000001`, `500`.
impl fmt::Display for Dollars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, nano) = (self.0 / NANO_PER_DOLLAR, self.0 % NANO_PER_DOLLAR);
        if nano == 0 {
            return write!(f, "{whole}");
        }
        let digits = format!("{nano:09}");
        write!(f, "{whole}.{}", digits.trim_end_matches('0'))
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Secret, D::Error> {
        Ok(Secret(String::deserialize(deserializer)?))
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A configuration can be shown, its secrets cannot.
impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str("<secret>")
    }
}

/// Units of durations in milliseconds, the shortest first.
const SPAN_UNITS: [(&str, u64); 7] = [
    ("ms", 1),
    ("s", 1_000),
    ("m", 60_000),
    ("h", 3_600_000),
    ("d", 86_400_000),
    ("w", 7 * 86_400_000),
    ("mo", 30 * 86_400_000),
];

/// Units of sizes in bytes, the smallest first.
const BYTES_UNITS: [(&str, u64); 5] = [
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
];

/// Longest duration: ten years. Deadlines made of it do not overflow a clock.
const SPAN_MS_MAX: u64 = 3650 * 86_400_000;

/// Largest size: what a signed 64-bit file offset can say, in whole TiB.
const BYTES_MAX: u64 = ((1 << 23) - 1) << 40;

/// Writes a number in the largest unit that leaves no remainder.
fn in_units(number: u64, units: &[(&str, u64)], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let whole = |unit: &&(&str, u64)| number.is_multiple_of(unit.1);
    match units.iter().rev().find(whole) {
        Some((name, size)) if number > 0 => write!(f, "{}{name}", number / size),
        _ => f.write_str("0"),
    }
}

/// As the configuration writes it, for example `1500ms` or `10m`; what is below a millisecond is cut.
impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX);
        in_units(ms, &SPAN_UNITS, f)
    }
}

/// As the configuration writes it, for example `1536B` or `8MiB`.
impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        in_units(self.0, &BYTES_UNITS, f)
    }
}

/// Splits `250ms` into its number and its unit.
fn number_and_unit(text: &str) -> Option<(u64, &str)> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    Some((number.parse().ok()?, unit.trim_start()))
}

/// Reads a whole number with one of `units`; `None` if it is none, `Some(None)` if it is above `max`.
fn with_unit(text: &str, units: &[(&str, u64)], max: u64) -> Option<Option<u64>> {
    let (number, unit) = number_and_unit(text)?;
    let size = match unit {
        "" if number == 0 => 1,
        _ => units.iter().find(|(name, _)| *name == unit)?.1,
    };
    Some(number.checked_mul(size).filter(|value| *value <= max))
}

const NANO_PER_DOLLAR: u64 = 1_000_000_000;

/// Most dollars in one place: a billion leaves sums far from overflow.
const DOLLARS_MAX: u64 = 1_000_000_000;

/// Parses an amount of US dollars: a decimal number with at most nine digits behind the point, read digit by digit.
///
/// # Errors
/// Says what an amount looks like, or that it is more than a billion dollars.
pub fn parse_dollars(text: &str) -> Result<Dollars, String> {
    let wrong = || {
        format!(
            "{} is not an amount of dollars; write for example 500, 1.25 or 0.075, with at most nine digits behind the point",
            quote(text)
        )
    };
    let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(part) || part.trim_end_matches('0').len() > 9 || whole.len() > 18 {
        return Err(wrong());
    }
    let whole: u64 = whole.parse().map_err(|_| wrong())?;
    let nano: u64 = format!("{:0<9}", part.trim_end_matches('0'))
        .parse()
        .map_err(|_| wrong())?;
    if whole >= DOLLARS_MAX {
        return Err(format!("{} is more than a billion dollars", quote(text)));
    }
    Ok(Dollars(whole * NANO_PER_DOLLAR + nano))
}

/// Parses a day such as `2026-01-31`.
///
/// # Errors
/// Says what a day looks like.
pub fn parse_date(text: &str) -> Result<Date, String> {
    let date = (text.len() == 10).then(|| text.parse().ok()).flatten();
    date.map(Date)
        .ok_or_else(|| format!("{} is not a day; write for example 2026-01-31", quote(text)))
}

/// Parses a duration of the configuration: a whole number and its unit, or 0.
///
/// # Errors
/// Says what a duration looks like, or that it is longer than ten years.
pub fn parse_span(text: &str) -> Result<Span, String> {
    match with_unit(text, &SPAN_UNITS, SPAN_MS_MAX) {
        Some(Some(ms)) => Ok(Span(Duration::from_millis(ms))),
        Some(None) => Err(format!("{} is longer than 3650d", quote(text))),
        None => Err(format!(
            "{} is not a duration; write for example 250ms, 30s, 5m, 1h, 1d or 1mo",
            quote(text)
        )),
    }
}

/// Parses a size of the configuration: a whole number and its unit, or 0.
///
/// # Errors
/// Says what a size looks like, or that it is too large.
pub fn parse_bytes(text: &str) -> Result<Bytes, String> {
    match with_unit(text, &BYTES_UNITS, BYTES_MAX) {
        Some(Some(bytes)) => Ok(Bytes(bytes)),
        Some(None) => Err(format!("{} is too large", quote(text))),
        None => Err(format!(
            "{} is not a size; write for example 512B, 64KiB, 8MiB or 1GiB",
            quote(text)
        )),
    }
}

/// An IP address with a port; only its JSON Schema is here.
pub(crate) struct Address;

/// An IP network; only its JSON Schema is here.
pub(crate) struct Network;

fn check_address(text: &str) -> Result<(), String> {
    text.parse::<SocketAddr>().map(drop).map_err(|_| {
        format!(
            "{} is not an IP address with a port; write for example 0.0.0.0:8080 or [::]:8080",
            quote(text)
        )
    })
}

fn check_network(text: &str) -> Result<(), String> {
    text.parse::<IpNet>().map(drop).map_err(|_| {
        format!(
            "{} is not a network; write for example 10.0.0.0/8, 192.0.2.1/32 or fd00::/8",
            quote(text)
        )
    })
}

/// Says what is wrong with a text.
type Check = fn(&str) -> Result<(), String>;

/// The types of this module as the JSON Schema names them, with what their text must be.
pub(super) const FORMATS: [(&str, Check); 6] = [
    ("Duration", |text| parse_span(text).map(drop)),
    ("Size", |text| parse_bytes(text).map(drop)),
    ("Dollars", |text| parse_dollars(text).map(drop)),
    ("Date", |text| parse_date(text).map(drop)),
    ("Address", check_address),
    ("Network", check_network),
];

macro_rules! string_schema {
    ($type:ty, $name:literal, $schema:tt) => {
        impl JsonSchema for $type {
            fn schema_name() -> Cow<'static, str> {
                $name.into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                // The title tells `structure` which of the FORMATS this is.
                let mut schema = json_schema!($schema);
                schema.insert("title".into(), $name.into());
                schema
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
string_schema!(Dollars, "Dollars", {
    "type": ["string", "number"],
    "pattern": "^[0-9]+(\\.[0-9]+)?$",
    "description": "US dollars as a decimal number, exact to nine digits behind the point: 500, 1.25, 0.075."
});
string_schema!(Date, "Date", {
    "type": "string",
    "format": "date",
    "description": "A day, UTC: 2026-01-31."
});
string_schema!(Address, "Address", {
    "type": "string",
    "description": "An IP address with a port: 0.0.0.0:8080 or [::]:8080."
});
string_schema!(Network, "Network", {
    "type": "string",
    "description": "An IP network: 10.0.0.0/8, 192.0.2.1/32 or fd00::/8."
});
string_schema!(Secret, "Secret", {
    "type": "string",
    "description": "A secret: ${env:NAME}, ${file:/path} or ${credential:NAME} (a systemd credential), or the value itself."
});

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations_are_read_and_written() {
        for (text, ms, again) in [
            ("0", 0, "0"),
            ("0s", 0, "0"),
            ("250ms", 250, "250ms"),
            ("1000ms", 1000, "1s"),
            ("90 s", 90_000, "90s"),
            ("5m", 300_000, "5m"),
            ("36h", 129_600_000, "36h"),
            ("1d", 86_400_000, "1d"),
            ("1w", 604_800_000, "1w"),
            ("1mo", 2_592_000_000, "1mo"),
        ] {
            let span = parse_span(text).unwrap();
            assert_eq!(span.0.as_millis(), ms, "{text}");
            assert_eq!(span.to_string(), again);
        }
        for wrong in [
            "",
            "s",
            "5",
            "-1s",
            "+1s",
            "1.5s",
            "1 h 2m",
            "1H",
            "1y",
            " 1s",
            "1s ",
            "٣s",
            "3651d",
            "18446744073709551615mo",
            "18446744073709551616ms",
        ] {
            assert!(parse_span(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_are_read_and_written() {
        for (text, bytes, again) in [
            ("0", 0, "0"),
            ("512B", 512, "512B"),
            ("64KiB", 65_536, "64KiB"),
            ("1024 KiB", 1 << 20, "1MiB"),
            ("1TiB", 1 << 40, "1TiB"),
        ] {
            let size = parse_bytes(text).unwrap();
            assert_eq!(size.0, bytes, "{text}");
            assert_eq!(size.to_string(), again);
        }
        for wrong in [
            "",
            "1",
            "1KB",
            "1kib",
            "1MB",
            "-1B",
            "1.5MiB",
            "16777216TiB",
            "99999999999999999999B",
        ] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_reads_as_the_same(ms in 0..=SPAN_MS_MAX, bytes in 0..=BYTES_MAX) {
            let span = Span(Duration::from_millis(ms));
            prop_assert_eq!(parse_span(&span.to_string()), Ok(span));
            prop_assert_eq!(parse_bytes(&Bytes(bytes).to_string()), Ok(Bytes(bytes)));
        }

        #[test]
        fn any_text_is_read_or_refused(text in ".*") {
            let _ = (parse_span(&text), parse_bytes(&text));
        }
    }

    #[test]
    fn a_secret_is_never_shown() {
        let secret = Secret::new("hunter2");
        assert_eq!(format!("{secret:?}"), "<secret>");
        assert_eq!(serde_json::to_string(&secret).unwrap(), "\"<secret>\"");
    }
}
