//! Limits, budgets, teams and organizations.

use jiff::tz::TimeZone;

use super::{Known, MONTH, SECOND, name, refers, root, span, unique_names};
use crate::{
    config::{
        Config,
        error::quote,
        load::Report,
        schema::{ALERTS_MAX, Budget, Limit, OnExhausted, Per, WindowKind},
        tree::Path,
        units::Span,
    },
    quota::policy::part,
};

/// Limit policies of one configuration: a request may have to be compared with all of them.
const LIMITS_MAX: usize = 100_000;

pub(super) fn groups(config: &Config, known: &Known<'_>, report: &mut Report<'_>) {
    unique_names(
        "teams",
        config.teams.iter().map(|team| team.name.as_str()),
        report,
    );
    let organizations = config.organizations.iter();
    unique_names(
        "organizations",
        organizations.map(|organization| organization.name.as_str()),
        report,
    );
    for (index, team) in config.teams.iter().enumerate() {
        if let Some(organization) = &team.organization {
            let path = root("teams").index(index).name("organization");
            refers(&path, "organization", organization, &known.organizations, report);
        }
    }
}

pub(super) fn limits(config: &Config, known: &Known<'_>, report: &mut Report<'_>) {
    if config.limits.len() > LIMITS_MAX {
        let count = config.limits.len();
        return report.error(
            &root("limits"),
            format!("{count} limits; the most is {LIMITS_MAX}"),
        );
    }
    for (index, limit) in config.limits.iter().enumerate() {
        let path = root("limits").index(index);
        if let Some(text) = &limit.name {
            name(&path.name("name"), text, report);
        }
        amounts(&path, limit, report);
        window(&path, limit, report);
        per(&path.name("per"), limit, report);
        matches(&path.name("match"), limit, known, report);
    }
}

fn amounts(path: &Path, limit: &Limit, report: &mut Report<'_>) {
    let counted = [
        limit.requests,
        limit.input_tokens,
        limit.output_tokens,
        limit.tokens,
    ];
    let is_timed = limit.usd.is_some() || counted.iter().any(Option::is_some);
    if !is_timed && limit.parallel.is_none() {
        let message = "a limit needs an amount: `requests`, `tokens`, `input_tokens`, `output_tokens`, `usd` or `parallel`";
        report.error(path, message);
    }
    if limit.usd.is_some_and(|usd| usd.0 == 0) {
        report.error(&path.name("usd"), "0 permits nothing; the least is 0.000000001");
    }
    match limit.every {
        None if is_timed => report.error(path, "missing field `every`"),
        Some(_) if !is_timed => report.warning(
            &path.name("every"),
            "`parallel` is not counted by time: `every` does nothing",
        ),
        _ => {}
    }
    if limit.on_exhausted == OnExhausted::Error && limit.parallel.is_some() && !is_timed {
        let message = "a stream never uses more than one parallel request: `on_exhausted` does nothing";
        report.warning(&path.name("on_exhausted"), message);
    }
}

fn window(path: &Path, limit: &Limit, report: &mut Report<'_>) {
    if let Some(every) = limit.every {
        span(&path.name("every"), every, SECOND, MONTH, report);
        if limit.window == WindowKind::Calendar && part(every).is_none() {
            let message = format!("{every} is no period of the calendar; write 1h, 1d, 1w or 1mo");
            report.error(&path.name("every"), message);
        }
    }
    if let Some(zone) = &limit.time_zone {
        time_zone(&path.name("time_zone"), zone, report);
        if limit.window != WindowKind::Calendar {
            let message = "only `window: calendar` looks at a time zone";
            report.warning(&path.name("time_zone"), message);
        }
    }
}

fn time_zone(path: &Path, zone: &str, report: &mut Report<'_>) {
    if TimeZone::get(zone).is_err() {
        let message = format!(
            "unknown time zone {}; write for example Europe/Berlin (the system's list is in /usr/share/zoneinfo)",
            quote(zone)
        );
        report.error(path, message);
    }
}

fn per(path: &Path, limit: &Limit, report: &mut Report<'_>) {
    let per = &limit.per.0;
    if per.is_empty() {
        report.error(path, "the list is empty; write `shared` for one count for all");
    }
    if per.contains(&Per::Shared) && per.len() > 1 {
        report.error(path, "`shared` stands alone");
    }
    for (index, word) in per.iter().enumerate() {
        if per[..index].contains(word) {
            report.error(&path.index(index), "stands there twice");
        }
    }
}

fn matches(path: &Path, limit: &Limit, known: &Known<'_>, report: &mut Report<'_>) {
    let wanted = &limit.matches;
    if let Some(key) = &wanted.key
        && !known.keys.contains_key(key.as_str())
    {
        let message = format!(
            "no key {} in this file: the limit counts once one is made at run time",
            quote(key)
        );
        report.warning(&path.name("key"), message);
    }
    if let Some(team) = &wanted.team {
        refers(&path.name("team"), "team", team, &known.teams, report);
    }
    if let Some(organization) = &wanted.organization {
        let path = path.name("organization");
        refers(&path, "organization", organization, &known.organizations, report);
    }
    if let Some(model) = wanted.model.as_ref().filter(|model| !model.contains('*')) {
        refers(&path.name("model"), "model", model, &known.models, report);
    }
    if let Some(provider) = wanted
        .provider
        .as_ref()
        .filter(|provider| !provider.contains('*'))
    {
        refers(
            &path.name("provider"),
            "provider",
            provider,
            &known.providers,
            report,
        );
    }
    if wanted.client.as_ref().is_some_and(Vec::is_empty) {
        report.warning(
            &path.name("client"),
            "the list is empty: the limit counts nothing",
        );
    }
    let (Some(key), Some(team)) = (&wanted.key, &wanted.team) else {
        return;
    };
    if known
        .keys
        .get(key.as_str())
        .is_some_and(|of_key| *of_key != Some(team))
    {
        report.warning(
            path,
            format!("key `{key}` is not in team `{team}`: the limit counts nothing"),
        );
    }
}

pub(super) fn budgets(config: &Config, report: &mut Report<'_>) {
    let mut check = |path: Path, given: &Option<Budget>| {
        if let Some(given) = given {
            budget(&path.name("budget"), given, report);
        }
    };
    check(Path::default(), &config.budget);
    for (index, key) in config.keys.iter().enumerate() {
        check(root("keys").index(index), &key.budget);
    }
    for (index, team) in config.teams.iter().enumerate() {
        check(root("teams").index(index), &team.budget);
    }
    for (index, organization) in config.organizations.iter().enumerate() {
        check(root("organizations").index(index), &organization.budget);
    }
}

fn budget(path: &Path, budget: &Budget, report: &mut Report<'_>) {
    if let Err(problem) = check_budget(budget) {
        report.error(path, problem);
    }
}

/// Whether a budget makes sense, for the file and for those made at run time.
///
/// # Errors
/// Says what is wrong.
pub fn check_budget(budget: &Budget) -> Result<(), String> {
    match (budget.usd, budget.credit) {
        (None, None) => return Err("a budget needs `usd` or `credit`".into()),
        (Some(_), Some(_)) => {
            return Err("a budget has `usd` a period or prepaid `credit`, not both".into());
        }
        (Some(_), None) if budget.every.is_none() => {
            return Err("missing field `every`; a sum for all time is `credit`".into());
        }
        (None, Some(_)) if budget.every.is_some() => {
            return Err("`credit` does not come back: it has no `every`".into());
        }
        _ => {}
    }
    let is_in_bounds = |every: Span| (SECOND..=MONTH).contains(&every);
    if budget.every.is_some_and(|every| !is_in_bounds(every)) {
        return Err("`every` is 1s to 1mo".into());
    }
    if budget
        .time_zone
        .as_ref()
        .is_some_and(|zone| TimeZone::get(zone).is_err())
    {
        return Err("unknown time zone; write for example Europe/Berlin".into());
    }
    if budget.alerts.len() > ALERTS_MAX {
        return Err(format!("a budget has at most {ALERTS_MAX} alerts"));
    }
    Ok(())
}

pub(super) fn rest(config: &Config, report: &mut Report<'_>) {
    if let Some(url) = &config.alerts.webhook
        && let Err(problem) = crate::config::parse_endpoint(url)
    {
        report.error(&root("alerts").name("webhook"), problem.to_string());
    }
    if let Some(header) = &config.limit_state.user_header {
        let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
        if header.is_empty() || !header.bytes().all(is_token) {
            let path = root("limit_state").name("user_header");
            report.error(&path, format!("{} is no name of a header", quote(header)));
        }
    }
}
