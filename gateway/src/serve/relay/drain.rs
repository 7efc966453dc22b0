//! Reading an answer on whose client has hung up (`on_disconnect: drain`): nobody gets it, but the books have the
//! provider's own figures. Bounded in time and bytes; what is not told by then is estimated, and the upstream cancelled.

use std::{rc::Rc, time::Duration};

use super::{stream::Stream, whole};
use crate::{
    bounds::{DRAIN_BYTES_MAX, DRAIN_TIME_MAX},
    core::{Core, STOP},
    dialect::{Usage, usage},
    ledger::record::{Flags, Outcome},
    net::{Either, race, runtime::spawn},
    serve::{account::Account, upstream::Upstream},
};

/// How much of an answer's end is kept to find its usage in.
const TAIL_BYTES: usize = 64 * 1024;

/// How long the end of a body is waited for that comes behind a stream's last event.
const END_TIME_MAX: Duration = Duration::from_secs(1);

/// Whether an answer was read to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Whole {
        /// Something came behind it.
        left_over: bool,
    },
    Given,
}

/// Reads the rest of a stream in a task of its own: the client's connection is free at once. The account goes along, and
/// with it what it holds of the limits, for the upstream still works.
pub fn detach(mut stream: Box<Stream>) {
    stream.account.flag(Flags::DRAINED);
    spawn(async move {
        let core = stream.upstream.core().clone();
        core.telemetry.counters().answers_drained.inc();
        let Stream {
            upstream,
            meter,
            account,
            ..
        } = &mut *stream;
        let mut end = read(&core, upstream, DRAIN_TIME_MAX, |payload| {
            // Limits bind it as they did while the client was there: it takes more of them, or ends.
            meter.feed_within(payload, &mut |delivered| account.extend(delivered).ok());
            meter.clear_ready();
            !meter.seen.done && !meter.is_exhausted()
        })
        .await;
        if stream.meter.is_exhausted() {
            stream.account.cut();
        }
        drop(stream.meter.finish());
        stream.settle(Outcome::ClientGone);
        if end == End::Given && stream.meter.seen.done {
            // What is told is told; the rest is looked at for the connection's sake only.
            end = read(&core, &mut stream.upstream, END_TIME_MAX, |_| true).await;
        }
        if let End::Whole { left_over } = end {
            stream.upstream.finish(left_over);
        }
    });
}

/// Reads the rest of an answer of which the client has nothing, and closes its account.
///
/// `before` is what was received of its body, framing taken off.
pub async fn rest(core: &Rc<Core>, mut upstream: Upstream, account: &mut Account, before: Vec<u8>) {
    core.telemetry.counters().answers_drained.inc();
    account.flag(Flags::DRAINED);
    let mut received = std::mem::take(&mut upstream.received);
    let mut behind_head = received.split_off(upstream.head.len.min(received.len()));
    let mut tail = before;
    let mut done = true;
    if let Ok(decoded) = upstream.deframe(&mut behind_head) {
        done = decoded.done;
        tail.extend_from_slice(&behind_head[decoded.payload]);
    }
    let mut body_bytes = tail.len();
    if !done {
        read(core, &mut upstream, DRAIN_TIME_MAX, |payload| {
            body_bytes += payload.len();
            tail.extend_from_slice(payload);
            if tail.len() > 2 * TAIL_BYTES {
                tail.drain(..tail.len() - TAIL_BYTES);
            }
            true
        })
        .await;
    }
    let told = match upstream.head.status {
        200..300 => usage::find(account.api(), &tail).or_else(|| usage::find_in_tail(&tail)),
        _ => Some(Usage::default()),
    };
    let usage = told.unwrap_or_else(|| whole::estimate_of(account, &tail, body_bytes));
    account.settle(Outcome::ClientGone, usage, told.is_none());
}

/// Reads until the answer's end, or until `look`, which is given the bytes without their framing, has seen enough.
async fn read(
    core: &Rc<Core>,
    upstream: &mut Upstream,
    time: Duration,
    mut look: impl FnMut(&mut [u8]) -> bool,
) -> End {
    let reading = async {
        let mut read_bytes = 0;
        while read_bytes < DRAIN_BYTES_MAX {
            let Ok(conn) = upstream.conn() else {
                return End::Given;
            };
            conn.readable().await;
            let scratch = &mut *core.scratch();
            let n = match upstream.conn().and_then(|conn| conn.try_read(scratch)) {
                Ok(None) => continue,
                Ok(Some(0)) | Err(_) => return End::Given,
                Ok(Some(n)) => n,
            };
            read_bytes += n as u64;
            let Ok(decoded) = upstream.deframe(&mut scratch[..n]) else {
                return End::Given;
            };
            let more = look(&mut scratch[decoded.payload]);
            if decoded.done {
                return End::Whole {
                    left_over: decoded.consumed < n,
                };
            }
            if !more {
                return End::Given;
            }
        }
        End::Given
    };
    let ends = race(core.late(time), core.drain.reached(STOP));
    match race(reading, ends).await {
        Either::First(end) => end,
        Either::Second(_) => End::Given,
    }
}
