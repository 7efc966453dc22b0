//! The life of a request.
//!
//! ```text
//! head ─ who is it ─ body ─ what does it ask ─ may it ─ reserve ─ dispatch ─ relay ─ settle
//!        (key)              (model, stream)    (model)  (limits)  (upstream)          (ledger, limits, counters)
//! ```
//!
//! A stage that says no ends the request with an error in the client's dialect. From `admit` on there is an
//! [`Account`], which writes exactly one ledger record on every way out.

use std::{borrow::Cow, cell::RefCell, pin::pin, rc::Rc, sync::Arc, time::Duration};

use super::{
    account::{self, Account, Marks},
    answer,
    body::{self, Body},
    connection::{Client, Next, Served},
    dispatch::{self, Order},
    ends::{self, End, Ends},
    keys::Key,
    relay,
    snapshot::{Model, Snapshot},
    tags,
    upstream::{self, Upstream},
};
use sha2::{Digest, Sha256};

use crate::{
    bounds::{DRAIN_TIME_MAX, NAME_BYTES_MAX, RECORD_BYTES_MAX},
    core::{Core, DRAIN, STOP},
    dialect::{Api, Usage, request::Call},
    error::{Dialect, Error, Kind},
    http::head::{Framing, Method},
    ledger::record::{Outcome, RequestId},
    net::{Either, clock, race},
    quota::{
        Denied, Facts, Report,
        refusals::Via,
        reservation::{self, Ask, Why},
    },
    telemetry::{
        access::{AccessEntry, path_of},
        clients::Event,
    },
};

/// Seconds after which a client that met a stopping or full gateway may try again.
const RETRY_AFTER_S: u64 = 1;

/// What is known of a request besides its head.
pub struct Request {
    pub id: RequestId,
    /// When its head was complete, by the monotonic clock.
    pub started_ns: u64,
    pub snapshot: Arc<Snapshot>,
    /// The dialect of errors.
    pub dialect: Dialect,
    /// The basis of every answer's head.
    pub head: answer::Head,
    /// Who asks and what for, as far as it is known, for the log of a refusal.
    known: RefCell<Known>,
}

/// See [`Request::known`].
#[derive(Default)]
struct Known {
    key: Option<Arc<str>>,
    model: Option<Arc<str>>,
    path: Option<&'static str>,
}

/// Why a request ends before an upstream has answered.
enum Refusal {
    /// Answer with this error.
    Error(Error),
    /// A limit said no: answer with the error, and with how the limit stands.
    Denied(Error, Box<Denied>),
    /// For a request whose account has been closed: it is logged and counted already. With the limit that said no, if
    /// it was one.
    Accounted(Error, Option<Box<Denied>>),
    /// The client is gone.
    Gone,
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Refusal {
        Refusal::Error(error)
    }
}

/// What a path stands for.
enum Route {
    Api(Api),
    Models,
    Health,
    Ready,
}

/// Serves the request whose head stands at the beginning of `client.inbuf`.
pub async fn serve(client: &mut Client, core: &Rc<Core>) -> Served {
    let request = begin(client, core);
    if let Some(left) = core.turned_away(client.origin) {
        return Served::Done(turn_away(client, core, &request, left).await);
    }
    let refusal = match exchange(client, core, &request).await {
        Ok(served) => return served,
        Err(refusal) => refusal,
    };
    if let Refusal::Error(error) | Refusal::Denied(error, _) = &refusal {
        core.note_refusal(client.origin, error);
        log_refusal(client, core, &request, error);
    }
    consume_bodyless(client);
    let head = request.answer(client, core);
    let bytes = match &refusal {
        Refusal::Gone => return Served::Done(Next::Gone),
        Refusal::Error(error) | Refusal::Accounted(error, None) => {
            answer::error(error, request.dialect, head)
        }
        Refusal::Denied(error, denied) | Refusal::Accounted(error, Some(denied)) => {
            answer::denied(error, denied, request.dialect, head)
        }
    };
    Served::Done(write_whole(client, core, &bytes, head).await)
}

/// Answers a client that is turned away: before its key, its body or its JSON cost anything. It is counted and not
/// logged, as a connection is not that the kernel drops.
async fn turn_away(client: &mut Client, core: &Rc<Core>, request: &Request, left: Duration) -> Next {
    let counters = core.telemetry.counters();
    counters.clients_turned_away.inc();
    core.telemetry.client(client.origin.ip, Event::Refused);
    let error = ends::blocked(Some(left));
    counters.response(error.status());
    consume_received(client);
    let mut head = request.answer(client, core);
    // A proxy's connection serves others too.
    head.keep_alive &= client.origin.via == Via::Proxied;
    let bytes = answer::error(&error, request.dialect, head);
    write_whole(client, core, &bytes, head).await
}

/// Drops a request that has been received to its end already.
fn consume_received(client: &mut Client) {
    let body = match client.head.framing {
        Framing::None => 0,
        Framing::Length(length) => usize::try_from(length).unwrap_or(usize::MAX),
        Framing::Chunked => return,
    };
    let end = client.head.len.saturating_add(body);
    if client.head.len > 0 && end <= client.inbuf.len() {
        client.inbuf.drain(..end);
        client.head.len = 0;
    }
}

/// A request without a body ends with its head, whatever became of it.
fn consume_bodyless(client: &mut Client) {
    if client.head.framing == Framing::None && client.head.len > 0 {
        client.inbuf.drain(..client.head.len);
        client.head.len = 0;
    }
}

async fn write_whole(client: &mut Client, core: &Rc<Core>, bytes: &[u8], head: answer::Head) -> Next {
    core.telemetry.counters().bytes_to_clients.add(bytes.len() as u64);
    match client.conn.write_all(bytes, client.stall).await {
        Ok(()) if head.keep_alive => Next::KeepAlive,
        Ok(()) => Next::Close,
        Err(_) => Next::Gone,
    }
}

/// The stages in their order.
async fn exchange(client: &mut Client, core: &Rc<Core>, request: &Request) -> Result<Served, Refusal> {
    let api = match route(client)? {
        Route::Api(api) => api,
        Route::Health => {
            return Ok(Served::Done(
                own_answer(client, core, request, 200, br#"{"status":"ok"}"#).await,
            ));
        }
        Route::Ready => return Ok(Served::Done(ready(client, core, request).await)),
        Route::Models => {
            let key = authenticate(client, core, request)?;
            return Ok(Served::Done(models(client, core, request, &key).await));
        }
    };
    let key = authenticate(client, core, request)?;
    *request.known.borrow_mut() = Known {
        key: Some(key.name.clone()),
        model: None,
        path: Some(api.path()),
    };
    let fields = upstream::forwarded(&client.head, &client.inbuf);
    let noted = Noted::of(client, request);
    let tags = tags(client, core)?;
    let body = receive_body(client, core, request).await?;
    let call = Call::parse(api, body.bytes())?;
    let model = authorize(request, &key, &call)?.clone();
    request.known.borrow_mut().model = Some(model.name.clone());
    let (mut account, report) = admit(
        client, core, request, api, &key, &model, &call, tags, &body, &noted,
    )?;
    let order = Order {
        id: request.id,
        api,
        model: &model,
        call: &call,
        body: body.bytes(),
        fields: &fields,
    };
    let upstream = dispatch(client, core, &order, &key, &mut account).await?;
    let (hide_usage, choices) = (call.hide_usage, call.choices);
    // A stream may run for minutes; what it was asked with is not needed any more.
    drop(call);
    drop((body, fields));
    let terms = relay::Terms {
        api,
        life: key.life.clone(),
        hide_usage,
        choices,
        timeouts: model.timeouts,
        report,
        dialect: request.dialect,
        head: request.answer(client, core),
    };
    Ok(relay::run(client, core, upstream, account, terms).await)
}

fn begin(client: &Client, core: &Rc<Core>) -> Request {
    let head = &client.head;
    let id = core.next_id();
    let anthropic = head.field(&client.inbuf, "anthropic-version").is_some();
    Request {
        id,
        started_ns: clock::turn_ns(),
        snapshot: core.snapshot(),
        dialect: if anthropic {
            Dialect::Anthropic
        } else {
            Dialect::OpenAi
        },
        head: answer::Head {
            id: Some(id),
            version: head.version,
            keep_alive: head.keep_alive && core.drain.level() < DRAIN,
            bodyless: head.method == Method::Head,
        },
        known: RefCell::default(),
    }
}

impl Request {
    /// The basis of an answer's head now: a body that was not received to its end closes the connection.
    fn answer(&self, client: &Client, core: &Core) -> answer::Head {
        let at_border = client.head.len == 0 && !client.body_is_open;
        // The drain may have begun since the head came.
        let stays = core.drain.level() < DRAIN;
        answer::Head {
            keep_alive: self.head.keep_alive && at_border && stays,
            ..self.head
        }
    }
}

fn route(client: &Client) -> Result<Route, Error> {
    let target = client.head.target.of(&client.inbuf);
    let path = target.split(|&b| b == b'?').next().unwrap_or_default();
    let method = client.head.method;
    let route = match path {
        b"/healthz" => Route::Health,
        b"/readyz" => Route::Ready,
        b"/v1/models" => Route::Models,
        _ => match Api::of_path(path) {
            Some(api) => Route::Api(api),
            None => return Err(Error::new(Kind::NotFound, "no such path; the API is below /v1")),
        },
    };
    let allowed = match route {
        Route::Api(_) => method == Method::Post,
        _ => matches!(method, Method::Get | Method::Head),
    };
    match allowed {
        true => Ok(route),
        false => Err(Error::new(
            Kind::MethodNotAllowed,
            "the path does not take this method",
        )),
    }
}

/// Who is it.
fn authenticate(client: &Client, core: &Core, request: &Request) -> Result<Arc<Key>, Error> {
    let field = |name| client.head.field(&client.inbuf, name);
    let bearer = || {
        let value = field("authorization")?;
        let (scheme, token) = value.split_at_checked(7)?;
        scheme
            .eq_ignore_ascii_case(b"bearer ")
            .then(|| token.trim_ascii())
    };
    let secret = bearer()
        .or_else(|| field("x-api-key"))
        .or_else(|| field("x-goog-api-key"));
    let Some(secret) = secret else {
        let message = "you did not provide an API key; send it as `Authorization: Bearer KEY`";
        return Err(Error {
            code: Some("missing_api_key"),
            ..Error::new(Kind::Unauthenticated, message)
        });
    };
    let hash: [u8; 32] = Sha256::digest(secret).into();
    let known = request.snapshot.key(&hash).cloned();
    let Some(key) = known.or_else(|| core.shared.keys.get(&hash)) else {
        return Err(Error::new(Kind::Unauthenticated, "incorrect API key provided"));
    };
    key.pass(client.origin.ip, request.id.unix_ms())?;
    Ok(key)
}

async fn receive_body(client: &mut Client, core: &Rc<Core>, request: &Request) -> Result<Body, Refusal> {
    let ends = race(core.drain.reached(STOP), client.seat.blocked());
    match race(body::receive(client, core, request.snapshot.http), ends).await {
        Either::First(Ok(body)) => Ok(body),
        Either::First(Err(body::Failed::Error(error))) => Err(error.into()),
        Either::First(Err(body::Failed::Gone)) => Err(Refusal::Gone),
        Either::Second(Either::First(())) => Err(End::Stop.error().into()),
        Either::Second(Either::Second(())) => Err(End::Blocked.error().into()),
    }
}

/// May it use this model.
fn authorize<'r>(request: &'r Request, key: &Key, call: &Call<'_>) -> Result<&'r Arc<Model>, Error> {
    let name = call.model.as_ref();
    let model = request.snapshot.model(name);
    if let Some(model) = model.filter(|_| key.may_use(name)) {
        return Ok(model);
    }
    // A key that is bound to some models does not learn which others exist.
    if model.is_some() || !key.may_use(name) {
        return Err(Error::new(Kind::Forbidden, "this key may not use this model"));
    }
    let message = "no such model; GET /v1/models lists what this key may use";
    Err(Error {
        code: Some("model_not_found"),
        param: Some("model"),
        ..Error::new(Kind::NotFound, message)
    })
}

/// Reserves what the request may use, and opens its account.
#[allow(clippy::too_many_arguments)]
fn admit(
    client: &Client,
    core: &Rc<Core>,
    request: &Request,
    api: Api,
    key: &Arc<Key>,
    model: &Arc<Model>,
    call: &Call<'_>,
    tags: Arc<str>,
    body: &Body,
    noted: &Noted,
) -> Result<(Account, Report), Refusal> {
    let marks = marks(core, call, noted, tags);
    if !core.books_are_open(account::record_bytes_max(key, model, &marks)) {
        core.telemetry.counters().ledger_full.inc();
        let message = "the gateway cannot record requests now; try again";
        let error = Error {
            code: Some("ledger_full"),
            ..Error::new(Kind::Overloaded, message)
        };
        return Err(Error {
            retry_after_s: Some(RETRY_AFTER_S),
            ..error
        }
        .into());
    }
    let output = match api {
        Api::Embeddings => 0,
        _ => call
            .output_max
            .unwrap_or(model.output_tokens_default.saturating_mul(call.choices)),
    };
    let input = model.input_tokens(body.bytes().len() as u64);
    let ask = Ask {
        input,
        output,
        output_is_explicit: call.output_max.is_some(),
        stream: call.stream,
        rates: model.rates(call.tier, input, request.id.unix_ms()),
    };
    let header = |name: &str| noted.header(name);
    let facts = Facts {
        ids: key.ids,
        user: noted.user.as_deref().or(call.user.as_deref()).unwrap_or_default(),
        model: &model.name,
        path: api.path(),
        client: client.origin.ip,
        header: &header,
        own: key.own.as_deref().unwrap_or_default(),
    };
    let snapshot = &request.snapshot;
    let admission = reservation::admit(&snapshot.quota, &snapshot.policies, &facts, ask)
        .map_err(|denied| Refusal::Denied(limit_error(&denied), denied))?;
    core.note_accepted(client.origin);
    let account = Account::open(
        core,
        request.id,
        request.started_ns,
        client.origin.ip,
        key,
        model,
        api,
        input,
        body.bytes(),
        marks,
        admission.reservation,
    );
    Ok((account, admission.report))
}

/// Headers that limits look at, kept from before the body came: its receipt takes the head's room.
#[derive(Default)]
struct Noted {
    user: Option<String>,
    headers: Vec<(Box<str>, Box<[u8]>)>,
}

impl Noted {
    fn of(client: &Client, request: &Request) -> Noted {
        let snapshot = &request.snapshot;
        let field = |name: &str| client.head.field(&client.inbuf, name);
        let user = snapshot.user_header.as_deref().and_then(field);
        let wanted = snapshot.policies.headers().iter();
        Noted {
            user: user.map(|value| String::from_utf8_lossy(value).into_owned()),
            headers: wanted
                .filter_map(|name| Some((name.clone(), field(name)?.into())))
                .collect(),
        }
    }

    fn header(&self, name: &str) -> Option<&[u8]> {
        let found = self.headers.iter().find(|(noted, _)| **noted == *name);
        found.map(|(_, value)| &**value)
    }
}

/// What the client says of its request for the books.
fn marks(core: &Core, call: &Call<'_>, noted: &Noted, tags: Arc<str>) -> Marks {
    let user = noted.user.as_deref().or(call.user.as_deref()).unwrap_or_default();
    Marks {
        user: or_empty(core, &user[..user.floor_char_boundary(NAME_BYTES_MAX)]),
        tags,
        tier: call.tier,
    }
}

/// The client's tags for the books; from the head, which is gone when the body is there.
fn tags(client: &Client, core: &Core) -> Result<Arc<str>, Error> {
    let tags = client.head.field(&client.inbuf, "x-gateway-tags");
    Ok(or_empty(core, tags.map_or(Ok(""), tags::parse)?))
}

/// A name of a record; one that is empty takes no allocation.
fn or_empty(core: &Core, name: &str) -> Arc<str> {
    match name {
        "" => core.empty.clone(),
        name => Arc::from(name),
    }
}

/// What a refusal by a limit says: which one, what is left, when it makes sense to try again.
pub fn limit_error(denied: &Denied) -> Error {
    let unit = denied.unit.name();
    let show = |units| denied.unit.show(units);
    let (name, amount, every, asked) = (
        &denied.name,
        show(denied.amount),
        &denied.every,
        show(denied.asked),
    );
    let (code, message) = match denied.why {
        Why::Never => (
            "request_over_limit",
            format!(
                "the request asks for up to {asked} {unit}, more than {name} permits at all: {amount} per {every}; \
                 lower max_tokens"
            ),
        ),
        Why::Unpriced => (
            "price_unknown",
            format!("{name} limits cost, and the price of this model is not known to the gateway"),
        ),
        Why::NoPlace => (
            "limit_table_full",
            format!("{name} cannot count this request now: too many users or clients at the same time"),
        ),
        Why::StoreGone => (
            "limit_store_unavailable",
            format!(
                "{name} is shared by several gateways, and the store in which they share it is out of reach"
            ),
        ),
        Why::Spent => (
            "insufficient_quota",
            format!(
                "the {name} is used up: {amount} per {every}, {} left, {asked} asked",
                show(denied.standing.remaining)
            ),
        ),
        Why::Exhausted => (
            "rate_limit_exceeded",
            format!(
                "rate limit reached for {unit} ({name}): {amount} per {every}, {} left, {asked} asked",
                show(denied.standing.remaining)
            ),
        ),
    };
    let seconds = denied.standing.retry_after_ns.div_ceil(1_000_000_000);
    let retry_after_s = match denied.why {
        Why::Never | Why::Unpriced => None,
        Why::NoPlace | Why::StoreGone => Some(RETRY_AFTER_S),
        // A parallel request ends when it ends.
        Why::Exhausted if seconds == 0 => Some(RETRY_AFTER_S),
        Why::Exhausted | Why::Spent => (seconds > 0).then_some(seconds),
    };
    let kind = match denied.why {
        // Nothing that the client did.
        Why::StoreGone => Kind::Overloaded,
        _ => Kind::RateLimited,
    };
    let error = Error::new(kind, message);
    Error {
        code: Some(code),
        retry_after_s,
        ..error
    }
}

/// Finds an upstream that answers. The client's hang-up, or the gateway's or the key's end, ends that at once.
async fn dispatch(
    client: &mut Client,
    core: &Rc<Core>,
    order: &Order<'_>,
    key: &Key,
    account: &mut Account,
) -> Result<Upstream, Refusal> {
    let seat = client.seat.clone();
    let drains = order.model.drains().then(|| account.watch_drains());
    let dispatched = {
        let mut running = pin!(dispatch::run(core, order, account));
        let ends = race(client.gone(core), Ends::new(core, &key.life, &seat));
        match race(running.as_mut(), ends).await {
            // Read on for the books: the head of an answer that is not streamed comes with its end.
            Either::Second(Either::First(())) if drains.is_some_and(|drains| drains.get()) => {
                let ends = race(core.late(DRAIN_TIME_MAX), Ends::new(core, &key.life, &seat));
                match race(running, ends).await {
                    Either::First(Ok(upstream)) => Either::First(Ok((upstream, true))),
                    _ => Either::Second(Either::First(())),
                }
            }
            Either::First(Ok(upstream)) => Either::First(Ok((upstream, false))),
            Either::First(Err(error)) => Either::First(Err(error)),
            Either::Second(ends) => Either::Second(ends),
        }
    };
    // What was not sent was not worked on.
    let prompt_only = match account.dispatched_ns() {
        0 => Usage::default(),
        _ => Usage {
            prompt: account.input_estimated(),
            ..Usage::default()
        },
    };
    let (error, outcome, usage) = match dispatched {
        Either::First(Ok((upstream, false))) => return Ok(upstream),
        Either::First(Ok((upstream, true))) => {
            account.answering(0, false);
            relay::drain::rest(core, upstream, account, Vec::new()).await;
            return Err(Refusal::Gone);
        }
        Either::First(Err(error)) if error.kind == Kind::UpstreamTimeout => {
            (error, Outcome::TimedOut, prompt_only)
        }
        Either::First(Err(error)) if error.kind == Kind::RateLimited => {
            (error, Outcome::Stopped, Usage::default())
        }
        Either::First(Err(error)) => (error, Outcome::UpstreamFailed, Usage::default()),
        Either::Second(Either::First(())) => {
            account.settle(Outcome::ClientGone, prompt_only, prompt_only != Usage::default());
            return Err(Refusal::Gone);
        }
        Either::Second(Either::Second(end)) => (end.error(), Outcome::Stopped, prompt_only),
    };
    account.answering(error.status(), false);
    account.error(error.code());
    account.settle(outcome, usage, usage != Usage::default());
    Err(Refusal::Accounted(error, account.take_denied()))
}

/// An answer of the gateway's own.
async fn own_answer(
    client: &mut Client,
    core: &Rc<Core>,
    request: &Request,
    status: u16,
    body: &[u8],
) -> Next {
    consume_bodyless(client);
    let head = request.answer(client, core);
    core.telemetry.counters().response(status);
    write_whole(client, core, &answer::json(status, body, head), head).await
}

/// Whether new work is welcome: no while the gateway drains or cannot keep its books.
async fn ready(client: &mut Client, core: &Rc<Core>, request: &Request) -> Next {
    if core.drain.level() >= DRAIN {
        return own_answer(client, core, request, 503, br#"{"status":"stopping"}"#).await;
    }
    if !core.books_are_open(RECORD_BYTES_MAX) {
        return own_answer(client, core, request, 503, br#"{"status":"ledger full"}"#).await;
    }
    own_answer(client, core, request, 200, br#"{"status":"ready"}"#).await
}

/// The virtual models that a key may use, as OpenAI lists models.
async fn models(client: &mut Client, core: &Rc<Core>, request: &Request, key: &Key) -> Next {
    let model = |id| serde_json::json!({ "id": id, "object": "model", "created": 0, "owned_by": "gateway" });
    let data: Vec<_> = request.snapshot.models_of(key).into_iter().map(model).collect();
    let list = serde_json::json!({ "object": "list", "data": data }).to_string();
    own_answer(client, core, request, 200, list.as_bytes()).await
}

fn log_refusal(client: &Client, core: &Rc<Core>, request: &Request, error: &Error) {
    core.telemetry.counters().response(error.status());
    let known = request.known.take();
    let path = match known.path {
        Some(path) => Cow::Borrowed(path),
        None if client.head.len == 0 => Cow::Borrowed(""),
        None => String::from_utf8_lossy(client.head.target.of(&client.inbuf)),
    };
    core.telemetry.log_access(AccessEntry {
        time_unix_ms: request.id.unix_ms(),
        request_id: Some(request.id),
        client: Some(client.origin.ip),
        method: client.head.method.name().into(),
        path: path_of(&path).into(),
        key: known.key,
        model: known.model,
        status: error.status(),
        outcome: "refused",
        error: Some(error.code()),
        duration_us: (clock::turn_ns() - request.started_ns) / 1000,
        ..AccessEntry::default()
    });
}
