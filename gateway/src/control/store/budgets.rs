//! What can be done with budgets and credit.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Actor, Budget, Cause, Db, Failure, Kind, Row, Scope, TopUp};
use crate::{
    config::{
        check_budget, check_name,
        schema::{self, OnExhausted, Percent, Unpriced},
        units::{Dollars, Span, parse_span},
    },
    net::clock,
};

/// Budgets that can be made at run time.
const BUDGETS_MAX: u64 = 1_000_000;

/// Largest budget and top-up: a billion dollars. Sums of them fit into 64 bits.
const NANO_USD_MAX: u64 = 1_000_000_000 * NANO_PER_USD;

/// Nano-dollars of a dollar.
const NANO_PER_USD: u64 = 1_000_000_000;

/// Longest reference of a top-up, bytes.
const REFERENCE_BYTES_MAX: usize = 128;

/// Top-ups of one budget, all of which are kept so that each reference adds once: one an hour for over two years. Each is
/// read when the budget's credit is summed up, some 20 ms at this bound.
pub const TOPUPS_MAX: u64 = match cfg!(test) {
    false => 20_000,
    true => 50,
};

/// Percents at which an alert may be: as in the configuration, over 100 for a budget that only tells.
const PERCENTS: std::ops::RangeInclusive<u16> = 1..=1000;

/// A budget as it shall be: what the configuration's may be.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BudgetSettings {
    /// Dollars a period, a decimal with at most nine places. Absent: only prepaid credit counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[0-9]{1,10}(\.[0-9]{1,9})?$"))]
    pub usd: Option<String>,
    /// The period, with `usd`: 1h, 1d, 1w and 1mo are the calendar's, other spans from 1s to 1mo slide.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub every: Option<Span>,
    /// Time zone of calendar periods, as in `Europe/Berlin`. Absent: UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = ZONE_BYTES_MAX))]
    pub time_zone: Option<String>,
    /// Percents of use, 1 to 1000, at which somebody is told; at most 10.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = schema::ALERTS_MAX), inner(range(min = 1, max = 1000)))]
    pub alerts: Vec<u16>,
    /// Refuse what does not fit; false only tells.
    #[serde(default = "yes")]
    pub hard: bool,
    /// What becomes of a running stream when nothing is left.
    #[serde(default)]
    pub on_exhausted: OnExhausted,
    /// What becomes of requests for a model without a price.
    #[serde(default)]
    pub unpriced: Unpriced,
}

/// Longest name of a time zone, bytes; the IANA database's longest has 32.
const ZONE_BYTES_MAX: usize = 64;

fn yes() -> bool {
    true
}

/// Prepaid credit to be added.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NewTopUp {
    /// Dollars, a decimal with at most nine places; negative takes credit back.
    #[schemars(regex(pattern = r"^-?[0-9]{1,10}(\.[0-9]{1,9})?$"))]
    pub usd: String,
    /// A word of the caller's for this top-up, 1 to 128 bytes: sent again with it, nothing is added twice.
    #[schemars(length(min = 1, max = REFERENCE_BYTES_MAX))]
    pub reference: String,
}

/// A budget and its credit, nano-dollars.
pub type Standing = (Row<Budget>, i64);

impl Db {
    /// Makes a budget, or changes it to this.
    ///
    /// # Errors
    /// It changed since `seen`, or something is wrong with what was asked for.
    pub fn set_budget(
        &mut self,
        (scope, name): (Scope, &str),
        seen: Option<u64>,
        settings: &BudgetSettings,
        actor: &Actor,
    ) -> Result<Standing, Failure> {
        check_subject(scope, name)?;
        let id = Budget::id_of(scope, name);
        let before: Option<Row<Budget>> = self.get(&id)?;
        if let Some(row) = &before {
            self.standing(row.clone())?.0.check_seen(seen)?;
        } else if seen.is_some() {
            let message = "it was deleted meanwhile";
            return Err(Failure::new(Cause::Stale, message));
        } else if self.count(Kind::Budget)? >= BUDGETS_MAX {
            return Err(Failure::conflict(format!(
                "there are {BUDGETS_MAX} budgets already"
            )));
        }
        let now_ms = clock::unix_ms();
        let budget = Budget {
            scope,
            name: name.to_owned(),
            nano_usd: settings.usd.as_deref().map(amount).transpose()?,
            every: settings.every.map(|span| span.to_string()),
            time_zone: settings.time_zone.clone(),
            alerts: alerts(&settings.alerts)?,
            hard: settings.hard,
            on_exhausted: settings.on_exhausted,
            unpriced: settings.unpriced,
            created_ms: before.as_ref().map_or(now_ms, |row| row.doc.created_ms),
            updated_ms: now_ms,
        };
        let zone_bytes = settings.time_zone.as_ref().map_or(1, String::len);
        if !(1..=ZONE_BYTES_MAX).contains(&zone_bytes) {
            return Err(Failure::invalid(format!(
                "`time_zone` has 1 to {ZONE_BYTES_MAX} bytes"
            )));
        }
        // What the configuration's must be, this one must too.
        check_budget(&as_wanted(&budget)).map_err(Failure::invalid)?;
        self.put(&budget)?;
        let action = if before.is_some() { "update" } else { "create" };
        let detail = serde_json::to_value(settings).unwrap_or_default();
        self.audit(actor, action, Kind::Budget, (&id, name), &detail)?;
        self.budget(scope, name)
    }

    /// A budget with its credit.
    ///
    /// # Errors
    /// There is none that was made at run time.
    pub fn budget(&self, scope: Scope, name: &str) -> Result<Standing, Failure> {
        let id = Budget::id_of(scope, name);
        let row = self.get(&id)?.ok_or_else(|| Failure::not_found("budget"))?;
        self.standing(row)
    }

    /// A budget with its credit. Its version is that of the last change of either.
    ///
    /// # Errors
    /// The database's.
    pub fn standing(&self, mut row: Row<Budget>) -> Result<Standing, Failure> {
        let id = super::Doc::id(&row.doc);
        row.version = row.version.max(self.credit_version(&id)?);
        let credit = self.credit(&id)?;
        Ok((row, credit))
    }

    /// Forgets a budget and its credit: nothing bounds its subject any more but other budgets and limits.
    ///
    /// # Errors
    /// There is no such budget, or it changed since `seen`.
    pub fn delete_budget(
        &mut self,
        scope: Scope,
        name: &str,
        seen: Option<u64>,
        actor: &Actor,
    ) -> Result<(), Failure> {
        let (row, credit) = self.budget(scope, name)?;
        row.check_seen(seen)?;
        let id = Budget::id_of(scope, name);
        for topup in self.list::<TopUp>(&id, ("", ""), usize::MAX)? {
            self.delete::<TopUp>(&super::Doc::id(&topup.doc))?;
        }
        self.delete::<Budget>(&id)?;
        let detail = match credit {
            0 => Value::Null,
            credit => json!({ "credit_usd": usd(credit) }),
        };
        self.audit(actor, "delete", Kind::Budget, (&id, name), &detail)
    }

    /// Adds credit, once for each reference. The second value says whether it was added now.
    ///
    /// # Errors
    /// There is no such budget, the amount is none, or the reference stands for another amount.
    pub fn top_up(
        &mut self,
        scope: Scope,
        name: &str,
        new: &NewTopUp,
        actor: &Actor,
    ) -> Result<(Standing, bool), Failure> {
        let (row, credit) = self.budget(scope, name)?;
        if row.doc.nano_usd.is_some() {
            let message = "the budget has dollars a period; prepaid credit is for one without `usd`";
            return Err(Failure::conflict(message));
        }
        let budget = Budget::id_of(scope, name);
        let nano_usd = signed_amount(&new.usd)?;
        if new.reference.is_empty()
            || new.reference.len() > REFERENCE_BYTES_MAX
            || new.reference.chars().any(char::is_control)
        {
            return Err(Failure::invalid(format!(
                "`reference` has 1 to {REFERENCE_BYTES_MAX} bytes and no control characters"
            )));
        }
        let topup = TopUp {
            budget: budget.clone(),
            reference: new.reference.clone(),
            nano_usd,
            at_ms: clock::unix_ms(),
            by: actor.to_owned(),
        };
        let id = super::Doc::id(&topup);
        if let Some(row) = self.get::<TopUp>(&id)? {
            if row.doc.nano_usd != nano_usd {
                let message = "the reference was used for another amount";
                return Err(Failure::conflict(message));
            }
            return Ok((self.budget(scope, name)?, false));
        }
        if self.count_group(super::Kind::TopUp, &budget, TOPUPS_MAX)? >= TOPUPS_MAX {
            return Err(Failure::conflict(format!(
                "the budget has {TOPUPS_MAX} top-ups already; delete it and add its `credit_usd` anew as one"
            )));
        }
        let sum = credit
            .checked_add(nano_usd)
            .filter(|sum| *sum <= NANO_USD_MAX as i64);
        if sum.is_none() {
            return Err(Failure::conflict(
                "the credit would be more than a billion dollars",
            ));
        }
        self.put(&topup)?;
        let detail = json!({ "usd": usd(nano_usd), "reference": new.reference });
        self.audit(actor, "topup", Kind::Budget, (&budget, name), &detail)?;
        Ok((self.budget(scope, name)?, true))
    }
}

fn check_subject(scope: Scope, name: &str) -> Result<(), Failure> {
    if scope == Scope::Gateway && name != "all" {
        return Err(Failure::invalid("the gateway's budget is called `all`"));
    }
    check_name(name).map_err(|what| Failure::invalid(format!("`name`: {what}")))
}

/// A budget as it was asked for, as the configuration would have it.
fn as_wanted(budget: &Budget) -> schema::Budget {
    schema::Budget {
        usd: budget.nano_usd.map(Dollars),
        credit: budget.nano_usd.is_none().then_some(Dollars(0)),
        every: budget.every.as_deref().and_then(|text| parse_span(text).ok()),
        time_zone: budget.time_zone.clone(),
        alerts: budget.alerts.iter().map(|percent| Percent(*percent)).collect(),
        hard: budget.hard,
        on_exhausted: budget.on_exhausted,
        unpriced: budget.unpriced,
    }
}

impl Budget {
    /// What it is in force as, with this credit, nano-dollars. The gateway that was before this one took budgets with
    /// dollars and no period: they are there once.
    pub fn as_in_file(&self, credit: i64) -> schema::Budget {
        let prepaid = match self.nano_usd {
            Some(nano) => Dollars(nano),
            None => Dollars(u64::try_from(credit).unwrap_or_default()),
        };
        let wanted = as_wanted(self);
        match wanted.every {
            Some(_) => wanted,
            None => schema::Budget {
                usd: None,
                credit: Some(prepaid),
                ..wanted
            },
        }
    }
}

fn alerts(percents: &[u16]) -> Result<Vec<u16>, Failure> {
    let max = schema::ALERTS_MAX;
    if percents.len() > max || percents.iter().any(|percent| !PERCENTS.contains(percent)) {
        return Err(Failure::invalid(format!(
            "`alerts` are at most {max} percents from 1 to 1000"
        )));
    }
    let mut percents = percents.to_vec();
    percents.sort_unstable();
    percents.dedup();
    Ok(percents)
}

fn amount(text: &str) -> Result<u64, Failure> {
    parse_usd(text)
        .filter(|nano| *nano <= NANO_USD_MAX)
        .ok_or_else(|| {
            Failure::invalid(
                "`usd` is a decimal from 0 to 1000000000 with at most nine places, for example \"12.50\"",
            )
        })
}

fn signed_amount(text: &str) -> Result<i64, Failure> {
    let nano = match text.strip_prefix('-') {
        Some(rest) => -(amount(rest)? as i64),
        None => amount(text)? as i64,
    };
    match nano {
        0 => Err(Failure::invalid("`usd` is zero")),
        nano => Ok(nano),
    }
}

/// Reads decimal dollars as nano-dollars, exactly.
fn parse_usd(text: &str) -> Option<u64> {
    let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(part) || part.len() > 9 || whole.len() > 10 {
        return None;
    }
    let part = format!("{part:0<9}");
    whole
        .parse::<u64>()
        .ok()?
        .checked_mul(NANO_PER_USD)?
        .checked_add(part.parse().ok()?)
}

/// Writes nano-dollars as decimal dollars, exactly and without needless zeros.
pub fn usd(nano: i64) -> String {
    let sign = if nano < 0 { "-" } else { "" };
    let nano = nano.unsigned_abs();
    let (whole, part) = (nano / NANO_PER_USD, nano % NANO_PER_USD);
    if part == 0 {
        return format!("{sign}{whole}");
    }
    let part = format!("{part:09}");
    format!("{sign}{whole}.{}", part.trim_end_matches('0'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn dollars_are_read_exactly() {
        for (text, nano) in [
            ("0", 0),
            ("12.5", 12_500_000_000),
            ("0.000000001", 1),
            ("1000000000", NANO_USD_MAX),
        ] {
            assert_eq!(amount(text).expect("an amount"), nano);
        }
        for wrong in [
            "",
            ".5",
            "5.",
            "1e3",
            "-1",
            "+1",
            "1,5",
            "0.0000000001",
            "1000000000.1",
            "99999999999",
            "٣",
        ] {
            assert!(amount(wrong).is_err(), "{wrong}");
        }
        assert_eq!(signed_amount("-2.25").expect("an amount"), -2_250_000_000);
        assert!(signed_amount("-0").is_err());
    }

    proptest! {
        #[test]
        fn what_is_written_reads_as_the_same(nano in -(NANO_USD_MAX as i64)..=NANO_USD_MAX as i64) {
            prop_assume!(nano != 0);
            prop_assert_eq!(signed_amount(&usd(nano)).expect("an amount"), nano);
        }
    }
}
