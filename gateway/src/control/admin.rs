//! The admin API: health, metrics, state, reload and the kernel's blocks, over plain HTTP for the
//! operator's side of the network.
//!
//! | Request                | Answer                                                        |
//! |------------------------|---------------------------------------------------------------|
//! | `GET /healthz`         | `ok` while the control thread runs; the one without a token   |
//! | `GET /metrics`         | Prometheus text                                               |
//! | `GET /top`             | clients and keys, the busiest first: `?sort=tokens&limit=50`   |
//! | `GET /status`          | the state as JSON                                             |
//! | `POST /reload`         | puts the configuration file in force; 422 where it is wrong   |
//! | `GET /kernel`          | the kernel plane in detail                                    |
//! | `GET /kernel/clients`  | the clients with the most connections; `?max=100`             |
//! | `POST /kernel/block`   | `{"client": "203.0.113.7", "for": "10m"}`, also a network     |
//! | `POST /kernel/unblock` | `{"client": "203.0.113.7"}`, also a network                   |
//!
//! | `/v1/keys …`           | virtual keys ([`keys`])                                       |
//! | `/v1/teams …`          | groups of keys ([`teams`])                                    |
//! | `/v1/budgets …`        | budgets and credit ([`budgets`])                              |
//! | `GET /v1/limits`       | limit policies, and how those of a key stand ([`limits`])     |
//! | `GET /v1/audit`        | who changed what                                              |
//! | `GET /openapi.json`    | all of this as an OpenAPI 3.1 document                        |
//!
//! A token with the role `viewer` may only `GET`.
//!
//! Errors are `{"error": {"code": …, "message": …}}`. Everything is bounded: connections, the time
//! for a head and for a request, the size of heads and bodies.

mod access;
mod audit;
mod budgets;
pub mod kernel;
mod keys;
mod limits;
mod routes;
mod state;
mod teams;
#[cfg(test)]
mod tests;
mod token;
pub mod top;

use std::{
    future::Future,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, Request, State},
    http::{HeaderMap, Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use ipnet::IpNet;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::JoinSet,
};

use super::access::Directory;
use crate::{config::schema::Role, telemetry::prometheus};
use access::By;
use kernel::Target;
use routes::{Operation, Routes};

pub use audit::note_reload;
pub use token::{Guard, token, token_path, tokens};

/// Connections at the same time; more wait in the listener's queue. A scraper and a few people.
const CONNECTIONS_MAX: usize = 64;

/// Longest time for a head, and for which an idle connection is kept. Twice the usual interval of
/// scrapes, so that a scraper keeps its connection.
const HEAD_TIME_MAX: Duration = Duration::from_secs(30);

/// Longest time from head to answer.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(10);

/// Largest head, bytes.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// Largest body, bytes. The largest that makes sense is a few hundred.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// How long running requests may go on after the end was asked for.
const END_TIME_MAX: Duration = Duration::from_millis(300);

/// A future that a [`Plane`] gives.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What the admin API shows and moves.
pub trait Plane: Send + Sync + 'static {
    /// The state, for `gateway status`.
    fn status(&self) -> BoxFuture<'_, Value>;
    /// Prometheus text.
    fn metrics(&self) -> BoxFuture<'_, String>;
    /// Clients and keys, for `gateway top`.
    fn top(&self, _query: &top::Query) -> Value {
        Value::Null
    }
    /// Puts the configuration file in force; says what happened, or why nothing did.
    fn reload(&self) -> Result<String, String>;
    /// The kernel plane in detail.
    fn kernel_status(&self) -> Value;
    /// The clients with the most open connections, at most so many; or why there are none.
    fn kernel_clients(&self, max: usize) -> Result<Value, String>;
    /// Drops new connections of a client or network for this long, and says of which network; or why not.
    fn kernel_block(&self, target: Target, hold: Duration) -> Result<IpNet, String>;
    /// Lifts a block, and says of which network; false where there was none.
    fn kernel_unblock(&self, target: Target) -> Result<(IpNet, bool), String>;
    /// Keys, teams and budgets.
    fn directory(&self) -> &Directory;
}

/// Binds the admin API's address.
///
/// # Errors
/// The address is in use, or not of this host.
pub fn bind(address: SocketAddr) -> anyhow::Result<std::net::TcpListener> {
    let listener = std::net::TcpListener::bind(address)
        .with_context(|| format!("cannot listen at admin.address {address}"))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Serves the admin API until `stop`; then gives running requests [`END_TIME_MAX`].
pub async fn serve<P: Plane>(
    listener: TcpListener,
    plane: Arc<P>,
    guard: Arc<Guard>,
    stop: impl Future<Output = ()>,
) {
    let router = router(plane, guard);
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let (ending, end) = watch::channel(());
    let mut connections = JoinSet::new();
    let mut stop = pin!(stop);
    loop {
        let accepted = tokio::select! {
            () = &mut stop => break,
            accepted = accept(&listener, &room) => accepted,
            // Ended ones are taken off, so that the set does not grow.
            Some(_) = connections.join_next() => continue,
        };
        let (stream, place) = accepted;
        let connection = serve_connection(stream, router.clone(), end.clone());
        connections.spawn(async move {
            connection.await;
            drop(place);
        });
    }
    drop(listener);
    drop(ending);
    // Those that are not done by then are aborted with the set.
    let _ = tokio::time::timeout(END_TIME_MAX, async {
        while connections.join_next().await.is_some() {}
    })
    .await;
}

/// The next connection, when there is room for it.
async fn accept(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
) -> (TcpStream, tokio::sync::OwnedSemaphorePermit) {
    /// Out of descriptors or memory: the kernel would say so again at once.
    const PAUSE: Duration = Duration::from_millis(100);
    loop {
        let Ok(place) = room.clone().acquire_owned().await else {
            // The semaphore is never closed.
            std::future::pending::<()>().await;
            continue;
        };
        match listener.accept().await {
            Ok((stream, _)) => return (stream, place),
            Err(error) => {
                tracing::warn!(%error, "the admin API cannot accept a connection");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn serve_connection(stream: TcpStream, router: Router, mut end: watch::Receiver<()>) {
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        _ = end.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "a connection of the admin API ended early");
    }
}

/// The routes. What is not `/healthz` passes the guard first, also what does not exist: a stranger
/// does not learn which paths there are.
fn router<P: Plane>(plane: Arc<P>, guard: Arc<Guard>) -> Router {
    let plane: Arc<dyn Plane> = plane;
    let (routes, mut document) = described().finish();
    document["paths"]["/healthz"] = json!({ "get": {
        "operationId": "health", "tags": ["state"], "security": [],
        "summary": "Whether the control thread runs; without a token",
        "responses": { "200": {
            "description": "It does.", "content": { "text/plain": { "schema": { "type": "string" } } },
        } },
    } });
    let document = Bytes::from(document.to_string());
    routes
        .route("/openapi.json", get(async move || openapi(document)))
        .fallback(async || Failure::new(StatusCode::NOT_FOUND, "not_found", "no such path"))
        .method_not_allowed_fallback(async || {
            Failure::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "method_not_allowed",
                "not with this method",
            )
        })
        .layer(middleware::from_fn_with_state(guard, admit))
        .route("/healthz", get(async || "ok\n"))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(plane)
}

/// All routes that stand in the OpenAPI document.
fn described() -> Routes {
    let state = |id, summary| Operation::new(id, "state", summary);
    let routes = Routes::default()
        .get(
            "/metrics",
            metrics,
            state("getMetrics", "Prometheus metrics").text("Prometheus text."),
        )
        .get(
            "/status",
            status,
            state("getStatus", "The gateway's state").answer::<Anything>(StatusCode::OK, "The state."),
        )
        .get(
            "/top",
            top::show,
            state("getTop", "What clients and keys do, the busiest first")
                .query::<top::Query>()
                .answer::<Anything>(StatusCode::OK, "Clients and keys."),
        )
        .post(
            "/reload",
            reload,
            state("reload", "Put the configuration file in force")
                .answer::<Anything>(StatusCode::OK, "What was done."),
        );
    let routes = teams::routes(keys::routes(kernel::routes(routes)));
    limits::routes(audit::routes(budgets::routes(routes)))
}

/// Figures for people; `gateway status` shows them.
#[derive(JsonSchema)]
#[schemars(transparent)]
struct Anything(#[allow(dead_code)] serde_json::Map<String, Value>); // only its schema is used

/// What every error looks like.
#[derive(JsonSchema)]
#[allow(dead_code)] // only its schema is used
struct ErrorAnswer {
    error: ErrorDetail,
}

/// What is wrong.
#[derive(JsonSchema)]
#[allow(dead_code)] // only its schema is used
struct ErrorDetail {
    /// A stable word for programs.
    code: String,
    /// A sentence for people.
    message: String,
}

fn openapi(document: Bytes) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], document).into_response()
}

/// Lets requests with a token through that allows them, for a bounded time.
async fn admit(State(guard): State<Arc<Guard>>, mut request: Request, next: Next) -> Response {
    let Some(who) = guard.admits(bearer(request.headers())) else {
        let message = "the admin token is missing or wrong; send `Authorization: Bearer <token>`";
        let mut answer = Failure::new(StatusCode::UNAUTHORIZED, "unauthorized", message).into_response();
        let challenge = header::HeaderValue::from_static("Bearer");
        answer.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
        return answer;
    };
    if who.role != Role::Admin && !matches!(*request.method(), Method::GET | Method::HEAD) {
        let message = "this token may only look (its role is viewer)";
        return Failure::new(StatusCode::FORBIDDEN, "forbidden", message).into_response();
    }
    request.extensions_mut().insert(who);
    match tokio::time::timeout(REQUEST_TIME_MAX, next.run(request)).await {
        Ok(mut answer) => {
            // Secrets are shown once, not kept on the way.
            let no_store = header::HeaderValue::from_static("no-store");
            answer.headers_mut().insert(header::CACHE_CONTROL, no_store);
            answer
        }
        Err(_) => Failure::new(
            StatusCode::REQUEST_TIMEOUT,
            "timeout",
            "the request took too long",
        )
        .into_response(),
    }
}

/// The token of `Authorization: Bearer <token>`; the scheme in any case (RFC 9110, section 11.1).
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers
        .get(header::AUTHORIZATION)?
        .to_str()
        .ok()?
        .split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

async fn metrics(State(plane): State<Arc<dyn Plane>>) -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, prometheus::CONTENT_TYPE)],
        plane.metrics().await,
    )
}

async fn status(State(plane): State<Arc<dyn Plane>>) -> Json<Value> {
    Json(plane.status().await)
}

async fn reload(State(plane): State<Arc<dyn Plane>>, By(who): By) -> Result<Json<Value>, Failure> {
    let result = plane.reload();
    let store = plane.directory().store.clone();
    audit::note_reload(store, who.name.to_string(), result.clone()).await;
    let message = result.map_err(|reason| {
        tracing::warn!("a reload by the admin API is refused, the old configuration stays: {reason}");
        Failure::new(StatusCode::UNPROCESSABLE_ENTITY, "configuration_refused", reason)
    })?;
    Ok(Json(json!({ "message": message })))
}

/// Reads a JSON body, whatever its `Content-Type` says.
fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(body)
        .map_err(|error| Failure::bad_request(format!("the body is not understood: {error}")))
}

/// As [`parse`]; no body at all stands for the defaults.
fn parse_or_default<T: DeserializeOwned + Default>(body: &[u8]) -> Result<T, Failure> {
    match body.is_empty() {
        true => Ok(T::default()),
        false => parse(body),
    }
}

/// An answer that says what is wrong.
#[derive(Debug)]
pub struct Failure {
    status: StatusCode,
    code: &'static str,
    message: String,
}

impl Failure {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Failure {
        Failure {
            status,
            code,
            message: message.into(),
        }
    }

    fn bad_request(message: impl Into<String>) -> Failure {
        Failure::new(StatusCode::BAD_REQUEST, "bad_request", message)
    }

    /// The kernel plane is off, or the client is exempt: asking again changes nothing by itself.
    fn conflict(message: String) -> Failure {
        Failure::new(StatusCode::CONFLICT, "kernel", message)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let body = json!({ "error": { "code": self.code, "message": self.message } });
        (self.status, Json(body)).into_response()
    }
}
