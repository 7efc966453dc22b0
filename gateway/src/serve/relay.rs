//! Passing an upstream's answer on.

mod cut;
pub mod drain;
mod stream;
mod whole;

pub use stream::Stream;

use std::{rc::Rc, sync::Arc, time::Duration};

use super::{
    account::Account,
    answer,
    connection::{Client, Next, Served},
    ends::End,
    keys::Life,
    snapshot::Timeouts,
    upstream::{Broken, Upstream},
};
use crate::{
    core::{Core, STOP},
    dialect::{Api, Usage},
    error::{Dialect, Error, Kind},
    ledger::record::Outcome,
    net::{Either, race},
    quota::Report,
};

/// What the relay needs to know of the request.
pub struct Terms {
    pub api: Api,
    /// Of the client's key.
    pub life: Arc<Life>,
    /// Take the usage event out of the stream.
    pub hide_usage: bool,
    /// Answers that are generated at the same time.
    pub choices: u64,
    pub timeouts: Timeouts,
    pub report: Report,
    /// The dialect of errors.
    pub dialect: Dialect,
    /// The basis of the answer's head.
    pub head: answer::Head,
}

/// Why an answer cannot be completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    Upstream(Broken),
    /// Silent for too long.
    Idle,
    /// The request's whole time is over.
    Total,
    /// The gateway or the key ends.
    Ended(End),
}

/// Passes the answer on and closes the account; a stream is left to the caller to run.
pub async fn run(
    client: &mut Client,
    core: &Rc<Core>,
    upstream: Upstream,
    mut account: Account,
    terms: Terms,
) -> Served {
    if matches!(upstream.head.status, 401 | 403) {
        // Boxed, as everything that few requests come to: every request would have room for it.
        let refused = Box::pin(refused_credential(client, core, upstream, account, &terms));
        return Served::Done(refused.await);
    }
    // One without a byte has no end that could come behind its head.
    let is_stream = upstream.head.status == 200
        && upstream.length() != Some(0)
        && is_event_stream(content_type(&upstream));
    account.answering(upstream.head.status, is_stream);
    if is_stream {
        return Served::Stream(Box::new(Stream::new(upstream, account, terms)));
    }
    Served::Done(whole::run(client, core, upstream, account, terms).await)
}

/// Media types are case-insensitive (RFC 9110, section 8.3.1).
fn is_event_stream(content_type: &[u8]) -> bool {
    const NAME: &[u8] = b"text/event-stream";
    content_type
        .get(..NAME.len())
        .is_some_and(|name| name.eq_ignore_ascii_case(NAME))
}

fn content_type(upstream: &Upstream) -> &[u8] {
    upstream
        .head
        .field(&upstream.received, "content-type")
        .unwrap_or_default()
}

/// The provider refuses the operator's credential. Its answer may quote the credential or name the account, so
/// the client gets ours.
async fn refused_credential(
    client: &mut Client,
    core: &Rc<Core>,
    upstream: Upstream,
    mut account: Account,
    terms: &Terms,
) -> Next {
    let message = "the provider refused the gateway's credential; this is for the gateway's operator to mend";
    let error = Error {
        code: Some("upstream_unauthorized"),
        ..Error::new(Kind::UpstreamBroken, message)
    };
    if core.may_log() {
        tracing::error!(
            endpoint = upstream.endpoint.authority,
            status = upstream.head.status,
            "a provider refuses the configured credential"
        );
    }
    drop(upstream);
    account.answering(error.status(), false);
    account.error(error.code());
    account.settle(Outcome::UpstreamFailed, Usage::default(), false);
    let bytes = answer::error(&error, terms.dialect, terms.head);
    finish(client, core, &[&bytes], terms).await
}

impl Failure {
    fn outcome(self) -> Outcome {
        match self {
            Failure::Upstream(_) => Outcome::UpstreamFailed,
            Failure::Idle | Failure::Total => Outcome::TimedOut,
            Failure::Ended(_) => Outcome::Stopped,
        }
    }

    fn error(self) -> Error {
        match self {
            Failure::Upstream(Broken::Cut) => {
                let message = "the upstream broke off before the end of its answer";
                Error {
                    code: Some("upstream_cut"),
                    ..Error::new(Kind::UpstreamBroken, message)
                }
            }
            Failure::Upstream(Broken::Malformed) => {
                Error::new(Kind::UpstreamBroken, "the upstream's answer is malformed")
            }
            Failure::Idle => Error::new(Kind::UpstreamTimeout, "the upstream went silent"),
            Failure::Total => {
                let message = "the answer took longer than the model's total time";
                Error {
                    code: Some("total_timeout"),
                    ..Error::new(Kind::UpstreamTimeout, message)
                }
            }
            Failure::Ended(end) => end.error(),
        }
    }
}

/// Writes the last bytes of an answer. A client that takes them byte by byte holds their memory for no longer than a
/// request may last.
async fn finish(client: &mut Client, core: &Rc<Core>, pieces: &[&[u8]], terms: &Terms) -> Next {
    let bytes: usize = pieces.iter().map(|piece| piece.len()).sum();
    core.telemetry.counters().bytes_to_clients.add(bytes as u64);
    let ends = race(core.drain.reached(STOP), core.late(terms.timeouts.total));
    match race(client.conn.write_slices(pieces, client.stall), ends).await {
        Either::First(Ok(())) if terms.head.keep_alive => Next::KeepAlive,
        Either::First(Ok(())) => Next::Close,
        Either::First(Err(_)) => Next::Gone,
        Either::Second(_) => {
            client.conn.sock().reset_on_close();
            Next::Gone
        }
    }
}

/// What is left of a time that began `used_ns` ago.
fn left(time: Duration, used_ns: u64) -> Duration {
    time.saturating_sub(Duration::from_nanos(used_ns))
}
