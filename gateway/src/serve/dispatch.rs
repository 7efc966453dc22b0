//! Finding an upstream that answers: targets and endpoints in turn, within bounds.

use std::{rc::Rc, sync::Arc, time::Duration};

use super::{
    account::Account,
    request::limit_error,
    snapshot::Model,
    upstream::{self, Broken, Upstream},
};
use crate::{
    bounds::ATTEMPTS_MAX,
    core::Core,
    dialect::{Api, request::Call},
    error::{Error, Kind},
    fleet::{Endpoint, Target, route},
    ledger::record::RequestId,
    net::{Conn, Either, clock, race, tcp::Sock, tls},
};

/// A request to be sent.
pub struct Order<'a> {
    pub id: RequestId,
    pub api: Api,
    pub model: &'a Model,
    pub call: &'a Call<'a>,
    pub body: &'a [u8],
    /// The client's fields that go on, as lines.
    pub fields: &'a [u8],
}

/// Why an attempt failed. Nothing has been sent to the client by then, so another may follow.
enum Failed {
    /// No connection, or no proper answer on it.
    Unreachable,
    /// The endpoint broke off, or spoke something else than HTTP.
    Broken,
    /// It took the request and did not answer in time. The work may be running: it is not asked for twice.
    TimedOut,
}

/// Sends the request until an upstream answers.
pub async fn run(core: &Rc<Core>, order: &Order<'_>, account: &mut Account) -> Result<Upstream, Error> {
    let mut attempts = 0;
    let mut tried = Vec::new();
    let mut failed = Failed::Unreachable;
    let mut busy = None;
    let mut limited = None;
    let mut targets = route::order(&order.model.targets, |below| core.chance(below));
    let preferred = targets.first().copied();
    put_down_last(core, &order.model.targets, &mut targets);
    for (place, &index) in targets.iter().enumerate() {
        let target = &order.model.targets[index];
        // One attempt is left for each target behind this one, as far as they go round: a target with many endpoints
        // that are all gone must not keep its fallback from being asked.
        let attempts_here = (ATTEMPTS_MAX - attempts).saturating_sub(targets.len() - 1 - place);
        let last = (attempts + attempts_here.max(1)).min(ATTEMPTS_MAX);
        // A provider whose own limits have nothing left is passed over, as one that is busy.
        if let Err(denied) = account.reserve_for(target) {
            limited = Some(denied);
            continue;
        }
        while attempts < last {
            let Some(endpoint) = choose(core, order.model, target, &tried) else {
                break;
            };
            tried.push(endpoint.id);
            let fallback = if Some(index) == preferred { 0 } else { place.max(1) };
            account.target(target, &endpoint, attempts, fallback);
            attempts += 1;
            match attempt(core, order, target, &endpoint, account).await {
                Ok(upstream) if asks_for_another(upstream.head.status) => {
                    // Kept, to be the answer if nobody has a better one.
                    account.declined();
                    let refuses_the_target = is_rate_limit(upstream.head.status);
                    busy = Some((upstream, target, place));
                    if refuses_the_target {
                        break;
                    }
                }
                Ok(upstream) => return Ok(upstream),
                Err(Failed::TimedOut) => {
                    let message = "the model's upstream did not answer in time";
                    return Err(Error::new(Kind::UpstreamTimeout, message));
                }
                Err(error) => failed = error,
            }
        }
    }
    if let Some((upstream, target, place)) = busy {
        account.answered_by(target, &upstream.endpoint, place);
        return Ok(upstream);
    }
    if let Some(denied) = limited.filter(|_| attempts == 0) {
        let error = limit_error(&denied);
        account.denied(denied);
        return Err(error);
    }
    Err(match failed {
        Failed::Broken => Error::new(
            Kind::UpstreamBroken,
            "the model's upstream broke off before it answered",
        ),
        _ => Error::new(
            Kind::UpstreamUnreachable,
            "no upstream of the model could be reached",
        ),
    })
}

/// Targets none of whose endpoints could be reached lately go behind the others: a request does not wait for them.
fn put_down_last(core: &Core, targets: &[Target], order: &mut [usize]) {
    if order.len() < 2 {
        return;
    }
    let now_ns = clock::turn_ns();
    let pool = core.pool.borrow();
    order.sort_by_key(|&index| {
        targets[index]
            .provider
            .endpoints
            .iter()
            .all(|e| pool.is_down(e.id, now_ns))
    });
}

/// Statuses after which another target may do better: too busy, or not there.
fn asks_for_another(status: u16) -> bool {
    is_rate_limit(status) || matches!(status, 502..=504)
}

/// Statuses that speak for a provider as a whole, not for one of its endpoints.
fn is_rate_limit(status: u16) -> bool {
    matches!(status, 429 | 529)
}

fn choose(core: &Core, model: &Model, target: &Target, tried: &[u64]) -> Option<Arc<Endpoint>> {
    let now_ns = clock::turn_ns();
    let pool = core.pool.borrow();
    route::endpoint(
        &target.provider.endpoints,
        model.balance,
        &pool,
        tried,
        core.turn(),
        now_ns,
    )
    .cloned()
}

/// One endpoint's turn. A kept connection that turns out to be closed costs no attempt: the request goes again, once,
/// on a new one.
async fn attempt(
    core: &Rc<Core>,
    order: &Order<'_>,
    target: &Target,
    endpoint: &Arc<Endpoint>,
    account: &mut Account,
) -> Result<Upstream, Failed> {
    let kept = core.pool.borrow_mut().take(endpoint);
    let mut result = Err(Failed::Unreachable);
    if let Some(conn) = kept {
        core.telemetry.counters().upstream_reuses.inc();
        let mut upstream = Upstream::new(core, endpoint, conn);
        result = exchange(core, order, target, &mut upstream, account)
            .await
            .map(|()| upstream);
        match result {
            Err(Failed::Unreachable) => {
                account.unsent();
                core.telemetry.counters().upstream_retries.inc();
            }
            _ => return note(core, endpoint, result),
        }
    }
    // Boxed: most requests find a kept connection, and have no room for the making of one.
    let new = Box::pin(connect(core, endpoint, order.model.timeouts.connect)).await;
    if let Some(conn) = new {
        core.telemetry.counters().upstream_connects.inc();
        let mut upstream = Upstream::new(core, endpoint, conn);
        result = exchange(core, order, target, &mut upstream, account)
            .await
            .map(|()| upstream);
    } else {
        core.telemetry.counters().upstream_connect_failures.inc();
    }
    if matches!(result, Err(Failed::Unreachable)) {
        account.unsent();
    }
    note(core, endpoint, result)
}

/// Remembers whether the endpoint could be reached.
fn note(core: &Core, endpoint: &Endpoint, result: Result<Upstream, Failed>) -> Result<Upstream, Failed> {
    let mut pool = core.pool.borrow_mut();
    match &result {
        Ok(_) => pool.reached(endpoint.id),
        Err(Failed::Unreachable | Failed::Broken) => pool.unreachable(endpoint.id, clock::turn_ns()),
        Err(Failed::TimedOut) => {}
    }
    drop(pool);
    result
}

async fn connect(core: &Rc<Core>, endpoint: &Endpoint, time: Duration) -> Option<Conn> {
    let addresses = endpoint.addresses.load_full();
    // Each try begins with another of a name's addresses; a second one is tried when the first refuses.
    let from = core.turn() as usize;
    for turn in 0..addresses.len().min(2) {
        let address = addresses[(from + turn) % addresses.len()];
        let sock = match Sock::connect(address, time).await {
            Ok(sock) => sock,
            Err(error) => {
                tracing::debug!(endpoint = endpoint.authority, %error, "cannot connect");
                continue;
            }
        };
        let Some(config) = &endpoint.tls else {
            return Some(Conn::plain(sock));
        };
        let session = tls::client_session(config, &endpoint.url.host).ok()?;
        match Conn::tls(sock, session, time).await {
            Ok(conn) => return Some(conn),
            Err(error) if core.may_log() => {
                tracing::warn!(endpoint = endpoint.authority, %error, "TLS handshake failed");
            }
            Err(_) => {}
        }
    }
    None
}

/// Sends the request and receives the answer's head.
async fn exchange(
    core: &Rc<Core>,
    order: &Order<'_>,
    target: &Target,
    upstream: &mut Upstream,
    account: &mut Account,
) -> Result<(), Failed> {
    let pieces = order.call.pieces(order.body, &target.model_json);
    let body_bytes = pieces.iter().map(|piece| piece.len()).sum();
    let authorization = target.provider.authorization.as_ref();
    let head = upstream::request_head(
        &upstream.endpoint,
        order.api,
        authorization,
        order.id,
        order.fields,
        body_bytes,
    );
    let [a, b, c, d, e] = pieces;
    let timeouts = &order.model.timeouts;
    // An upstream that refuses early (413, 401) may close before it has read everything: its answer counts.
    let sent = upstream.send(&[&head, a, b, c, d, e], timeouts.idle).await;
    account.dispatched();
    // A stream's head comes at once or with its first token; a whole answer's when all tokens are there.
    let time = if order.call.stream {
        timeouts.first_token
    } else {
        timeouts.total
    };
    match race(upstream.receive_head(), core.late(time)).await {
        Either::First(Ok(())) => Ok(()),
        Either::First(Err(Broken::Cut)) if sent.is_err() || upstream.received.is_empty() => {
            Err(Failed::Unreachable)
        }
        Either::First(Err(_)) => Err(Failed::Broken),
        Either::Second(()) => Err(Failed::TimedOut),
    }
}
