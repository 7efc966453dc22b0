//! `/v1/audit`: who changed what.

use axum::{Json, extract::State, http::StatusCode};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    Failure,
    access::{PAGE_MAX, Params, moment, page_size},
    routes::{App, Operation, Routes},
};
use crate::control::store::{Db, Entry, Store};

pub fn routes(routes: Routes) -> Routes {
    routes.get(
        "/v1/audit",
        audit,
        Operation::new("listAudit", "audit", "List who changed what, the newest first")
            .query::<AuditQuery>()
            .answer::<AuditList>(StatusCode::OK, "A page of changes."),
    )
}

/// Notes a reload of the configuration and what came of it. The reload itself is done or refused by then: that it cannot be
/// noted is logged.
pub async fn note_reload(store: Store, by: String, result: Result<String, String>) {
    let detail = match result {
        Ok(message) => json!({ "done": message }),
        Err(reason) => json!({ "refused": reason }),
    };
    let entry = move |db: &mut Db| db.audit_deed(&by, "reload", "configuration", ("", ""), &detail);
    if let Err(failure) = store.change(entry).await {
        tracing::error!("a reload is not in the audit log: {failure}");
    }
}

/// Which changes to list.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AuditQuery {
    /// Entries at most, 1 to 1000.
    #[schemars(range(min = 1, max = PAGE_MAX))]
    limit: Option<usize>,
    /// Only entries with a smaller `seq`: the `next` of the page before.
    before: Option<u64>,
}

/// A change by an administrator.
#[derive(Debug, Serialize, JsonSchema)]
pub struct AuditView {
    seq: u64,
    at: String,
    /// The name of the token; `signal` for a reload by SIGHUP.
    by: String,
    /// create, update, rotate, revoke, delete, topup, reload, block or unblock.
    action: String,
    /// key, team, budget, configuration or client.
    kind: String,
    id: String,
    name: String,
    /// What was asked for; of a reload what came of it.
    detail: serde_json::Value,
}

/// A page of changes.
#[derive(Debug, Serialize, JsonSchema)]
pub struct AuditList {
    data: Vec<AuditView>,
    /// `before` of the next page; null at the end.
    next: Option<u64>,
}

async fn audit(
    State(app): State<App>,
    Params(query): Params<AuditQuery>,
) -> Result<Json<AuditList>, Failure> {
    let size = page_size(query.limit)?;
    let before = query.before.unwrap_or(u64::MAX);
    let look = move |db: &mut Db| db.audit_before(before, size);
    let entries = app.directory().store.change(look).await?;
    let next = entries
        .last()
        .filter(|_| entries.len() == size)
        .map(|entry| entry.seq);
    let view = |entry: Entry| AuditView {
        seq: entry.seq,
        at: moment(entry.unix_ms),
        by: entry.actor,
        action: entry.action,
        kind: entry.kind,
        id: entry.id,
        name: entry.name,
        detail: entry.detail,
    };
    Ok(Json(AuditList {
        data: entries.into_iter().map(view).collect(),
        next,
    }))
}
