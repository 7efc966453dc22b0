//! Limit policies: which levels a request must pass, all of them or none.

use std::{collections::HashMap, sync::Arc};

use super::gcra::{Level, Rate, Standing};
use crate::config::schema::{Config, Key, Limit};

/// The levels of all limits, kept over reloads so that a new configuration does not forget what was used.
#[derive(Default)]
pub struct Table {
    levels: HashMap<String, Arc<Level>>,
}

/// What a limit counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Requests, when they are accepted.
    Requests,
    /// Tokens, input and output.
    Tokens,
}

impl Unit {
    /// The word used in answers and headers.
    pub fn name(self) -> &'static str {
        match self {
            Unit::Requests => "requests",
            Unit::Tokens => "tokens",
        }
    }
}

/// A limit as it binds one key.
#[derive(Debug, Clone)]
pub struct Bound {
    /// What it counts.
    pub unit: Unit,
    /// How much in what time.
    pub rate: Rate,
    /// Binds requests for this model only; `None`: for all.
    pub model: Option<Arc<str>>,
    /// How the limit is called in answers: `limits[2]`, its place in the configuration.
    pub name: Arc<str>,
    level: Arc<Level>,
}

/// What a request may use at most, as far as that is known before it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// Input tokens, estimated from the body's size.
    pub input: u64,
    /// Output tokens that the request permits, or the model's default.
    pub output: u64,
    /// The client named its output limit itself. Otherwise the reservation shrinks to what a limit can
    /// grant at all, because the client cannot know of the default.
    pub output_is_explicit: bool,
}

/// Why a request was not admitted.
#[derive(Debug, Clone)]
pub struct Denied {
    /// The limit that refused.
    pub name: Arc<str>,
    pub unit: Unit,
    pub rate: Rate,
    pub standing: Standing,
    /// Units that were asked for.
    pub asked: u64,
    /// It can never be admitted: it asks for more than a whole window grants.
    pub never: bool,
}

/// How the tightest limit of each unit stands, for `x-ratelimit-*`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Report {
    pub requests: Option<(Rate, Standing)>,
    pub tokens: Option<(Rate, Standing)>,
}

/// What an admitted request holds. Settled exactly once, by value.
#[must_use = "a reservation that is not settled is used up whole"]
#[derive(Debug, Default)]
pub struct Reservation {
    holds: Vec<Hold>,
}

#[derive(Debug)]
struct Hold {
    unit: Unit,
    rate: Rate,
    level: Arc<Level>,
    reserved: u64,
    /// When time alone will have given it back.
    until_ns: u64,
}

/// A granted request.
pub struct Admission {
    pub reservation: Reservation,
    pub report: Report,
}

impl Table {
    /// The bounds of one key, in the order of the configuration.
    pub fn bounds(&mut self, config: &Config, key: &Key) -> Vec<Bound> {
        let mut bounds = Vec::new();
        let mut places = HashMap::new();
        for (index, limit) in config.limits.iter().enumerate() {
            if !applies(limit, key) {
                continue;
            }
            for (unit, amount) in [(Unit::Requests, limit.requests), (Unit::Tokens, limit.tokens)] {
                let Some(amount) = amount else { continue };
                let rate = Rate {
                    amount: amount.max(1),
                    window_ns: limit.every.0.as_nanos() as u64,
                };
                bounds.push(Bound {
                    unit,
                    rate,
                    model: limit.matches.model.as_deref().map(Arc::from),
                    name: format!("limits[{index}]").into(),
                    level: self.level(limit, key, unit, &mut places),
                });
            }
        }
        bounds
    }

    /// A level is known by what its limit matches and its window, not by its amount or its place: changing the
    /// amount keeps the share that is used up. Limits that are alike in all that are told apart by their order, which
    /// `places` counts: two of them on one level would each pay for the other.
    fn level(
        &mut self,
        limit: &Limit,
        key: &Key,
        unit: Unit,
        places: &mut HashMap<String, usize>,
    ) -> Arc<Level> {
        let matches = &limit.matches;
        let mut identity = format!(
            "{:?} {:?} {:?} {:?} {:?} {}",
            matches.key, matches.team, matches.model, limit.every, unit, key.name,
        );
        let place = places.entry(identity.clone()).or_default();
        identity.push_str(&format!(" {place}"));
        *place += 1;
        self.levels.entry(identity).or_default().clone()
    }

    /// Forgets levels that no snapshot uses any more.
    pub fn sweep(&mut self) {
        self.levels.retain(|_, level| Arc::strong_count(level) > 1);
    }
}

fn applies(limit: &Limit, key: &Key) -> bool {
    let matches = &limit.matches;
    matches.key.as_ref().is_none_or(|name| *name == key.name)
        && matches
            .team
            .as_ref()
            .is_none_or(|team| Some(team) == key.team.as_ref())
}

/// Reserves against all bounds that concern `model`, all or nothing.
pub fn admit(bounds: &[Bound], model: &str, estimate: &Estimate, now_ns: u64) -> Result<Admission, Denied> {
    let mut admission = Admission {
        reservation: Reservation::default(),
        report: Report::default(),
    };
    for bound in bounds {
        if bound.model.as_deref().is_some_and(|only| only != model) {
            continue;
        }
        let asked = match bound.unit {
            Unit::Requests => 1,
            Unit::Tokens => tokens_asked(estimate, bound.rate.amount),
        };
        match bound.level.reserve(&bound.rate, asked, now_ns) {
            Ok(standing) => {
                admission.report.note(bound, standing);
                admission.reservation.holds.push(Hold {
                    unit: bound.unit,
                    rate: bound.rate,
                    level: bound.level.clone(),
                    reserved: asked,
                    until_ns: now_ns + standing.reset_ns,
                });
            }
            Err(standing) => {
                admission.reservation.cancel(now_ns);
                return Err(Denied {
                    name: bound.name.clone(),
                    unit: bound.unit,
                    rate: bound.rate,
                    standing,
                    asked,
                    never: asked > bound.rate.amount,
                });
            }
        }
    }
    Ok(admission)
}

fn tokens_asked(estimate: &Estimate, amount: u64) -> u64 {
    let whole = estimate.input.saturating_add(estimate.output);
    if estimate.output_is_explicit || estimate.input > amount {
        whole
    } else {
        whole.min(amount)
    }
}

impl Report {
    fn note(&mut self, bound: &Bound, standing: Standing) {
        let place = match bound.unit {
            Unit::Requests => &mut self.requests,
            Unit::Tokens => &mut self.tokens,
        };
        if place.is_none_or(|(_, seen)| standing.remaining < seen.remaining) {
            *place = Some((bound.rate, standing));
        }
    }
}

impl Hold {
    fn settle(&self, used: u64, now_ns: u64) {
        self.level
            .settle(&self.rate, self.reserved, used, self.until_ns, now_ns);
    }
}

impl Reservation {
    /// Trues everything up with what was really used.
    pub fn settle(self, tokens: u64, now_ns: u64) {
        for hold in &self.holds {
            if hold.unit == Unit::Tokens {
                hold.settle(tokens, now_ns);
            }
        }
    }

    /// Gives everything back, the request itself too: it was never accepted.
    pub fn cancel(self, now_ns: u64) {
        for hold in &self.holds {
            hold.settle(0, now_ns);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{
        schema::{Match, Per},
        units::Span,
    };

    const NOW: u64 = 10_000_000_000_000;

    fn key(name: &str, team: Option<&str>) -> Key {
        Key {
            name: name.into(),
            sha256: String::new(),
            team: team.map(Into::into),
            models: None,
        }
    }

    fn limit(matches: Match, requests: Option<u64>, tokens: Option<u64>) -> Limit {
        Limit {
            matches,
            per: Per::Key,
            requests,
            tokens,
            every: Span::secs(60),
        }
    }

    fn config(limits: Vec<Limit>) -> Config {
        let text = "listeners: [{ address: 127.0.0.1:0 }]";
        let mut config: Config = serde_saphyr::from_str(text).expect("a configuration");
        config.limits = limits;
        config
    }

    const SMALL: Estimate = Estimate {
        input: 10,
        output: 10,
        output_is_explicit: true,
    };

    #[test]
    fn all_or_nothing() {
        let config = config(vec![
            limit(Match::default(), Some(2), None),
            limit(Match::default(), None, Some(30)),
        ]);
        let bounds = Table::default().bounds(&config, &key("a", None));
        let first = admit(&bounds, "m", &SMALL, NOW)
            .map_err(|denied| denied.name)
            .expect("room");
        let denied = admit(&bounds, "m", &SMALL, NOW).err().expect("no tokens left");
        assert_eq!(
            (denied.unit, denied.name.as_ref(), denied.never),
            (Unit::Tokens, "limits[1]", false)
        );
        // The second try gave its request back: one is still there.
        assert_eq!(first.report.requests.expect("a limit").1.remaining, 1);
        first.reservation.settle(5, NOW);
        let second = admit(&bounds, "m", &SMALL, NOW)
            .map_err(|denied| denied.name)
            .expect("room");
        assert_eq!(second.report.requests.expect("a limit").1.remaining, 0);
        assert_eq!(second.report.tokens.expect("a limit").1.remaining, 5);
        second.reservation.settle(20, NOW);
    }

    #[test]
    fn matches_team_key_and_model() {
        let by = |key: Option<&str>, team: Option<&str>, model: Option<&str>| Match {
            key: key.map(Into::into),
            team: team.map(Into::into),
            model: model.map(Into::into),
        };
        let config = config(vec![
            limit(by(Some("a"), None, None), Some(1), None),
            limit(by(None, Some("t"), None), Some(1), None),
            limit(by(None, None, Some("m")), Some(1), None),
        ]);
        let mut table = Table::default();
        let names = |bounds: &[Bound]| bounds.iter().map(|b| b.name.to_string()).collect::<Vec<_>>();
        assert_eq!(
            names(&table.bounds(&config, &key("a", None))),
            ["limits[0]", "limits[2]"]
        );
        assert_eq!(
            names(&table.bounds(&config, &key("b", Some("t")))),
            ["limits[1]", "limits[2]"]
        );
        let only_model = table.bounds(&config, &key("c", None));
        assert!(admit(&only_model, "m", &SMALL, NOW).is_ok());
        assert!(admit(&only_model, "m", &SMALL, NOW).is_err());
        assert!(admit(&only_model, "other", &SMALL, NOW).is_ok());
    }

    #[test]
    fn an_implicit_output_shrinks_to_the_limit_and_an_explicit_one_does_not() {
        let config = config(vec![limit(Match::default(), None, Some(1_000))]);
        let bounds = Table::default().bounds(&config, &key("a", None));
        let implicit = Estimate {
            input: 10,
            output: 4_096,
            output_is_explicit: false,
        };
        let explicit = Estimate {
            output_is_explicit: true,
            ..implicit
        };
        assert!(admit(&bounds, "m", &explicit, NOW).is_err_and(|denied| denied.never));
        assert!(admit(&bounds, "m", &implicit, NOW).is_ok());
    }

    #[test]
    fn a_reload_keeps_what_was_used() {
        let mut table = Table::default();
        let before = config(vec![limit(Match::default(), Some(2), None)]);
        let bounds = table.bounds(&before, &key("a", None));
        assert!(admit(&bounds, "m", &SMALL, NOW).is_ok());
        assert!(admit(&bounds, "m", &SMALL, NOW).is_ok());
        let after = config(vec![limit(Match::default(), Some(4), None)]);
        let bounds = table.bounds(&after, &key("a", None));
        assert!(admit(&bounds, "m", &SMALL, NOW).is_err());
    }
}
