//! An answer that is no stream: received whole where it is not too long, so that its usage is in the books
//! before it leaves.

use std::rc::Rc;

use super::{Failure, Terms, drain, finish, left};
use crate::{
    bounds::{ANSWER_BYTES_MAX, SCRATCH_BYTES},
    core::{Core, Share},
    dialect::{
        Api, Usage,
        meter::{finish_of, text_bytes},
        tokens, usage,
    },
    http::{
        chunked::{CHUNK_END, CHUNK_HEAD_BYTES_MAX, LAST_CHUNK, write_chunk_head},
        head::Version,
    },
    ledger::record::Outcome,
    net::{Either, clock, race, runtime::spawn},
    serve::{
        account::Account,
        answer::{self, Framing},
        connection::{Client, Next},
        ends::Ends,
        upstream::{Broken, Upstream},
    },
};

/// How much of a long answer's end is kept to find its usage in.
const TAIL_BYTES: usize = 64 * 1024;

/// A body on its way from the upstream.
struct Collected {
    bytes: Vec<u8>,
    /// Their capacity's share of what the core may hold.
    share: Share,
    done: bool,
    /// Something came behind the body's end.
    left_over: bool,
}

/// Why nothing can be sent on.
enum Ended {
    Failed(Failure),
    ClientGone,
}

/// Receives the answer and sends it on.
pub async fn run(
    client: &mut Client,
    core: &Rc<Core>,
    mut upstream: Upstream,
    mut account: Account,
    terms: Terms,
) -> Next {
    let mut head_bytes = std::mem::take(&mut upstream.received);
    let rest = head_bytes.split_off(upstream.head.len);
    let mut body = Collected::new(core);
    let received = match body.take(&mut upstream, rest) {
        Ok(()) => {
            collect(
                client,
                core,
                &mut upstream,
                &mut body,
                &account,
                &terms,
                ANSWER_BYTES_MAX,
            )
            .await
        }
        Err(broken) => Err(Ended::Failed(Failure::Upstream(broken))),
    };
    match received {
        Ok(()) => {}
        // Boxed, as everything that few requests come to: every request would have room for it.
        Err(Ended::Failed(failure)) => return Box::pin(fail(client, core, failure, account, &terms)).await,
        Err(Ended::ClientGone) if account.drains() && !body.done => {
            // The client's connection is free at once.
            let core = core.clone();
            spawn(async move { drain::rest(&core, upstream, &mut account, body.bytes).await });
            return Next::Gone;
        }
        Err(Ended::ClientGone) => return client_gone(account, upstream.head.status, &body.bytes),
    }
    account.first_byte(clock::turn_ns());
    if !body.done {
        let long = relay_long(client, core, upstream, account, terms, &head_bytes, body);
        return Box::pin(long).await;
    }
    account.sent(body.bytes.len());
    settle(
        &mut account,
        upstream.head.status,
        usage_of(&upstream, &body.bytes, &terms),
        &body.bytes,
        body.bytes.len(),
    );
    let framing = Framing::Length(body.bytes.len());
    let head = answer::relayed(&upstream.head, &head_bytes, framing, &terms.report, terms.head);
    upstream.finish(body.left_over);
    finish(client, core, &[&head, &body.bytes], &terms).await
}

impl Collected {
    fn new(core: &Rc<Core>) -> Collected {
        Collected {
            bytes: Vec::new(),
            share: Share::new(core),
            done: false,
            left_over: false,
        }
    }

    /// Whether more may be kept: within the answer's bound, and, beyond a first part, within the core's.
    fn has_room(&self, bytes_max: usize, bodies_max: usize) -> bool {
        let small = self.bytes.len() < SCRATCH_BYTES;
        self.bytes.len() <= bytes_max && (small || self.share.all_bytes() < bodies_max)
    }

    /// Takes the framing off `bytes` and adds what is left.
    fn take(&mut self, upstream: &mut Upstream, mut bytes: Vec<u8>) -> Result<(), Broken> {
        self.take_slice(upstream, &mut bytes)
    }

    fn take_slice(&mut self, upstream: &mut Upstream, bytes: &mut [u8]) -> Result<(), Broken> {
        let decoded = upstream.deframe(bytes)?;
        self.bytes.extend_from_slice(&bytes[decoded.payload]);
        self.share.set(self.bytes.capacity());
        self.done = decoded.done;
        self.left_over = decoded.done && decoded.consumed < bytes.len();
        Ok(())
    }
}

/// Receives until the body is whole or longer than `bytes_max`; ends at once when the client hangs up.
async fn collect(
    client: &mut Client,
    core: &Rc<Core>,
    upstream: &mut Upstream,
    body: &mut Collected,
    account: &Account,
    terms: &Terms,
    bytes_max: usize,
) -> Result<(), Ended> {
    let time = left(terms.timeouts.total, clock::turn_ns() - account.started_ns());
    let bodies_max = core.shared.snapshot.load().http.bodies_bytes_max;
    let receive = async {
        while !body.done && body.has_room(bytes_max, bodies_max) {
            let got = {
                let scratch = &mut *core.scratch();
                let got = upstream
                    .conn()
                    .and_then(|conn| conn.try_read(scratch))
                    .map_err(|_| Broken::Cut)?;
                if let Some(n @ 1..) = got {
                    body.take_slice(upstream, &mut scratch[..n])?;
                }
                got
            };
            match got {
                Some(0) if upstream.ends_by_close() => body.done = true,
                Some(0) => return Err(Broken::Cut),
                Some(_) => {}
                None => upstream.conn().map_err(|_| Broken::Cut)?.readable().await,
            }
        }
        Ok(())
    };
    let ends = Ends::new(core, &terms.life, &client.seat);
    let others = race(client.gone(core), race(core.late(time), ends));
    match race(receive, others).await {
        Either::First(received) => received.map_err(|broken| Ended::Failed(Failure::Upstream(broken))),
        Either::Second(Either::First(())) => Err(Ended::ClientGone),
        Either::Second(Either::Second(Either::First(()))) => Err(Ended::Failed(Failure::Total)),
        Either::Second(Either::Second(Either::Second(end))) => Err(Ended::Failed(Failure::Ended(end))),
    }
}

/// What the answer tells of its usage; an error used nothing.
fn usage_of(upstream: &Upstream, body: &[u8], terms: &Terms) -> Option<Usage> {
    match upstream.head.status {
        200..300 => usage::find(terms.api, body),
        _ => Some(Usage::default()),
    }
}

/// Closes the account of a whole answer of `body_bytes`, of which `text` was kept.
fn settle(account: &mut Account, status: u16, usage: Option<Usage>, text: &[u8], body_bytes: usize) {
    let outcome = if status >= 500 {
        Outcome::UpstreamFailed
    } else {
        Outcome::Complete
    };
    if status == 200 {
        account.finish(finish_of(&text[text.len().saturating_sub(TAIL_BYTES)..]));
        // Only a part of a long answer was kept.
        if text.len() == body_bytes && text.len() <= TAIL_BYTES && account.teaches() {
            account.text(text_bytes(account.api(), text) as u64);
        }
    }
    let estimated = usage.is_none();
    let usage = usage.unwrap_or_else(|| estimate_of(account, text, body_bytes));
    account.settle(outcome, usage, estimated);
}

/// What an answer of `body_bytes` used whose provider does not tell, and of which `kept` is here.
pub(super) fn estimate_of(account: &Account, kept: &[u8], body_bytes: usize) -> Usage {
    match account.api() {
        Api::ChatCompletions | Api::Completions if kept.len() == body_bytes => estimate_text(account, kept),
        _ => estimate(account, body_bytes),
    }
}

/// Nothing has been sent yet, so the client gets a proper error.
async fn fail(
    client: &mut Client,
    core: &Rc<Core>,
    failure: Failure,
    mut account: Account,
    terms: &Terms,
) -> Next {
    let error = failure.error();
    account.answering(error.status(), false);
    account.error(error.code());
    // The upstream has worked on the input, whatever became of its answer.
    let usage = Usage {
        prompt: account.input_estimated(),
        ..Usage::default()
    };
    account.settle(failure.outcome(), usage, true);
    let bytes = answer::error(&error, terms.dialect, terms.head);
    finish(client, core, &[&bytes], terms).await
}

/// The client has hung up before it was sent anything. What the upstream has generated is known by what of it came; before
/// the first byte nobody knows it.
///
/// An error used nothing.
fn client_gone(mut account: Account, status: u16, body: &[u8]) -> Next {
    let (usage, estimated) = match status {
        200..300 => (estimate_of(&account, body, body.len()), true),
        _ => (Usage::default(), false),
    };
    account.settle(Outcome::ClientGone, usage, estimated);
    Next::Gone
}

/// Passes on an answer that is too long to be kept, in parts; the last part waits for the books.
async fn relay_long(
    client: &mut Client,
    core: &Rc<Core>,
    mut upstream: Upstream,
    mut account: Account,
    mut terms: Terms,
    head_bytes: &[u8],
    mut body: Collected,
) -> Next {
    let framing = match (upstream.length(), terms.head.version) {
        (Some(length), _) => Framing::Length(length as usize),
        (None, Version::Http11) => Framing::Chunked,
        (None, Version::Http10) => Framing::UntilClose,
    };
    terms.head.keep_alive &= framing != Framing::UntilClose;
    let mut out = answer::relayed(&upstream.head, head_bytes, framing, &terms.report, terms.head);
    let mut tail: Vec<u8> = Vec::new();
    let mut total = 0;
    loop {
        total += body.bytes.len();
        tail.extend_from_slice(&body.bytes[body.bytes.len().saturating_sub(TAIL_BYTES)..]);
        tail.drain(..tail.len().saturating_sub(TAIL_BYTES));
        append(&mut out, &body.bytes, framing, body.done);
        account.sent(body.bytes.len());
        if body.done {
            settle(
                &mut account,
                upstream.head.status,
                match upstream.head.status {
                    200..300 => usage::find_in_tail(&tail),
                    _ => Some(Usage::default()),
                },
                &tail,
                total,
            );
        }
        core.telemetry.counters().bytes_to_clients.add(out.len() as u64);
        let used_ns = clock::turn_ns() - account.started_ns();
        let ends = race(
            Ends::new(core, &terms.life, &client.seat),
            core.late(left(terms.timeouts.total, used_ns)),
        );
        let cut = match race(client.conn.write_all(&out, client.stall), ends).await {
            Either::First(Ok(())) => None,
            Either::First(Err(_)) => Some(Outcome::ClientGone),
            Either::Second(Either::First(_)) => Some(Outcome::Stopped),
            Either::Second(Either::Second(())) => Some(Outcome::TimedOut),
        };
        if let Some(outcome) = cut {
            settle_cut(&mut account, outcome, total);
            client.conn.sock().reset_on_close();
            return Next::Gone;
        }
        if body.done {
            upstream.finish(body.left_over);
            return if terms.head.keep_alive {
                Next::KeepAlive
            } else {
                Next::Close
            };
        }
        out.clear();
        body.bytes.clear();
        match collect(
            client,
            core,
            &mut upstream,
            &mut body,
            &account,
            &terms,
            SCRATCH_BYTES,
        )
        .await
        {
            Ok(()) => {}
            Err(ended) => {
                let outcome = match ended {
                    Ended::Failed(failure) => failure.outcome(),
                    Ended::ClientGone => Outcome::ClientGone,
                };
                settle_cut(&mut account, outcome, total);
                // The client must not take what it has for the whole.
                client.conn.sock().reset_on_close();
                return Next::Gone;
            }
        }
    }
}

fn append(out: &mut Vec<u8>, bytes: &[u8], framing: Framing, end: bool) {
    if framing != Framing::Chunked {
        out.extend_from_slice(bytes);
        return;
    }
    if !bytes.is_empty() {
        let mut line = [0; CHUNK_HEAD_BYTES_MAX];
        out.extend_from_slice(write_chunk_head(bytes.len(), &mut line));
        out.extend_from_slice(bytes);
        out.extend_from_slice(CHUNK_END);
    }
    if end {
        out.extend_from_slice(LAST_CHUNK);
    }
}

/// Closes the account of an answer of which only a part was delivered.
fn settle_cut(account: &mut Account, outcome: Outcome, body_bytes: usize) {
    let usage = estimate(account, body_bytes);
    account.settle(outcome, usage, true);
}

/// What a whole answer used whose provider does not tell, by the text in it.
fn estimate_text(account: &Account, answer: &[u8]) -> Usage {
    let (sample, bytes) = tokens::answer_text(account.api(), answer);
    let counted = account.output_counted(&sample, bytes);
    let calibration = account.calibration().unwrap_or_default();
    Usage {
        prompt: account.input_estimated(),
        completion: counted.unwrap_or_else(|| calibration.output_tokens(bytes)),
        ..Usage::default()
    }
}

/// What an answer used whose provider does not tell. Vectors of embeddings are long and no output tokens.
fn estimate(account: &Account, body_bytes: usize) -> Usage {
    let completion = match account.api() {
        Api::Embeddings => 0,
        _ => account
            .calibration()
            .unwrap_or_default()
            .output_tokens(body_bytes as u64),
    };
    Usage {
        prompt: account.input_estimated(),
        completion,
        ..Usage::default()
    }
}
