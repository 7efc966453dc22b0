//! `/v1/keys`: virtual keys.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Failure,
    access::{By, Names, Params, Source, Tagged, cursor, moment, page_size, read_cursor, seen},
    parse, parse_or_default,
    routes::{App, Operation, Routes},
};
use crate::{
    config::parse_sha256,
    control::{
        access::{Directory, FileKey, Names as Known},
        store::{self, Db, Key, KeyLimit, KeyPatch, NewKey, Revocation, Rotation, Row},
    },
    net::clock,
};

/// Rows that are looked at for one page, for each that it shall have: a rare state must not take the store for long.
const LOOK_PER_ENTRY: usize = 10;

pub fn routes(routes: Routes) -> Routes {
    let op = |id, summary| Operation::new(id, "keys", summary);
    const ONE: &str = "The key.";
    routes
        .get(
            "/v1/keys",
            list,
            op(
                "listKeys",
                "List keys by name, those of the configuration file too",
            )
            .query::<KeyQuery>()
            .answer::<KeyList>(StatusCode::OK, "A page of keys."),
        )
        .post(
            "/v1/keys",
            create,
            op(
                "createKey",
                "Make a key; its secret is in this answer and nowhere else",
            )
            .body::<NewKey>()
            .answer::<KeyWithSecret>(StatusCode::CREATED, "The key and its secret."),
        )
        .get(
            "/v1/keys/{id}",
            show,
            op("getKey", "Show a key").answer::<KeyView>(StatusCode::OK, ONE),
        )
        .patch(
            "/v1/keys/{id}",
            update,
            op("updateKey", "Change a key: what is absent stays, null clears")
                .body::<KeyPatch>()
                .if_match()
                .answer::<KeyView>(StatusCode::OK, ONE),
        )
        .delete(
            "/v1/keys/{id}",
            delete,
            op("deleteKey", "Forget a key; it ends as if revoked")
                .if_match()
                .no_content("It is gone."),
        )
        .post(
            "/v1/keys/{id}/rotate",
            rotate,
            op(
                "rotateKey",
                "Give a key a new secret; the old one stays good for an overlap",
            )
            .body::<Rotation>()
            .if_match()
            .answer::<KeyWithSecret>(StatusCode::OK, "The key and its new secret."),
        )
        .post(
            "/v1/keys/{id}/revoke",
            revoke,
            op("revokeKey", "End a key for ever, and what runs with it")
                .body::<Revocation>()
                .if_match()
                .answer::<KeyView>(StatusCode::OK, ONE),
        )
}

/// Which keys to list.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct KeyQuery {
    /// Entries at most, 1 to 1000; a page may hold fewer.
    #[schemars(range(min = 1, max = super::access::PAGE_MAX))]
    limit: Option<usize>,
    /// The `next` of the page before.
    after: Option<String>,
    /// Only keys of this team.
    team: Option<String>,
    /// Only keys in this state.
    state: Option<KeyState>,
    /// Only the key of this name.
    name: Option<String>,
    /// Only the key with this secret, by its SHA-256: for one that was found somewhere.
    sha256: Option<String>,
}

/// Whether a key is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KeyState {
    Active,
    /// Refused until it is enabled.
    Disabled,
    /// Its time is over.
    Expired,
    /// Ended for ever.
    Revoked,
}

/// A virtual key.
#[derive(Debug, Serialize, JsonSchema)]
pub struct KeyView {
    id: String,
    name: String,
    source: Source,
    state: KeyState,
    team: Option<String>,
    organization: Option<String>,
    /// Models that it may use; null: all.
    models: Option<Vec<String>>,
    /// Networks from which it may be used; none: any.
    networks: Vec<String>,
    tags: Vec<String>,
    metadata: BTreeMap<String, String>,
    /// Limits of its own, besides those of the configuration.
    limits: Vec<KeyLimit>,
    /// What it can be recognized by, the newest first.
    secrets: Vec<SecretView>,
    created_at: Option<String>,
    updated_at: Option<String>,
    expires_at: Option<String>,
    revoked_at: Option<String>,
    /// To about a minute over a crash, to a second otherwise.
    last_used_at: Option<String>,
    /// Rises with each change; the `ETag` is made of it.
    version: Option<u64>,
}

/// A secret of a key, without the secret.
#[derive(Debug, Serialize, JsonSchema)]
pub struct SecretView {
    /// Its beginning and its last four characters.
    hint: String,
    created_at: String,
    /// The end of its overlap with a newer one.
    expires_at: Option<String>,
}

/// A page of keys.
#[derive(Debug, Serialize, JsonSchema)]
pub struct KeyList {
    data: Vec<KeyView>,
    /// `after` of the next page; null at the end.
    next: Option<String>,
}

/// A key and its secret.
#[derive(Debug, Serialize, JsonSchema)]
pub struct KeyWithSecret {
    key: KeyView,
    /// Shown only this once; null where the caller has it already.
    secret: Option<String>,
}

impl KeyView {
    fn of(row: &Row<Key>, directory: &Directory, used_ms: Option<u64>) -> KeyView {
        let key = &row.doc;
        let now_ms = clock::unix_ms();
        let state = if key.revoked.is_some() {
            KeyState::Revoked
        } else if key.expires_ms.is_some_and(|at| at <= now_ms) {
            KeyState::Expired
        } else if key.disabled {
            KeyState::Disabled
        } else {
            KeyState::Active
        };
        let live = key
            .secrets
            .iter()
            .filter_map(|secret| directory.used_ms(&parse_sha256(&secret.sha256)?))
            .max();
        let secret = |secret: &store::Secret| SecretView {
            hint: secret.hint.clone(),
            created_at: moment(secret.created_ms),
            expires_at: secret.until_ms.map(moment),
        };
        KeyView {
            id: key.id.clone(),
            name: key.name.clone(),
            source: Source::Runtime,
            state,
            team: key.team.clone(),
            organization: key.organization.clone(),
            models: key.models.clone(),
            networks: key.networks.iter().map(ToString::to_string).collect(),
            tags: key.tags.clone(),
            metadata: key.metadata.clone(),
            limits: key.limits.clone(),
            secrets: key.secrets.iter().map(secret).collect(),
            created_at: Some(moment(key.created_ms)),
            updated_at: Some(moment(key.updated_ms)),
            expires_at: key.expires_ms.map(moment),
            revoked_at: key.revoked.as_ref().map(|revoked| moment(revoked.at_ms)),
            last_used_at: live.max(used_ms).map(moment),
            version: Some(row.version),
        }
    }

    fn of_file(key: &FileKey, directory: &Directory) -> KeyView {
        let names = directory.names.load();
        let organization = key.team.as_deref().and_then(|team| names.organization(team));
        KeyView {
            id: key.id.clone(),
            name: key.name.clone(),
            source: Source::File,
            state: KeyState::Active,
            team: key.team.clone(),
            organization: organization.map(str::to_owned),
            models: key.models.clone(),
            networks: Vec::new(),
            tags: Vec::new(),
            metadata: BTreeMap::new(),
            limits: Vec::new(),
            secrets: Vec::new(),
            created_at: None,
            updated_at: None,
            expires_at: None,
            revoked_at: None,
            last_used_at: directory.used_ms(&key.hash).map(moment),
            version: None,
        }
    }
}

/// A row and when its key was last used, as far as that is written down.
type Used = (Row<Key>, Option<u64>);

fn with_use(db: &Db, row: Row<Key>) -> Result<Used, store::Failure> {
    let used = db.used_ms(&row.doc.name)?;
    Ok((row, used))
}

async fn list(State(app): State<App>, Params(query): Params<KeyQuery>) -> Result<Response, Failure> {
    let directory = app.directory();
    let names = directory.names.load_full();
    let size = page_size(query.limit)?;
    let after = read_cursor(query.after.as_deref())?;
    if let Some(text) = &query.sha256 {
        return by_secret(directory, &names, text).await;
    }
    let (team, name) = (query.team.clone().unwrap_or_default(), query.name.clone());
    let look = match query.state {
        Some(_) => size.saturating_mul(LOOK_PER_ENTRY),
        None => size + 1,
    };
    let behind = after.clone();
    let rows = directory
        .store
        .change(move |db| {
            let rows = match &name {
                Some(name) => db.named::<Key>(name)?,
                None => db.list::<Key>(&team, (&behind.0, &behind.1), look)?,
            };
            rows.into_iter()
                .map(|row| with_use(db, row))
                .collect::<Result<Vec<_>, _>>()
        })
        .await?;
    let whole = query.name.is_some() || rows.len() < look;
    let mut views: Vec<KeyView> = rows
        .iter()
        .map(|(row, used)| KeyView::of(row, directory, *used))
        .collect();
    // What was not looked at comes behind the last row: a file's key from there on belongs to the next page.
    let border = views
        .last()
        .filter(|_| !whole)
        .map(|view| (view.name.clone(), view.id.clone()));
    let wanted = |key: &&FileKey| {
        let place = (key.name.as_str(), key.id.as_str());
        query
            .team
            .as_ref()
            .is_none_or(|team| key.team.as_ref() == Some(team))
            && query.name.as_ref().is_none_or(|name| key.name == *name)
            && place > (after.0.as_str(), after.1.as_str())
            && border
                .as_ref()
                .is_none_or(|(name, id)| place < (name.as_str(), id.as_str()))
    };
    views.extend(
        names
            .keys
            .iter()
            .filter(wanted)
            .map(|key| KeyView::of_file(key, directory)),
    );
    views.sort_by(|a, b| (&a.name, &a.id).cmp(&(&b.name, &b.id)));
    let mut next = border.map(|(name, id)| cursor(&name, &id));
    views.retain(|view| query.state.is_none_or(|state| view.state == state));
    if views.len() > size {
        views.truncate(size);
        next = views.last().map(|view| cursor(&view.name, &view.id));
    }
    Ok(axum::Json(KeyList { data: views, next }).into_response())
}

/// Whose secret it is.
async fn by_secret(directory: &Directory, names: &Known, text: &str) -> Result<Response, Failure> {
    let hash = parse_sha256(text)
        .ok_or_else(|| Failure::bad_request("`sha256` is not a SHA-256 of 64 hex digits"))?;
    let in_file = names.keys.iter().find(|key| key.hash == hash);
    let found = directory
        .store
        .change(move |db| match db.owner(&hash)? {
            Some(id) => Ok(Some(with_use(db, db.key(&id)?)?)),
            None => Ok(None),
        })
        .await?;
    let mut data: Vec<KeyView> = in_file
        .map(|key| KeyView::of_file(key, directory))
        .into_iter()
        .collect();
    data.extend(found.map(|(row, used)| KeyView::of(&row, directory, used)));
    Ok(axum::Json(KeyList { data, next: None }).into_response())
}

async fn show(State(app): State<App>, Names(id): Names<String>) -> Result<Response, Failure> {
    let directory = app.directory();
    let names = directory.names.load();
    if let Some(key) = names.keys.iter().find(|key| key.id == id) {
        return Ok(axum::Json(KeyView::of_file(key, directory)).into_response());
    }
    let (row, used) = directory
        .store
        .change(move |db| with_use(db, db.key(&id)?))
        .await?;
    Ok(Tagged::row(StatusCode::OK, &row, KeyView::of(&row, directory, used)).into_response())
}

/// Refuses what the configuration does not know, and names that it has taken.
fn check_names(
    db: &Db,
    known: &Known,
    name: Option<&str>,
    team: Option<&str>,
    models: Option<&[String]>,
) -> Result<(), store::Failure> {
    if name.is_some_and(|name| known.key(name).is_some()) {
        let message = "there is a key of this name in the configuration file";
        return Err(store::Failure::conflict(message));
    }
    if let Some(team) = team
        && !known.has_team(team)
        && !db.has_team(team)?
    {
        return Err(store::Failure::invalid("`team`: there is no team of this name"));
    }
    let unknown = models
        .unwrap_or_default()
        .iter()
        .find(|model| !known.models.contains(*model));
    match unknown {
        Some(model) => Err(store::Failure::invalid(format!(
            "`models`: there is no model `{model}`"
        ))),
        None => Ok(()),
    }
}

/// Refuses a secret of the configuration file: there it stands for another key.
fn refuse_file_secret(known: &Known, sha256: Option<&str>) -> Result<(), store::Failure> {
    let hash = sha256.and_then(parse_sha256);
    match hash.is_some_and(|hash| known.keys.iter().any(|key| key.hash == hash)) {
        true => Err(store::Failure::conflict(
            "a key of the configuration file has this secret",
        )),
        false => Ok(()),
    }
}

async fn create(State(app): State<App>, By(who): By, body: Bytes) -> Result<Response, Failure> {
    let new: NewKey = parse(&body)?;
    let directory = app.directory();
    let known = directory.names.load_full();
    refuse_file_secret(&known, new.sha256.as_deref())?;
    let actor = who.clone();
    let (row, secret) = directory
        .store
        .change(move |db| {
            check_names(
                db,
                &known,
                Some(&new.name),
                new.team.as_deref(),
                new.models.as_deref(),
            )?;
            db.create_key(&new, &actor.name)
        })
        .await?;
    tracing::info!(by = %who.name, key = %row.doc.name, "key created");
    let key = KeyView::of(&row, directory, None);
    Ok(Tagged::row(StatusCode::CREATED, &row, KeyWithSecret { key, secret }).into_response())
}

/// Runs a change of one key and shows what became of it.
async fn change(
    app: &App,
    id: &str,
    change: impl FnOnce(&mut Db, &str) -> Result<(Row<Key>, Option<String>), store::Failure> + Send + 'static,
) -> Result<(Row<Key>, KeyView, Option<String>), Failure> {
    refuse_file_key(app.directory(), id)?;
    let id = id.to_owned();
    let ((row, used), secret) = app
        .directory()
        .store
        .change(move |db| {
            let (row, secret) = change(db, &id)?;
            Ok((with_use(db, row)?, secret))
        })
        .await?;
    // The last use of a key that has just gone out of force is written down with its end.
    let used = match row.doc.revoked {
        Some(_) => {
            let name = row.doc.name.clone();
            let look = move |db: &mut Db| db.used_ms(&name);
            app.directory().store.change(look).await?
        }
        None => used,
    };
    let view = KeyView::of(&row, app.directory(), used);
    Ok((row, view, secret))
}

fn refuse_file_key(directory: &Directory, id: &str) -> Result<(), Failure> {
    match directory.names.load().keys.iter().any(|key| key.id == id) {
        true => Err(Failure::new(
            StatusCode::CONFLICT,
            "read_only",
            "the key stands in the configuration file: change it there and reload",
        )),
        false => Ok(()),
    }
}

async fn update(
    State(app): State<App>,
    By(who): By,
    Names(id): Names<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, Failure> {
    let patch: KeyPatch = parse(&body)?;
    let (seen, actor) = (seen(&headers)?, who.clone());
    let known: Arc<Known> = app.directory().names.load_full();
    let (row, view, _) = change(&app, &id, move |db, id| {
        let team = patch.team.as_ref().and_then(Option::as_deref);
        let models = patch.models.as_ref().and_then(Option::as_deref);
        check_names(db, &known, patch.name.as_deref(), team, models)?;
        Ok((db.update_key(id, seen, &patch, &actor.name)?, None))
    })
    .await?;
    tracing::info!(by = %who.name, key = %row.doc.name, "key updated");
    Ok(Tagged::row(StatusCode::OK, &row, view).into_response())
}

async fn rotate(
    State(app): State<App>,
    By(who): By,
    Names(id): Names<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, Failure> {
    let rotation: Rotation = parse_or_default(&body)?;
    refuse_file_secret(&app.directory().names.load(), rotation.sha256.as_deref())?;
    let (seen, actor) = (seen(&headers)?, who.clone());
    let (row, key, secret) = change(&app, &id, move |db, id| {
        db.rotate_key(id, seen, &rotation, &actor.name)
    })
    .await?;
    tracing::info!(by = %who.name, key = %row.doc.name, "key rotated");
    Ok(Tagged::row(StatusCode::OK, &row, KeyWithSecret { key, secret }).into_response())
}

async fn revoke(
    State(app): State<App>,
    By(who): By,
    Names(id): Names<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, Failure> {
    let revocation: Revocation = parse_or_default(&body)?;
    let (seen, actor) = (seen(&headers)?, who.clone());
    let (row, view, _) = change(&app, &id, move |db, id| {
        Ok((db.revoke_key(id, seen, &revocation, &actor.name)?, None))
    })
    .await?;
    tracing::info!(by = %who.name, key = %row.doc.name, "key revoked");
    Ok(Tagged::row(StatusCode::OK, &row, view).into_response())
}

async fn delete(
    State(app): State<App>,
    By(who): By,
    Names(id): Names<String>,
    headers: HeaderMap,
) -> Result<StatusCode, Failure> {
    refuse_file_key(app.directory(), &id)?;
    let (seen, actor, of) = (seen(&headers)?, who.clone(), id.clone());
    app.directory()
        .store
        .change(move |db| db.delete_key(&of, seen, &actor.name))
        .await?;
    tracing::info!(by = %who.name, id, "key deleted");
    Ok(StatusCode::NO_CONTENT)
}
