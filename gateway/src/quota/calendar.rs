//! Hours, days, weeks and months as the clock on the wall of a time zone shows them.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use jiff::{Timestamp, ToSpan, Zoned, civil::Weekday, tz::TimeZone};

/// What a period is a part of the calendar's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// From full hour to full hour of the zone.
    Hour,
    /// From midnight, or the first moment of the day where daylight saving skips it.
    Day,
    /// From Monday (ISO 8601).
    Week,
    /// From the first day.
    Month,
}

/// One period, in milliseconds of the Unix clock; `end` is the next one's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Period {
    pub start_ms: u64,
    pub end_ms: u64,
}

/// A calendar of periods. The period of the moment is remembered, so that time zones are asked once a period.
#[derive(Debug)]
pub struct Calendar {
    part: Part,
    zone: TimeZone,
    now: ArcSwapOption<Period>,
}

impl Part {
    /// The word of the configuration's `every`.
    pub fn name(self) -> &'static str {
        match self {
            Part::Hour => "1h",
            Part::Day => "1d",
            Part::Week => "1w",
            Part::Month => "1mo",
        }
    }
}

impl Calendar {
    /// A calendar in a zone.
    pub fn new(part: Part, zone: TimeZone) -> Calendar {
        Calendar {
            part,
            zone,
            now: ArcSwapOption::empty(),
        }
    }

    /// What its periods are.
    pub fn part(&self) -> Part {
        self.part
    }

    /// The time zone's name in the IANA database; `None` for one that has none.
    pub fn zone(&self) -> Option<&str> {
        self.zone.iana_name()
    }

    /// The period that holds a moment.
    pub fn period(&self, unix_ms: u64) -> Period {
        if let Some(period) = self.now.load().as_ref()
            && (period.start_ms..period.end_ms).contains(&unix_ms)
        {
            return **period;
        }
        let period = self.compute(unix_ms);
        self.now.store(Some(Arc::new(period)));
        period
    }

    /// The period before one.
    pub fn before(&self, period: Period) -> Period {
        self.compute(period.start_ms.saturating_sub(1))
    }

    fn compute(&self, unix_ms: u64) -> Period {
        self.try_compute(unix_ms).unwrap_or_else(|_| {
            // Beyond the years that jiff counts (9999) no zone is known: periods are as long as they mostly are.
            let length_ms = match self.part {
                Part::Hour => 3_600_000,
                Part::Day => 86_400_000,
                Part::Week => 7 * 86_400_000,
                Part::Month => 30 * 86_400_000,
            };
            let start_ms = unix_ms - unix_ms % length_ms;
            Period {
                start_ms,
                end_ms: start_ms + length_ms,
            }
        })
    }

    fn try_compute(&self, unix_ms: u64) -> Result<Period, jiff::Error> {
        let now = Timestamp::from_millisecond(unix_ms as i64)?.to_zoned(self.zone.clone());
        let (start, end) = match self.part {
            Part::Hour => self.hour(&now)?,
            Part::Day => (now.start_of_day()?, now.tomorrow()?.start_of_day()?),
            Part::Week => {
                let days = now.weekday().since(Weekday::Monday);
                let monday = now.date().checked_sub(i64::from(days).days())?;
                let next = monday.checked_add(7.days())?;
                (self.first_moment(monday)?, self.first_moment(next)?)
            }
            Part::Month => {
                let first = now.date().first_of_month();
                let next = first.checked_add(1.month())?;
                (self.first_moment(first)?, self.first_moment(next)?)
            }
        };
        let ms = |at: &Zoned| at.timestamp().as_millisecond().max(0) as u64;
        Ok(Period {
            start_ms: ms(&start),
            end_ms: ms(&end).max(unix_ms + 1),
        })
    }

    /// The hour that the zone's clock shows. An hour that comes twice, when daylight saving ends, is two periods: the
    /// offset is kept.
    fn hour(&self, now: &Zoned) -> Result<(Zoned, Zoned), jiff::Error> {
        let into = i64::from(now.minute()) * 60 + i64::from(now.second());
        let second = now.timestamp().as_millisecond().div_euclid(1000) - into;
        let start = Timestamp::from_second(second)?.to_zoned(self.zone.clone());
        let end = start.checked_add(1.hour())?;
        Ok((start, end))
    }

    fn first_moment(&self, day: jiff::civil::Date) -> Result<Zoned, jiff::Error> {
        day.to_zoned(self.zone.clone())?.start_of_day()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn calendar(part: Part, zone: &str) -> Calendar {
        Calendar::new(part, TimeZone::get(zone).expect("tzdata"))
    }

    fn ms(text: &str) -> u64 {
        text.parse::<Timestamp>().expect("a time").as_millisecond() as u64
    }

    fn assert_period(part: Part, zone: &str, at: &str, start: &str, end: &str) {
        let expected = Period {
            start_ms: ms(start),
            end_ms: ms(end),
        };
        assert_eq!(
            calendar(part, zone).period(ms(at)),
            expected,
            "{part:?} {zone} {at}"
        );
    }

    #[test]
    fn periods_follow_the_zone_and_daylight_saving() {
        let berlin = "Europe/Berlin";
        // 29 March 2026: 23 hours; 25 October 2026: 25 hours.
        assert_period(
            Part::Day,
            berlin,
            "2026-03-29T10:00:00Z",
            "2026-03-28T23:00:00Z",
            "2026-03-29T22:00:00Z",
        );
        assert_period(
            Part::Day,
            berlin,
            "2026-10-25T10:00:00Z",
            "2026-10-24T22:00:00Z",
            "2026-10-25T23:00:00Z",
        );
        assert_period(
            Part::Month,
            berlin,
            "2026-03-29T10:00:00Z",
            "2026-02-28T23:00:00Z",
            "2026-03-31T22:00:00Z",
        );
        // A Sunday belongs to the week that began on the Monday before.
        assert_period(
            Part::Week,
            berlin,
            "2026-03-29T10:00:00Z",
            "2026-03-22T23:00:00Z",
            "2026-03-29T22:00:00Z",
        );
        // The hour from 2 to 3 comes twice: two periods.
        assert_period(
            Part::Hour,
            berlin,
            "2026-10-25T00:30:00Z",
            "2026-10-25T00:00:00Z",
            "2026-10-25T01:00:00Z",
        );
        assert_period(
            Part::Hour,
            berlin,
            "2026-10-25T01:30:00Z",
            "2026-10-25T01:00:00Z",
            "2026-10-25T02:00:00Z",
        );
        // Half-hour offsets.
        assert_period(
            Part::Hour,
            "Asia/Kolkata",
            "2026-05-05T10:10:00Z",
            "2026-05-05T09:30:00Z",
            "2026-05-05T10:30:00Z",
        );
        // A day without a midnight: Santiago goes from 23:59:59 to 1:00 on 6 September 2026.
        assert_period(
            Part::Day,
            "America/Santiago",
            "2026-09-06T12:00:00Z",
            "2026-09-06T04:00:00Z",
            "2026-09-07T03:00:00Z",
        );
        assert_period(
            Part::Month,
            "UTC",
            "2028-02-29T23:59:59.999Z",
            "2028-02-01T00:00:00Z",
            "2028-03-01T00:00:00Z",
        );
        assert_period(
            Part::Month,
            "UTC",
            "2026-12-31T23:59:59Z",
            "2026-12-01T00:00:00Z",
            "2027-01-01T00:00:00Z",
        );
    }

    #[test]
    fn the_period_before_ends_where_one_begins() {
        let calendar = calendar(Part::Month, "America/New_York");
        let mut period = calendar.period(ms("2026-11-21T00:00:00Z"));
        for _ in 0..30 {
            let before = calendar.before(period);
            assert_eq!(before.end_ms, period.start_ms);
            period = before;
        }
    }

    proptest! {
        #[test]
        fn every_moment_is_in_its_period(unix_ms in 0u64..4_000_000_000_000, part in 0usize..4, zone in 0usize..5) {
            let part = [Part::Hour, Part::Day, Part::Week, Part::Month][part];
            let zone = ["UTC", "Europe/Berlin", "America/St_Johns", "Pacific/Apia", "Asia/Kathmandu"][zone];
            let calendar = calendar(part, zone);
            let period = calendar.period(unix_ms);
            prop_assert!((period.start_ms..period.end_ms).contains(&unix_ms));
            let next = calendar.period(period.end_ms);
            prop_assert!(next.start_ms <= period.end_ms);
            prop_assert!(next.end_ms > period.end_ms);
        }
    }
}
