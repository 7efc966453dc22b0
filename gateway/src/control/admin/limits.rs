//! `/v1/limits`: the policies in force in their order, and how those stand that bind a key's requests.

use std::{net::IpAddr, sync::Arc};

use axum::{Json, extract::State, http::StatusCode};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Failure,
    access::{PAGE_MAX, Params, moment, page_size},
    routes::{App, Operation, Routes},
};
use crate::{
    config::schema::{Match, Per},
    control::{access::Directory, store},
    quota::{Ids, Quota, Unit, inspect::Given, rule::Rule},
};

pub fn routes(routes: Routes) -> Routes {
    routes.get(
        "/v1/limits",
        list,
        Operation::new(
            "listLimits",
            "limits",
            "List limit policies in their order; with `key` those that may bind its requests, and how they stand",
        )
        .query::<LimitQuery>()
        .answer::<LimitList>(StatusCode::OK, "A page of limits."),
    )
}

/// Which limits to list: those that may bind requests which are as far as given so.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LimitQuery {
    /// Entries at most, 1 to 1000.
    #[schemars(range(min = 1, max = PAGE_MAX))]
    limit: Option<usize>,
    /// The `next` of the page before.
    #[schemars(regex(pattern = r"^[0-9]{1,9}$"))]
    after: Option<String>,
    /// Name of a key. Absent: all policies, and how none stands.
    key: Option<String>,
    /// Name of a virtual model; with `key`.
    model: Option<String>,
    /// The request's user; with `key`.
    user: Option<String>,
    /// Name of a provider; with `key`.
    provider: Option<String>,
    /// The request's path; with `key`.
    path: Option<String>,
    /// The client's address; with `key`.
    client: Option<IpAddr>,
}

/// A limit.
#[derive(Debug, Serialize, JsonSchema)]
pub struct LimitView {
    /// How answers and the ledger call it.
    name: String,
    /// `policy`, or `key`: one of the key's own.
    source: LimitSource,
    /// requests, input_tokens, output_tokens, tokens, usd or parallel.
    counts: &'static str,
    /// Units a window, a decimal; dollars where it counts `usd`.
    amount: String,
    /// The window: `1m` earns back continuously, `any 1h` slides, `calendar 1mo` is the calendar's.
    every: String,
    /// Who has an own count.
    per: Vec<Per>,
    /// Which requests it counts; what is null may be anything.
    #[serde(rename = "match")]
    matches: Match,
    /// How it stands; null without `key`, or where such requests have several counts: say their model, user, …
    standing: Option<StandingView>,
}

/// Where a limit comes from.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LimitSource {
    /// `limits` of the configuration file.
    Policy,
    /// `limits` of the key.
    Key,
}

/// How a limit stands.
#[derive(Debug, Serialize, JsonSchema)]
pub struct StandingView {
    /// Units that may be used now; what running requests have reserved is not among them.
    left: String,
    /// When nothing will be used up any more, or the period ends; null where time does not help or nothing is used.
    resets_at: Option<String>,
}

/// A page of limits.
#[derive(Debug, Serialize, JsonSchema)]
pub struct LimitList {
    data: Vec<LimitView>,
    /// `after` of the next page; null at the end.
    next: Option<String>,
}

/// Units for programs: a decimal.
fn number(unit: Unit, units: u64) -> String {
    unit.show(units).trim_start_matches('$').to_owned()
}

fn view(rule: &Rule, source: LimitSource, per: &[Per], matches: &Match) -> LimitView {
    LimitView {
        name: rule.name.to_string(),
        source,
        counts: rule.unit.name(),
        amount: number(rule.unit, rule.amount()),
        every: rule.every(),
        per: per.to_vec(),
        matches: matches.clone(),
        standing: None,
    }
}

fn standing(quota: &Quota, rule: &Rule, level: u64) -> StandingView {
    let (query, now) = (rule.query(level), quota.levels.now());
    let standing = quota.levels.standing(&query, now);
    StandingView {
        left: number(rule.unit, standing.remaining),
        resets_at: quota.levels.resets_at_ms(&query, &standing, now).map(moment),
    }
}

async fn list(State(app): State<App>, Params(query): Params<LimitQuery>) -> Result<Json<LimitList>, Failure> {
    let size = page_size(query.limit)?;
    let wrong = || Failure::bad_request("`after` is not the `next` of a page");
    let after = query.after.as_deref().map_or(Ok(0), str::parse::<usize>);
    let after = after.map_err(|_| wrong())?;
    let directory = app.directory();
    let described = [&query.model, &query.user, &query.provider, &query.path];
    if query.key.is_none() && (query.client.is_some() || described.iter().any(|given| given.is_some())) {
        return Err(Failure::bad_request(
            "say `key` too: the others describe its requests",
        ));
    }
    let all = match &query.key {
        None => of_all(directory, after, size + 1),
        Some(name) => of_key(directory, name, &query, after, size + 1).await?,
    };
    let more = all.len() > size;
    Ok(Json(LimitList {
        data: all.into_iter().take(size).collect(),
        next: more.then(|| (after + size).to_string()),
    }))
}

fn of_all(directory: &Directory, after: usize, most: usize) -> Vec<LimitView> {
    let snapshot = directory.shared.snapshot.load();
    let policies = &snapshot.policies;
    let places = (0..policies.len() as u32).skip(after).take(most);
    places
        .map(|place| {
            let policy = policies.get(place);
            view(&policy.rule, LimitSource::Policy, policy.per(), &policy.described)
        })
        .collect()
}

async fn of_key(
    directory: &Directory,
    name: &str,
    query: &LimitQuery,
    after: usize,
    most: usize,
) -> Result<Vec<LimitView>, Failure> {
    let key = key_named(directory, name).await?;
    let given = Given {
        ids: key.ids,
        user: query.user.as_deref(),
        model: query.model.as_deref(),
        provider: query.provider.as_deref(),
        path: query.path.as_deref(),
        client: query.client,
    };
    let snapshot = directory.shared.snapshot.load();
    let (policies, quota) = (&snapshot.policies, &snapshot.quota);
    let of_policies = policies.of_given(&given).map(|place| {
        let policy = policies.get(place);
        let level = policy.level_of_given(&given);
        LimitView {
            standing: level.map(|level| standing(quota, &policy.rule, level)),
            ..view(&policy.rule, LimitSource::Policy, policy.per(), &policy.described)
        }
    });
    let of_itself = Match {
        key: Some(name.to_owned()),
        ..Match::default()
    };
    let own = key.own.iter().flat_map(|own| own.iter()).map(|rule| LimitView {
        standing: Some(standing(quota, rule, rule.id)),
        ..view(rule, LimitSource::Key, &[Per::Key], &of_itself)
    });
    Ok(of_policies.chain(own).skip(after).take(most).collect())
}

/// A key as limits know it.
struct Known {
    ids: Ids,
    own: Option<Arc<[Arc<Rule>]>>,
}

async fn key_named(directory: &Directory, name: &str) -> Result<Known, Failure> {
    let (of, names) = (name.to_owned(), directory.names.load_full());
    let in_file = names.key(name);
    let team_organization = |team: &str| names.organization(team);
    if let Some(key) = in_file {
        let team = key.team.as_deref().unwrap_or_default();
        return Ok(Known {
            ids: Ids::new(name, team, team_organization(team).unwrap_or_default()),
            own: None,
        });
    }
    let look = move |db: &mut store::Db| {
        let row = db.named::<store::Key>(&of)?.into_iter().next();
        let Some(row) = row else {
            return Err(store::Failure::not_found("key"));
        };
        let team = row.doc.team.as_deref().unwrap_or_default();
        let organization = match db.get::<store::Team>(team)? {
            Some(team) => team.doc.organization,
            None => row.doc.organization.clone(),
        };
        Ok((row.doc, organization))
    };
    let (key, organization) = directory.store.change(look).await?;
    let team = key.team.as_deref().unwrap_or_default();
    let of_file = team_organization(team);
    let organization = organization.as_deref().or(of_file).unwrap_or_default();
    Ok(Known {
        ids: Ids::new(name, team, organization),
        own: key.rules(),
    })
}
