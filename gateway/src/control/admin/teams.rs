//! `/v1/teams`: groups of keys.

use std::collections::BTreeMap;

use axum::{
    Json,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
};
use schemars::JsonSchema;
use serde::Serialize;

use super::{
    Failure,
    access::{By, Names, Page, Params, Source, Tagged, cursor, moment, page_size, read_cursor, seen},
    parse,
    routes::{App, Operation, Routes},
};
use crate::control::store::{self, NewTeam, Row, Team, TeamPatch};

pub fn routes(routes: Routes) -> Routes {
    let op = |id, summary| Operation::new(id, "teams", summary);
    const ONE: &str = "The team.";
    routes
        .get(
            "/v1/teams",
            list,
            op(
                "listTeams",
                "List teams by name; those of the configuration file on the first page",
            )
            .query::<Page>()
            .answer::<TeamList>(StatusCode::OK, "A page of teams."),
        )
        .post(
            "/v1/teams",
            create,
            op("createTeam", "Make a team")
                .body::<NewTeam>()
                .answer::<TeamView>(StatusCode::CREATED, ONE),
        )
        .get(
            "/v1/teams/{name}",
            show,
            op("getTeam", "Show a team").answer::<TeamView>(StatusCode::OK, ONE),
        )
        .patch(
            "/v1/teams/{name}",
            update,
            op("updateTeam", "Change a team: what is absent stays, null clears")
                .body::<TeamPatch>()
                .if_match()
                .answer::<TeamView>(StatusCode::OK, ONE),
        )
        .delete(
            "/v1/teams/{name}",
            delete,
            op("deleteTeam", "Forget a team without keys")
                .if_match()
                .no_content("It is gone."),
        )
}

/// A team.
#[derive(Debug, Serialize, JsonSchema)]
pub struct TeamView {
    name: String,
    source: Source,
    organization: Option<String>,
    metadata: BTreeMap<String, String>,
    created_at: Option<String>,
    updated_at: Option<String>,
    /// Rises with each change; the `ETag` is made of it.
    version: Option<u64>,
}

/// A page of teams.
#[derive(Debug, Serialize, JsonSchema)]
pub struct TeamList {
    data: Vec<TeamView>,
    /// `after` of the next page; null at the end.
    next: Option<String>,
}

impl TeamView {
    fn of(row: &Row<Team>) -> TeamView {
        let team = &row.doc;
        TeamView {
            name: team.name.clone(),
            source: Source::Runtime,
            organization: team.organization.clone(),
            metadata: team.metadata.clone(),
            created_at: Some(moment(team.created_ms)),
            updated_at: Some(moment(team.updated_ms)),
            version: Some(row.version),
        }
    }

    fn of_file((name, organization): &(String, Option<String>)) -> TeamView {
        TeamView {
            name: name.clone(),
            source: Source::File,
            organization: organization.clone(),
            metadata: BTreeMap::new(),
            created_at: None,
            updated_at: None,
            version: None,
        }
    }
}

async fn list(State(app): State<App>, Params(page): Params<Page>) -> Result<Json<TeamList>, Failure> {
    let directory = app.directory();
    let size = page_size(page.limit)?;
    let after = read_cursor(page.after.as_deref())?;
    let rows = directory
        .store
        .change(move |db| db.list::<Team>("", (&after.0, &after.1), size + 1))
        .await?;
    let more = rows.len() > size;
    let views = rows.iter().take(size).map(TeamView::of);
    let mut data: Vec<TeamView> = views.collect();
    let next = data
        .last()
        .filter(|_| more)
        .map(|team| cursor(&team.name, &team.name));
    if page.after.is_none() {
        let names = directory.names.load();
        data.extend(names.teams.iter().map(TeamView::of_file));
        data.sort_by(|a, b| a.name.cmp(&b.name));
    }
    Ok(Json(TeamList { data, next }))
}

fn is_in_file(app: &App, name: &str) -> bool {
    app.directory().names.load().has_team(name)
}

fn refuse_file_team(app: &App, name: &str) -> Result<(), Failure> {
    match is_in_file(app, name) {
        true => Err(Failure::new(
            StatusCode::CONFLICT,
            "read_only",
            "the team stands in the configuration file: change it there and reload",
        )),
        false => Ok(()),
    }
}

async fn show(State(app): State<App>, Names(name): Names<String>) -> Result<Response, Failure> {
    if let Some(team) = app.directory().names.load().team(&name) {
        return Ok(Json(TeamView::of_file(team)).into_response());
    }
    let row = app.directory().store.change(move |db| db.team(&name)).await?;
    Ok(Tagged::row(StatusCode::OK, &row, TeamView::of(&row)).into_response())
}

async fn create(State(app): State<App>, By(who): By, body: Bytes) -> Result<Response, Failure> {
    let new: NewTeam = parse(&body)?;
    if is_in_file(&app, &new.name) {
        let message = "there is a team of this name in the configuration file";
        return Err(store::Failure::conflict(message).into());
    }
    let actor = who.clone();
    let change = move |db: &mut store::Db| db.create_team(&new, &actor.name);
    let row = app.directory().store.change(change).await?;
    tracing::info!(by = %who.name, team = %row.doc.name, "team created");
    Ok(Tagged::row(StatusCode::CREATED, &row, TeamView::of(&row)).into_response())
}

async fn update(
    State(app): State<App>,
    By(who): By,
    Names(name): Names<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, Failure> {
    let patch: TeamPatch = parse(&body)?;
    refuse_file_team(&app, &name)?;
    let (seen, actor) = (seen(&headers)?, who.clone());
    let change = move |db: &mut store::Db| db.update_team(&name, seen, &patch, &actor.name);
    let row = app.directory().store.change(change).await?;
    tracing::info!(by = %who.name, team = %row.doc.name, "team updated");
    Ok(Tagged::row(StatusCode::OK, &row, TeamView::of(&row)).into_response())
}

async fn delete(
    State(app): State<App>,
    By(who): By,
    Names(name): Names<String>,
    headers: HeaderMap,
) -> Result<StatusCode, Failure> {
    refuse_file_team(&app, &name)?;
    let (seen, actor, of) = (seen(&headers)?, who.clone(), name.clone());
    let change = move |db: &mut store::Db| db.delete_team(&of, seen, &actor.name);
    app.directory().store.change(change).await?;
    tracing::info!(by = %who.name, team = name, "team deleted");
    Ok(StatusCode::NO_CONTENT)
}
