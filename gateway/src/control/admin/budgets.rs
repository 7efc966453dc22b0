//! `/v1/budgets`: what may be spent, and prepaid credit.

use std::sync::Arc;

use axum::{
    Json,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Failure,
    access::{
        By, Names, PAGE_MAX, Page, Params, Source, Tagged, cursor, moment, page_size, read_cursor, seen,
    },
    parse,
    routes::{App, Operation, Routes},
};
use crate::{
    config::schema::{OnExhausted, Unpriced},
    control::store::{self, Budget, BudgetSettings, Db, NewTopUp, Row, Scope, Standing, TopUp, usd},
    quota::{self, Quota, Subject, window::Window},
};

pub fn routes(routes: Routes) -> Routes {
    let op = |id, summary| Operation::new(id, "budgets", summary);
    const ONE: &str = "The budget.";
    routes
        .get(
            "/v1/budgets",
            list,
            op(
                "listBudgets",
                "List budgets by name, those of the configuration file too, and how they stand",
            )
            .query::<BudgetQuery>()
            .answer::<BudgetList>(StatusCode::OK, "A page of budgets."),
        )
        .get(
            "/v1/budgets/{scope}/{name}",
            show,
            op("getBudget", "Show a budget; the gateway's own is `gateway/all`")
                .answer::<BudgetView>(StatusCode::OK, ONE),
        )
        .put(
            "/v1/budgets/{scope}/{name}",
            set,
            op("setBudget", "Make a budget, or change it to this")
                .body::<BudgetSettings>()
                .if_match()
                .answer::<BudgetView>(StatusCode::OK, ONE),
        )
        .delete(
            "/v1/budgets/{scope}/{name}",
            delete,
            op("deleteBudget", "Forget a budget and its credit")
                .if_match()
                .no_content("It is gone."),
        )
        .get(
            "/v1/budgets/{scope}/{name}/topups",
            topups,
            op("listTopUps", "List the credit that was added, by reference")
                .query::<Page>()
                .answer::<TopUpList>(StatusCode::OK, "A page of top-ups."),
        )
        .post(
            "/v1/budgets/{scope}/{name}/topups",
            top_up,
            op("topUpBudget", "Add prepaid credit, once for each reference")
                .body::<NewTopUp>()
                .answer::<BudgetView>(StatusCode::CREATED, "It was added.")
                .answer::<BudgetView>(StatusCode::OK, "It had been added before."),
        )
}

/// Which budgets to list.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BudgetQuery {
    /// Entries at most, 1 to 1000.
    #[schemars(range(min = 1, max = PAGE_MAX))]
    limit: Option<usize>,
    /// The `next` of the page before.
    after: Option<String>,
    /// Only budgets of this scope.
    scope: Option<Scope>,
}

/// A budget.
#[derive(Debug, Serialize, JsonSchema)]
pub struct BudgetView {
    scope: Scope,
    /// The key's, team's or organization's name; `all` for the gateway.
    name: String,
    source: Source,
    /// Dollars a period; null: prepaid credit.
    usd: Option<String>,
    /// The period; null for credit.
    every: Option<String>,
    /// Of calendar periods; null for others.
    time_zone: Option<String>,
    /// Percents of use at which somebody is told.
    alerts: Vec<u16>,
    /// Those of them that were told in this period.
    alerts_told: Vec<u16>,
    hard: bool,
    on_exhausted: OnExhausted,
    unpriced: Unpriced,
    /// All prepaid dollars that were added, used ones too.
    credit_usd: String,
    /// Dollars used for good in this period, of the credit in all.
    spent_usd: String,
    /// Dollars that running requests of this host have reserved.
    reserved_usd: String,
    /// Dollars that may be used now: of the period, or of the credit.
    left_usd: String,
    /// The end of the period; null for credit, and where nothing is used.
    resets_at: Option<String>,
    created_at: Option<String>,
    updated_at: Option<String>,
    /// Rises with each change; the `ETag` is made of it.
    version: Option<u64>,
}

/// A page of budgets.
#[derive(Debug, Serialize, JsonSchema)]
pub struct BudgetList {
    data: Vec<BudgetView>,
    /// `after` of the next page; null at the end.
    next: Option<String>,
}

/// Credit that was added.
#[derive(Debug, Serialize, JsonSchema)]
pub struct TopUpView {
    reference: String,
    usd: String,
    at: String,
    /// The name of the token that added it.
    by: String,
}

/// A page of top-ups.
#[derive(Debug, Serialize, JsonSchema)]
pub struct TopUpList {
    data: Vec<TopUpView>,
    /// `after` of the next page; null at the end.
    next: Option<String>,
}

impl BudgetView {
    /// One that was made at run time.
    fn of((row, credit): &Standing, quota: &Quota) -> BudgetView {
        let budget = &row.doc;
        let subject = Subject::new(budget.scope.name(), &budget.name);
        let in_force = subject.and_then(|subject| quota.budgets.get(&subject));
        let stands = in_force.map(|in_force| quota.budgets.status(&in_force, &quota.levels));
        let view = BudgetView {
            scope: budget.scope,
            name: budget.name.clone(),
            source: Source::Runtime,
            usd: budget.nano_usd.map(dollars),
            every: budget.every.clone(),
            time_zone: stands.as_ref().and_then(|stands| zone(&stands.budget)),
            alerts: budget.alerts.clone(),
            alerts_told: Vec::new(),
            hard: budget.hard,
            on_exhausted: budget.on_exhausted,
            unpriced: budget.unpriced,
            credit_usd: usd(*credit),
            spent_usd: usd(0),
            reserved_usd: usd(0),
            left_usd: usd(0),
            resets_at: None,
            created_at: Some(moment(budget.created_ms)),
            updated_at: Some(moment(budget.updated_ms)),
            version: Some(row.version),
        };
        match stands {
            Some(stands) => view.standing(&stands),
            None => view,
        }
    }

    /// One of the configuration file.
    fn of_file(scope: Scope, budget: &Arc<quota::budget::Budget>, quota: &Quota) -> BudgetView {
        let stands = quota.budgets.status(budget, &quota.levels);
        let is_credit = budget.is_credit();
        let every = budget.rule.every();
        let view = BudgetView {
            scope,
            name: file_name(budget).to_owned(),
            source: Source::File,
            usd: (!is_credit).then(|| dollars(stands.amount)),
            // The kind of the window stands before its length.
            every: every
                .split(' ')
                .next_back()
                .filter(|_| !is_credit)
                .map(str::to_owned),
            time_zone: zone(budget),
            alerts: budget.alerts().to_vec(),
            alerts_told: Vec::new(),
            hard: budget.rule.hard,
            on_exhausted: budget.rule.on_exhausted,
            unpriced: budget.rule.unpriced,
            credit_usd: if is_credit { dollars(stands.amount) } else { usd(0) },
            spent_usd: usd(0),
            reserved_usd: usd(0),
            left_usd: usd(0),
            resets_at: None,
            created_at: None,
            updated_at: None,
            version: None,
        };
        view.standing(&stands)
    }

    fn standing(self, stands: &quota::budget::Status) -> BudgetView {
        BudgetView {
            alerts_told: stands.told.clone(),
            spent_usd: dollars(stands.used),
            reserved_usd: dollars(stands.reserved),
            left_usd: dollars(stands.standing.remaining),
            resets_at: stands.resets_at_ms.map(moment),
            ..self
        }
    }

    fn answer(app: &App, status: StatusCode, standing: &Standing) -> Response {
        let quota = quota_of(app);
        Tagged::row(status, &standing.0, BudgetView::of(standing, &quota)).into_response()
    }
}

/// The time zone by which a budget counts, where it is of the calendar.
fn zone(budget: &quota::budget::Budget) -> Option<String> {
    match &budget.rule.window {
        Window::Calendar(calendar) => Some(calendar.zone()?.to_owned()),
        _ => None,
    }
}

fn quota_of(app: &App) -> Arc<Quota> {
    app.directory().shared.snapshot.load().quota.clone()
}

fn dollars(nano: u64) -> String {
    usd(i64::try_from(nano).unwrap_or(i64::MAX))
}

/// The name under which the API knows a budget of the file.
fn file_name(budget: &quota::budget::Budget) -> &str {
    match &budget.subject {
        Subject::Gateway => "all",
        other => other.name(),
    }
}

/// The budgets of the configuration file that are in force, each with its scope.
fn in_file(quota: &Quota) -> Vec<(Scope, Arc<quota::budget::Budget>)> {
    let scope = |budget: &Arc<quota::budget::Budget>| match budget.subject {
        Subject::Key(_) => Scope::Key,
        Subject::Team(_) => Scope::Team,
        Subject::Organization(_) => Scope::Organization,
        Subject::Gateway => Scope::Gateway,
    };
    let all = quota.budgets.of_file();
    let in_force = all.iter().filter(|budget| {
        let in_force = quota.budgets.get(&budget.subject);
        in_force.is_some_and(|in_force| !in_force.at_run_time)
    });
    in_force.map(|budget| (scope(budget), budget.clone())).collect()
}

async fn list(
    State(app): State<App>,
    Params(query): Params<BudgetQuery>,
) -> Result<Json<BudgetList>, Failure> {
    let size = page_size(query.limit)?;
    let after = read_cursor(query.after.as_deref())?;
    let scope = query.scope.map(Scope::name).unwrap_or_default();
    let quota = quota_of(&app);
    let of_file = in_file(&quota);
    let wanted = of_file.iter().filter(|(scope, budget)| {
        let name = file_name(budget);
        let id = Budget::id_of(*scope, name);
        query.scope.is_none_or(|wanted| wanted == *scope)
            && (name, id.as_str()) > (after.0.as_str(), after.1.as_str())
    });
    let mut data: Vec<BudgetView> = wanted
        .map(|(scope, budget)| BudgetView::of_file(*scope, budget, &quota))
        .collect();
    let look = move |db: &mut Db| {
        let rows = db.list::<Budget>(scope, (&after.0, &after.1), size + 1)?;
        rows.into_iter()
            .map(|row| db.standing(row))
            .collect::<Result<Vec<Standing>, store::Failure>>()
    };
    let rows = app.directory().store.change(look).await?;
    data.extend(rows.iter().map(|standing| BudgetView::of(standing, &quota)));
    let place = |view: &BudgetView| (view.name.clone(), Budget::id_of(view.scope, &view.name));
    data.sort_by_cached_key(place);
    let more = data.len() > size;
    data.truncate(size);
    let last = data.last().filter(|_| more).map(place);
    let next = last.map(|(name, id)| cursor(&name, &id));
    Ok(Json(BudgetList { data, next }))
}

async fn show(
    State(app): State<App>,
    Names((scope, name)): Names<(Scope, String)>,
) -> Result<Response, Failure> {
    let quota = quota_of(&app);
    let in_force = Subject::new(scope.name(), &name).and_then(|subject| quota.budgets.get(&subject));
    if let Some(budget) = in_force.filter(|budget| !budget.at_run_time && file_name(budget) == name) {
        return Ok(Json(BudgetView::of_file(scope, &budget, &quota)).into_response());
    }
    let standing = app
        .directory()
        .store
        .change(move |db| db.budget(scope, &name))
        .await?;
    Ok(BudgetView::answer(&app, StatusCode::OK, &standing))
}

async fn set(
    State(app): State<App>,
    By(who): By,
    Names((scope, name)): Names<(Scope, String)>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, Failure> {
    let settings: BudgetSettings = parse(&body)?;
    let (seen, actor, of) = (seen(&headers)?, who.clone(), name.clone());
    let known = app.directory().names.load_full();
    let change = move |db: &mut Db| {
        let exists = match scope {
            Scope::Key => known.key(&of).is_some() || !db.named::<store::Key>(&of)?.is_empty(),
            Scope::Team => known.has_team(&of) || db.has_team(&of)?,
            Scope::Organization | Scope::Gateway => true,
        };
        if !exists {
            let what = scope.name();
            return Err(store::Failure::invalid(format!(
                "there is no {what} of this name"
            )));
        }
        db.set_budget((scope, &of), seen, &settings, &actor.name)
    };
    let standing = app.directory().store.change(change).await?;
    tracing::info!(by = %who.name, scope = scope.name(), name, "budget set");
    Ok(BudgetView::answer(&app, StatusCode::OK, &standing))
}

async fn delete(
    State(app): State<App>,
    By(who): By,
    Names((scope, name)): Names<(Scope, String)>,
    headers: HeaderMap,
) -> Result<StatusCode, Failure> {
    let (seen, actor, of) = (seen(&headers)?, who.clone(), name.clone());
    let change = move |db: &mut Db| db.delete_budget(scope, &of, seen, &actor.name);
    app.directory().store.change(change).await?;
    tracing::info!(by = %who.name, scope = scope.name(), name, "budget deleted");
    Ok(StatusCode::NO_CONTENT)
}

async fn topups(
    State(app): State<App>,
    Names((scope, name)): Names<(Scope, String)>,
    Params(page): Params<Page>,
) -> Result<Json<TopUpList>, Failure> {
    let size = page_size(page.limit)?;
    let after = read_cursor(page.after.as_deref())?;
    let look = move |db: &mut Db| {
        db.budget(scope, &name)?;
        db.list::<TopUp>(&Budget::id_of(scope, &name), (&after.0, &after.1), size + 1)
    };
    let rows = app.directory().store.change(look).await?;
    let more = rows.len() > size;
    let last = rows.get(size - 1).filter(|_| more);
    let next = last.map(|row| cursor(&row.doc.reference, &store::Doc::id(&row.doc)));
    let view = |row: &Row<TopUp>| TopUpView {
        reference: row.doc.reference.clone(),
        usd: usd(row.doc.nano_usd),
        at: moment(row.doc.at_ms),
        by: row.doc.by.clone(),
    };
    let data = rows.iter().take(size).map(view).collect();
    Ok(Json(TopUpList { data, next }))
}

async fn top_up(
    State(app): State<App>,
    By(who): By,
    Names((scope, name)): Names<(Scope, String)>,
    body: Bytes,
) -> Result<Response, Failure> {
    let new: NewTopUp = parse(&body)?;
    let (actor, of, amount) = (who.clone(), name.clone(), new.usd.clone());
    let change = move |db: &mut Db| db.top_up(scope, &of, &new, &actor.name);
    let (standing, fresh) = app.directory().store.change(change).await?;
    if fresh {
        tracing::info!(by = %who.name, scope = scope.name(), name, usd = amount, "credit added");
    }
    let status = if fresh {
        StatusCode::CREATED
    } else {
        StatusCode::OK
    };
    Ok(BudgetView::answer(&app, status, &standing))
}
