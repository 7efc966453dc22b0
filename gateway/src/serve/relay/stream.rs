//! A stream of server-sent events: out as it comes in, read along, never held beyond one event.

use std::{
    future::Future,
    io::IoSlice,
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
    time::Duration,
};

use super::{
    Failure, Terms,
    cut::{CHOICES_MAX, Cut},
    drain,
};
use crate::{
    bounds::SCRATCH_BYTES,
    config::schema::OnExhausted,
    dialect::{Api, Finish, Usage, meter::Meter},
    error::{Dialect, Error, Kind},
    http::{
        chunked::{CHUNK_END, CHUNK_HEAD_BYTES_MAX, LAST_CHUNK, frame_in_place, write_chunk_head},
        head::Version,
    },
    ledger::record::Outcome,
    net::{
        Either, clock, race,
        runtime::{Streaming, Timer, yield_now},
    },
    quota::reservation::Exhausted,
    serve::{
        account::Account,
        answer::{self, Framing},
        connection::{Ahead, Client, Next},
        ends::{End, Ends},
        keys::Life,
        upstream::{Broken, Upstream},
    },
};

/// Where a read begins in the scratch buffer: in front of it there is room for a chunk's size line.
const READ_FROM: usize = CHUNK_HEAD_BYTES_MAX;
/// Where it ends at the latest: behind it there is room for a chunk's end.
const READ_TO: usize = SCRATCH_BYTES - CHUNK_END.len();

/// Reads of one stream before other tasks get their turn and its own times are looked at: a wait may be over at once each
/// time.
const READS_IN_A_ROW: u32 = 16;

/// One running stream. Some hundred bytes; its buffers are empty while it waits.
pub struct Stream {
    pub(super) upstream: Upstream,
    pub(super) account: Account,
    pub(super) meter: Meter,
    api: Api,
    /// Of the client's key.
    life: Arc<Life>,
    hide_usage: bool,
    /// Answers that are generated at the same time, as far as a [`Cut`] ends them one by one.
    choices: u8,
    patience: Patience,
    /// The client's connection stays open.
    keep_alive: bool,
    /// The client understands chunks; otherwise the connection's end is the stream's.
    chunked: bool,
    /// What the client's socket did not take.
    unsent: Vec<u8>,
    /// Something came behind the answer's end.
    left_over: bool,
    /// The client is gone, and the rest is to be read for the books.
    drains: bool,
    /// The connection's end came within an event of which the client has a part.
    cut_mid_event: bool,
    /// When the last bytes came.
    last_ns: u64,
    /// When the last event came; 0 before the first.
    last_event_ns: u64,
}

/// The model's timeouts that a stream looks at, nanoseconds.
struct Patience {
    first_token_ns: u64,
    idle_ns: u64,
    total_ns: u64,
}

// What a stream holds for as long as it runs: one more byte takes the allocator's next size, 1280.
const _: () = assert!(size_of::<Stream>() <= 1024);

/// What a read brought.
enum Came {
    /// Bytes, or nothing yet.
    More,
    /// The end of the answer.
    End,
    Failed(Failure),
    /// A limit has nothing left; the client has been sent the end.
    Cut,
    /// The client does not take it.
    ClientGone,
}

/// What a wait ended with.
enum Woken {
    Upstream,
    Client,
    Timer,
    Ended(End),
}

impl Stream {
    /// A stream whose upstream has answered and whose client has been sent nothing.
    pub fn new(mut upstream: Upstream, account: Account, terms: Terms) -> Stream {
        let mut meter = Meter::new(terms.api, terms.hide_usage);
        if account.counts_tokens() {
            meter.keep_text();
        }
        let allowed = account.output_allowed();
        if allowed < u64::MAX {
            let calibration = account.calibration().unwrap_or_default();
            meter.bound(allowed, account.output_is_explicit(), calibration);
        }
        let chunked = terms.head.version == Version::Http11;
        let framing = if chunked {
            Framing::Chunked
        } else {
            Framing::UntilClose
        };
        let mut head = terms.head;
        head.keep_alive &= chunked;
        // Of the two heads and of the terms only what is needed later is kept: the stream may run for minutes.
        let unsent = answer::relayed(&upstream.head, &upstream.received, framing, &terms.report, head);
        upstream.head.fields = Vec::new();
        Stream {
            upstream,
            account,
            meter,
            api: terms.api,
            life: terms.life,
            hide_usage: terms.hide_usage,
            choices: terms.choices.min(CHOICES_MAX) as u8,
            patience: Patience {
                first_token_ns: nanoseconds(terms.timeouts.first_token),
                idle_ns: nanoseconds(terms.timeouts.idle),
                total_ns: nanoseconds(terms.timeouts.total),
            },
            keep_alive: head.keep_alive,
            chunked,
            unsent,
            left_over: false,
            drains: false,
            cut_mid_event: false,
            last_ns: clock::turn_ns(),
            last_event_ns: 0,
        }
    }

    /// Relays it from its head to its end.
    pub async fn run(mut self: Box<Stream>, client: &mut Client) -> Next {
        self.upstream.core().telemetry.counters().streams_opened.inc();
        let streaming = Streaming::begin();
        let (next, upstream_is_whole) = self.relay(client).await;
        drop(streaming);
        self.upstream.core().telemetry.counters().streams_closed.inc();
        if self.drains {
            drain::detach(self);
            return next;
        }
        if upstream_is_whole {
            let Stream {
                upstream, left_over, ..
            } = *self;
            upstream.finish(left_over);
        }
        next
    }

    /// Returns also whether the upstream's connection can be used again.
    async fn relay(&mut self, client: &mut Client) -> (Next, bool) {
        let mut came = self.begin(client);
        let sock = client.conn.sock().clone();
        let mut client_stirs = pin!(sock.readable());
        let mut watching = true;
        let mut timer = Timer::new(self.patience());
        let mut ends = pin!(Ends::new(self.upstream.core(), &self.life, &client.seat));
        let mut reads = 0;
        loop {
            // Boxed, as the failure: a stream that waits has no room for what few streams come to.
            if self.has_unsent(client) && !Box::pin(self.flush(client, &mut ends)).await {
                came = Came::ClientGone;
            }
            match came {
                Came::More => {}
                Came::End => return (self.next(), true),
                Came::Cut => return (self.next(), false),
                Came::Failed(failure) => return (Box::pin(self.fail(client, failure)).await, false),
                Came::ClientGone => return (self.client_gone(), false),
            }
            reads += 1;
            if reads % READS_IN_A_ROW == 0 {
                yield_now().await;
                // The upstream may have been ready whenever it was looked at, so nobody else was.
                if let Some(end) = ends.now() {
                    came = Came::Failed(Failure::Ended(end));
                    continue;
                }
                if let Some(failure) = self.overdue() {
                    came = Came::Failed(failure);
                    continue;
                }
            }
            let watched = watching.then_some(client_stirs.as_mut());
            came = match self.wait(watched, &mut timer, ends.as_mut()).await {
                Woken::Upstream => self.read(client),
                Woken::Ended(end) => Came::Failed(Failure::Ended(end)),
                Woken::Timer => match self.overdue() {
                    Some(failure) => Came::Failed(failure),
                    None => {
                        timer.reset(self.patience());
                        Came::More
                    }
                },
                Woken::Client => match client.look_ahead(self.upstream.core()) {
                    Ahead::Gone => Came::ClientGone,
                    Ahead::Full => {
                        watching = false;
                        Came::More
                    }
                    Ahead::More => {
                        client_stirs.set(sock.readable());
                        Came::More
                    }
                },
            };
        }
    }

    /// Sends the head, together with what came behind the upstream's.
    fn begin(&mut self, client: &mut Client) -> Came {
        let received = std::mem::take(&mut self.upstream.received);
        if let Ok(conn) = self.upstream.conn() {
            conn.sock().acknowledge_less();
        }
        // Where the fields of the head stand is of no use any more.
        client.head.fields = Vec::new();
        let mut came = Came::More;
        for part in received[self.upstream.head.len..].chunks(READ_TO - READ_FROM) {
            let core = self.upstream.core().clone();
            let scratch = &mut *core.scratch();
            scratch[READ_FROM..READ_FROM + part.len()].copy_from_slice(part);
            came = self.pass(client, scratch, part.len());
            if !matches!(came, Came::More) {
                break;
            }
        }
        came
    }

    /// Waits for whatever comes first. Of all futures only the upstream's is made anew for each wait.
    async fn wait(
        &mut self,
        mut client: Option<Pin<&mut impl Future<Output = ()>>>,
        timer: &mut Timer,
        mut ends: Pin<&mut Ends>,
    ) -> Woken {
        let Ok(conn) = self.upstream.conn() else {
            return Woken::Upstream;
        };
        let mut upstream = pin!(conn.readable());
        std::future::poll_fn(|cx| {
            if upstream.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Woken::Upstream);
            }
            if client
                .as_mut()
                .is_some_and(|client| client.as_mut().poll(cx).is_ready())
            {
                return Poll::Ready(Woken::Client);
            }
            if timer.poll(cx).is_ready() {
                return Poll::Ready(Woken::Timer);
            }
            ends.as_mut().poll(cx).map(Woken::Ended)
        })
        .await
    }

    /// Takes what the upstream sent and passes it on.
    fn read(&mut self, client: &mut Client) -> Came {
        let core = self.upstream.core().clone();
        let scratch = &mut *core.scratch();
        let Ok(conn) = self.upstream.conn() else {
            return Came::Failed(Failure::Upstream(Broken::Cut));
        };
        match conn.try_read(&mut scratch[READ_FROM..READ_TO]) {
            Ok(None) => Came::More,
            Ok(Some(0)) if self.upstream.ends_by_close() => self.ended_by_close(client, scratch),
            Ok(Some(0)) | Err(_) => Came::Failed(Failure::Upstream(Broken::Cut)),
            Ok(Some(n)) => self.pass(client, scratch, n),
        }
    }

    /// Passes on `n` bytes that stand in the scratch buffer at [`READ_FROM`].
    fn pass(&mut self, client: &mut Client, scratch: &mut [u8], n: usize) -> Came {
        let decoded = match self.upstream.deframe(&mut scratch[READ_FROM..READ_FROM + n]) {
            Ok(decoded) => decoded,
            Err(broken) => return Came::Failed(Failure::Upstream(broken)),
        };
        let payload = READ_FROM + decoded.payload.start..READ_FROM + decoded.payload.end;
        let events = self.meter.seen.events;
        let (account, mut exhausted) = (&mut self.account, None);
        let kept = self
            .meter
            .feed_within(&mut scratch[payload.clone()], &mut |delivered| {
                account
                    .extend(delivered)
                    .map_err(|rule| exhausted = Some(rule))
                    .ok()
            });
        let kept = payload.start + kept.start..payload.start + kept.end;
        self.note_time(!decoded.payload.is_empty(), self.meter.seen.events - events);
        if let Some(exhausted) = exhausted {
            return self.cut(client, scratch, kept, &exhausted);
        }
        let rest = if decoded.done {
            self.meter.finish()
        } else {
            Vec::new()
        };
        self.account
            .sent(self.meter.ready().len() + kept.len() + rest.len());
        if decoded.done || self.meter.seen.done {
            // The client may take the last event for the end, so the books are closed before it leaves.
            self.settle(self.finished());
        }
        // Bytes behind the answer's end make the connection useless, not the answer.
        self.left_over = decoded.done && decoded.consumed < n;
        let sent = self.send(client, scratch, kept, &rest, decoded.done);
        match (sent, decoded.done) {
            (false, _) => Came::ClientGone,
            (true, false) => Came::More,
            (true, true) => Came::End,
        }
    }

    /// Ends the stream behind what is still to be sent: a limit has nothing left. The upstream is dropped with its
    /// connection, so that it works no longer for an answer that nobody gets.
    fn cut(
        &mut self,
        client: &mut Client,
        scratch: &mut [u8],
        kept: std::ops::Range<usize>,
        exhausted: &Exhausted,
    ) -> Came {
        let sent = if kept.is_empty() {
            self.meter.ready()
        } else {
            &scratch[kept.clone()]
        };
        let end = match exhausted.on_exhausted {
            OnExhausted::Error => {
                let error = Error {
                    code: Some("limit_exhausted"),
                    ..Error::new(
                        Kind::RateLimited,
                        format!("{} is used up: the answer ends here", exhausted.name),
                    )
                };
                self.account.error(error.code());
                error_event(self.api, &error)
            }
            OnExhausted::Finish => {
                let (id, unix_ms) = self.account.id();
                let cut = Cut {
                    api: self.api,
                    exhausted,
                    opening: self.meter.opening(),
                    sent,
                    usage: self.usage().0,
                    tell_usage: !self.hide_usage,
                    choices: self.choices.into(),
                    id: &id,
                    model: self.account.model(),
                    unix_s: unix_ms / 1000,
                };
                cut.finish()
            }
        };
        self.account
            .sent(self.meter.ready().len() + kept.len() + end.len());
        self.account.cut();
        self.meter.seen.finish = match exhausted.on_exhausted {
            OnExhausted::Finish => Finish::Length,
            OnExhausted::Error => Finish::Error,
        };
        self.settle(Outcome::Complete);
        match self.send(client, scratch, kept, &end, true) {
            true => Came::Cut,
            false => Came::ClientGone,
        }
    }

    /// Sends carried events, a part of the scratch buffer, a tail, and the stream's end; what the socket does not take
    /// is kept. False: the client is gone.
    fn send(
        &mut self,
        client: &mut Client,
        scratch: &mut [u8],
        part: std::ops::Range<usize>,
        tail: &[u8],
        end: bool,
    ) -> bool {
        let mut line = [0; CHUNK_HEAD_BYTES_MAX];
        let mut tail_line = [0; CHUNK_HEAD_BYTES_MAX];
        let ready = self.meter.ready();
        let none: &[u8] = &[];
        let slices: [&[u8]; 8] = if self.chunked {
            let part = frame_in_place(scratch, part);
            [
                if ready.is_empty() {
                    none
                } else {
                    write_chunk_head(ready.len(), &mut line)
                },
                ready,
                if ready.is_empty() { none } else { CHUNK_END },
                &scratch[part],
                if tail.is_empty() {
                    none
                } else {
                    write_chunk_head(tail.len(), &mut tail_line)
                },
                tail,
                if tail.is_empty() { none } else { CHUNK_END },
                if end { LAST_CHUNK } else { none },
            ]
        } else {
            [ready, &scratch[part], tail, none, none, none, none, none]
        };
        let total: usize = slices.iter().map(|slice| slice.len()).sum();
        if total == 0 {
            return true;
        }
        self.upstream
            .core()
            .telemetry
            .counters()
            .bytes_to_clients
            .add(total as u64);
        let mut taken = 0;
        if self.unsent.is_empty() {
            match client.conn.try_write_slices(&slices.map(IoSlice::new)) {
                Ok(n) => taken = n,
                Err(_) => return false,
            }
        }
        for slice in slices {
            let gone = taken.min(slice.len());
            self.unsent.extend_from_slice(&slice[gone..]);
            taken -= gone;
        }
        true
    }

    fn has_unsent(&self, client: &Client) -> bool {
        !self.unsent.is_empty() || client.conn.has_unsent()
    }

    /// Waits until the client has taken what it was sent: the back-pressure on the upstream, which is not read
    /// meanwhile. False: the client is gone, or takes nothing for too long.
    async fn flush(&mut self, client: &mut Client, ends: &mut Pin<&mut Ends>) -> bool {
        let unsent = std::mem::take(&mut self.unsent);
        let stall = client.stall;
        // A reader that takes a byte now and then must not hold an upstream for longer than a request may last.
        let used_ns = clock::turn_ns() - self.account.started_ns();
        let core = self.upstream.core().clone();
        let total = core.late(left(self.patience.total_ns, used_ns));
        let others = race(ends.as_mut(), total);
        match race(client.conn.write_all(&unsent, stall), others).await {
            Either::First(result) => {
                // A slow reader's time is not the upstream's silence.
                self.last_ns = clock::turn_ns();
                result.is_ok()
            }
            Either::Second(end) => {
                // The client stands in the middle of a chunk, where no error event can be put.
                self.settle(match end {
                    Either::First(_) => Outcome::Stopped,
                    Either::Second(()) => Outcome::TimedOut,
                });
                false
            }
        }
    }

    fn note_time(&mut self, any: bool, events: u64) {
        if !any {
            return;
        }
        let now_ns = clock::turn_ns();
        self.last_ns = now_ns;
        if events == 0 {
            return;
        }
        self.upstream
            .core()
            .telemetry
            .counters()
            .events_relayed
            .add(events);
        if self.last_event_ns == 0 {
            self.account.first_byte(now_ns);
        } else {
            self.upstream
                .core()
                .telemetry
                .record_inter_token_us((now_ns - self.last_event_ns) / 1000, events);
        }
        self.last_event_ns = now_ns;
    }

    /// The longest that may be waited now: for the first event, for the next, or for the end.
    fn patience(&self) -> Duration {
        let now_ns = clock::turn_ns();
        let silence = match self.last_event_ns {
            0 => left(
                self.patience.first_token_ns,
                now_ns.saturating_sub(self.account.dispatched_ns()),
            ),
            _ => left(self.patience.idle_ns, now_ns - self.last_ns),
        };
        silence.min(left(self.patience.total_ns, now_ns - self.account.started_ns()))
    }

    fn overdue(&self) -> Option<Failure> {
        let now_ns = clock::turn_ns();
        if left(self.patience.total_ns, now_ns - self.account.started_ns()).is_zero() {
            return Some(Failure::Total);
        }
        self.patience().is_zero().then_some(Failure::Idle)
    }

    /// An upstream without framing has closed: only the last event tells whether that was the end.
    fn ended_by_close(&mut self, client: &mut Client, scratch: &mut [u8]) -> Came {
        // The last read's events went out with it.
        self.meter.clear_ready();
        self.cut_mid_event = self.meter.is_mid_event();
        let rest = self.meter.finish();
        if !self.meter.seen.done {
            return Came::Failed(Failure::Upstream(Broken::Cut));
        }
        self.account.sent(rest.len());
        self.settle(self.finished());
        match self.send(client, scratch, READ_FROM..READ_FROM, &rest, true) {
            true => Came::End,
            false => Came::ClientGone,
        }
    }

    fn finished(&self) -> Outcome {
        if self.meter.seen.failed {
            Outcome::UpstreamFailed
        } else {
            Outcome::Complete
        }
    }

    /// Closes the account with what the stream has told, or with an estimate of what was delivered.
    pub(super) fn settle(&mut self, outcome: Outcome) {
        let (usage, estimated) = self.usage();
        let seen = &self.meter.seen;
        self.account.finish(seen.finish);
        self.account.text(seen.text_bytes());
        self.account.settle(outcome, usage, estimated);
    }

    /// What the stream has told of its usage, or else an estimate of what was delivered, and whether it is one.
    fn usage(&self) -> (Usage, bool) {
        let calibration = self.account.calibration().unwrap_or_default();
        let seen = &self.meter.seen;
        let counted = || self.account.output_counted(self.meter.text(), seen.text_bytes());
        seen.used(self.account.input_estimated(), &calibration, counted)
    }

    fn client_gone(&mut self) -> Next {
        if self.account.drains() && !self.account.is_settled() {
            self.drains = true;
            return Next::Gone;
        }
        self.settle(Outcome::ClientGone);
        Next::Gone
    }

    fn next(&self) -> Next {
        if self.keep_alive {
            Next::KeepAlive
        } else {
            Next::Close
        }
    }

    /// Ends a stream that cannot be completed: with an error event, never with what looks like a proper end.
    async fn fail(&mut self, client: &mut Client, failure: Failure) -> Next {
        let mut bytes = Vec::new();
        if !self.account.is_settled() {
            let error = failure.error();
            self.account.error(error.code());
            self.upstream.core().telemetry.counters().stream_errors.inc();
            self.settle(failure.outcome());
            // What was begun of an event cannot be taken back: it is ended, so that the error can be read.
            let mid_event = self.cut_mid_event || self.meter.is_mid_event();
            let gap: &[u8] = if mid_event { b"\n\n" } else { b"" };
            let event = [gap, &error_event(self.api, &error)].concat();
            if self.chunked {
                let mut line = [0; CHUNK_HEAD_BYTES_MAX];
                bytes.extend_from_slice(write_chunk_head(event.len(), &mut line));
                bytes.extend_from_slice(&event);
                bytes.extend_from_slice(CHUNK_END);
            } else {
                bytes = event;
            }
        }
        if self.chunked {
            bytes.extend_from_slice(LAST_CHUNK);
        }
        match client.conn.write_all(&bytes, client.stall).await {
            Ok(()) => Next::Close,
            Err(_) => Next::Gone,
        }
    }
}

/// What is left of a time that began `used_ns` ago.
fn left(time_ns: u64, used_ns: u64) -> Duration {
    Duration::from_nanos(time_ns.saturating_sub(used_ns))
}

/// Centuries are for ever.
fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// An error as an event of the API's stream.
fn error_event(api: Api, error: &Error) -> Vec<u8> {
    let mut event = Vec::with_capacity(256);
    if api == Api::Responses {
        // platform.openai.com/docs/api-reference/responses-streaming/error
        let data = serde_json::json!({
            "type": "error", "code": error.code(), "message": error.message, "param": null,
        });
        event.extend_from_slice(b"event: error\ndata: ");
        event.extend_from_slice(data.to_string().as_bytes());
    } else {
        event.extend_from_slice(b"data: ");
        event.extend_from_slice(&error.body(Dialect::OpenAi));
    }
    event.extend_from_slice(b"\n\n");
    event
}
