//! One connection of the simulator: reads requests, answers them as their behaviour says, and never blocks.

mod intake;

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use mio::net::TcpStream;

use super::answer::{Answer, Step, put_error_object};
use super::behaviour::{Behaviour, Death, Stale};
use super::limits::Provider;
use super::socket::{Socket, Tls};
use super::stats::{Counters, Last, count};
use crate::http::Dechunker;
use crate::load::Trace;
use crate::random::Random;
use crate::wheel::Wheel;

/// Bytes of events that a flood (`pace=0`) gathers for one write.
const FLOOD_BYTES: usize = 16 * 1024;
/// Bytes that one connection may send before the others have their turn.
const TURN_BYTES_MAX: usize = 256 * 1024;
/// A stream that is further behind than this gives up its old timetable.
const BEHIND_NS_MAX: u64 = 1_000_000_000;

/// What all connections of a server share.
pub struct Shared {
    pub counters: Counters,
    pub last: Last,
    pub behaviour: RwLock<Behaviour>,
    /// Behaviours of models that do not say it in their names.
    pub models: RwLock<HashMap<String, Behaviour>>,
    pub provider: Provider,
    pub tls: Option<Tls>,
    /// A recorded fleet: each call takes the next row.
    pub trace: Option<Trace>,
    pub next_row: AtomicUsize,
}

/// Models whose behaviour can be set.
const MODELS_MAX: usize = 1024;

impl Shared {
    /// What a call of `model` gets.
    pub fn behaviour_of(&self, model: &str) -> Result<Behaviour, String> {
        let named = self
            .models
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(model)
            .cloned();
        match named {
            Some(behaviour) => Ok(behaviour),
            None => self
                .behaviour
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .for_model(model),
        }
    }

    /// `sim` and the models whose behaviour was set, by name.
    pub fn model_names(&self) -> Vec<String> {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        let mut names: Vec<String> = models.keys().filter(|name| *name != "sim").cloned().collect();
        names.sort_unstable();
        names.insert(0, "sim".to_owned());
        names
    }

    /// What the next call gets by the trace, in its own words' place.
    pub fn play(&self, behaviour: &mut Behaviour) {
        let Some(trace) = &self.trace else {
            return;
        };
        let rows = trace.rows();
        let row = &rows[self.next_row.fetch_add(1, Relaxed) % rows.len()];
        if row.output_tokens > 0 {
            behaviour.tokens = row.output_tokens;
        }
        let time = |milliseconds: f64| crate::random::seconds(milliseconds / 1000.0);
        behaviour.first = row.ttft_ms.map_or(behaviour.first, time);
        if let Some(pace_ms) = row.itl_ms {
            (behaviour.pace, behaviour.spreads.pace) = (time(pace_ms), None);
        }
    }

    /// Sets what calls of `model` get from now on.
    ///
    /// # Errors
    /// A text for people: words that are none, or too many models.
    pub fn set_model(&self, model: &str, words: &str) -> Result<(), String> {
        let mut behaviour = self
            .behaviour
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        behaviour.apply(words)?;
        let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
        if models.len() >= MODELS_MAX && !models.contains_key(model) {
            return Err(format!("more than {MODELS_MAX} models"));
        }
        models.insert(model.to_owned(), behaviour);
        Ok(())
    }
}

/// What the connections of one thread share.
pub struct Context<'a> {
    pub shared: &'a Shared,
    /// Nanoseconds since the thread's epoch.
    pub now_ns: u64,
    /// Where reads go first.
    pub input: &'a mut [u8],
    /// Where an event is put together.
    pub event: &'a mut Vec<u8>,
    /// Number of the next call.
    pub next_id: &'a mut u64,
    pub random: &'a mut Random,
}

/// What a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// The socket.
    Socket,
    /// This time, in nanoseconds since the thread's epoch.
    Until(u64),
    /// Nothing: it only lets others have their turn.
    Turn,
    /// It is over.
    Close,
}

enum Phase {
    /// A request's head is awaited.
    Head,
    /// A request's body is awaited.
    Body(Body),
    /// The answer starts at this time.
    Delay {
        until_ns: u64,
        answer: Box<Answer>,
    },
    Stream {
        due_ns: u64,
        answer: Box<Answer>,
    },
    /// The last bytes of an answer are in `out`.
    Last(Ending),
    /// The last bytes before a death are in `out`.
    Dying {
        death: Death,
        stream: bool,
    },
    /// Silent until the peer goes.
    Stalled {
        stream: bool,
    },
}

/// What comes behind the last bytes of an answer.
#[derive(Clone, Copy)]
struct Ending {
    close: bool,
    stale: Stale,
    stream: bool,
}

impl Ending {
    /// Of an answer of the simulator itself.
    const PLAIN: Self = Self {
        close: false,
        stale: Stale::No,
        stream: false,
    };
}

struct Body {
    head_bytes: usize,
    length: u64,
    dechunker: Option<Dechunker>,
}

pub struct Connection {
    socket: Socket,
    endpoint: usize,
    phase: Phase,
    /// What has been received and not understood yet.
    received: Vec<u8>,
    head: Vec<u8>,
    body: Vec<u8>,
    out: Vec<u8>,
    out_sent: usize,
    split_bytes: usize,
    split_gap_ns: u64,
    stale: Stale,
    /// The peer asked for the connection's end after this answer.
    close_asked: bool,
    /// Number of the timer that counts; 0 for none.
    pub timer: u64,
    /// When that timer fires.
    timer_at_ns: u64,
}

/// How a read or write left the connection.
enum Io {
    Done,
    Blocked,
    /// A piece was written, more is to come.
    Piece,
    Gone,
}

impl Connection {
    pub fn new(socket: Socket, endpoint: usize) -> Self {
        Self {
            socket,
            endpoint,
            phase: Phase::Head,
            received: Vec::new(),
            head: Vec::new(),
            body: Vec::new(),
            out: Vec::new(),
            out_sent: 0,
            split_bytes: 0,
            split_gap_ns: 0,
            stale: Stale::No,
            close_asked: false,
            timer: 0,
            timer_at_ns: 0,
        }
    }

    pub fn socket(&mut self) -> &mut TcpStream {
        self.socket.tcp()
    }

    /// Arms the timer, unless it stands at that time already.
    pub fn wait_until(&mut self, at_ns: u64, index: usize, wheel: &mut Wheel) {
        if self.timer == 0 || self.timer_at_ns != at_ns {
            self.timer = wheel.arm(at_ns, index);
            self.timer_at_ns = at_ns;
        }
    }

    /// Takes all that the socket has, then goes on.
    pub fn on_readable(&mut self, context: &mut Context<'_>) -> Wait {
        self.receive(context, false)
    }

    /// The same for a socket that the peer has closed for writing: this edge is the last, so its end must be read now.
    pub fn on_closing(&mut self, context: &mut Context<'_>) -> Wait {
        self.receive(context, true)
    }

    fn receive(&mut self, context: &mut Context<'_>, to_the_end: bool) -> Wait {
        loop {
            match self.socket.read(context.input) {
                Ok(0) => return self.peer_left(context),
                Ok(received) => {
                    if !self.take(received, context) {
                        return self.peer_left(context);
                    }
                    if received < context.input.len() && !to_the_end && self.socket.short_read_is_empty() {
                        // A short read means an empty socket; should more come, the poll says so.
                        return self.go_on(context);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return self.go_on(context),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return self.peer_left(context),
            }
        }
    }

    /// Does all that can be done now.
    pub fn go_on(&mut self, context: &mut Context<'_>) -> Wait {
        let mut sent = 0;
        loop {
            let before = self.out.len() - self.out_sent;
            match self.flush() {
                Io::Done => {}
                Io::Blocked => return Wait::Socket,
                Io::Piece if self.split_gap_ns > 0 => return Wait::Until(context.now_ns + self.split_gap_ns),
                Io::Piece => return Wait::Turn,
                Io::Gone => return self.peer_left(context),
            }
            sent += before;
            if sent > TURN_BYTES_MAX {
                return Wait::Turn;
            }
            if let Some(wait) = self.advance(context) {
                return wait;
            }
        }
    }

    /// One move of the state machine, with nothing left to write; `None` where there is more to do.
    fn advance(&mut self, context: &mut Context<'_>) -> Option<Wait> {
        match &mut self.phase {
            Phase::Head => self.read_head(context),
            Phase::Body(_) => self.read_body(context),
            Phase::Delay { until_ns, .. } if *until_ns > context.now_ns => Some(Wait::Until(*until_ns)),
            Phase::Delay { .. } => {
                self.start_answer(context);
                None
            }
            Phase::Stream { due_ns, .. } if *due_ns > context.now_ns => Some(Wait::Until(*due_ns)),
            Phase::Stream { .. } => {
                self.stream(context);
                None
            }
            Phase::Last(ending) => {
                let ending = *ending;
                self.end(ending, context)
            }
            Phase::Dying { death, stream } => {
                let (death, stream) = (*death, *stream);
                self.die(death, stream, context)
            }
            Phase::Stalled { .. } => Some(Wait::Socket),
        }
    }

    /// An answer has been written to its end.
    fn end(&mut self, ending: Ending, context: &Context<'_>) -> Option<Wait> {
        self.phase = Phase::Head;
        self.split_bytes = 0;
        if ending.stream {
            let counters = &context.shared.counters;
            count(&counters.streams_completed);
            counters.streams_open.fetch_sub(1, Relaxed);
        }
        if ending.close || self.close_asked || ending.stale == Stale::AtOnce {
            self.socket.end();
            return Some(Wait::Close);
        }
        self.stale = ending.stale;
        None
    }

    fn die(&mut self, death: Death, stream: bool, context: &Context<'_>) -> Option<Wait> {
        count(&context.shared.counters.deaths);
        match death {
            Death::Stall => {
                self.phase = Phase::Stalled { stream };
                return None;
            }
            Death::Reset => self.socket.reset(),
            Death::Close => self.socket.end(),
        }
        Some(Wait::Close)
    }

    /// Counts what the peer's going means.
    fn peer_left(&self, context: &Context<'_>) -> Wait {
        let counters = &context.shared.counters;
        if self.has_stream() {
            count(&counters.streams_aborted);
        } else if matches!(self.phase, Phase::Delay { .. } | Phase::Stalled { .. }) {
            count(&counters.plain_aborted);
        }
        Wait::Close
    }

    /// Whether a stream is under way: it is to be taken from the gauge when the connection closes.
    pub fn has_stream(&self) -> bool {
        match &self.phase {
            Phase::Head | Phase::Body(_) => false,
            Phase::Delay { answer, .. } => answer.stream,
            Phase::Stream { .. } => true,
            Phase::Last(Ending { stream, .. }) | Phase::Dying { stream, .. } | Phase::Stalled { stream } => {
                *stream
            }
        }
    }

    /// Writes what is in `out`, or one piece of it.
    fn flush(&mut self) -> Io {
        while self.out_sent < self.out.len() {
            let rest = &self.out[self.out_sent..];
            let piece = if self.split_bytes == 0 {
                rest
            } else {
                &rest[..rest.len().min(self.split_bytes)]
            };
            match self.socket.write(piece) {
                Ok(0) => return Io::Gone,
                Ok(written) => self.out_sent += written,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Io::Blocked,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return Io::Gone,
            }
            if self.split_bytes > 0 && self.out_sent < self.out.len() {
                return Io::Piece;
            }
        }
        self.out.clear();
        self.out_sent = 0;
        match self.socket.flush() {
            Ok(()) => Io::Done,
            Err(error) if error.kind() == ErrorKind::WouldBlock => Io::Blocked,
            Err(_) => Io::Gone,
        }
    }

    /// Puts the head, and a plain answer's body, into `out`; or the fault that comes instead.
    fn start_answer(&mut self, context: &mut Context<'_>) {
        let Phase::Delay { answer, .. } = std::mem::replace(&mut self.phase, Phase::Head) else {
            return;
        };
        let behaviour = &answer.behaviour;
        self.split_bytes = behaviour.split_bytes;
        self.split_gap_ns = nanoseconds(behaviour.split_gap);
        let last = Ending {
            close: answer.closes(),
            stale: behaviour.stale,
            stream: answer.stream,
        };
        if behaviour.garbage {
            self.out
                .extend_from_slice(b"\x16\x03garbage, not an answer\r\n\r\n");
            self.phase = Phase::Last(Ending { close: true, ..last });
            return;
        }
        if let (Some(death), None, false) = (behaviour.death, behaviour.after, behaviour.bad_chunk) {
            self.phase = Phase::Dying {
                death,
                stream: answer.stream,
            };
            return;
        }
        if behaviour.status != 200 {
            let (status, retry_s) = (behaviour.status, behaviour.retry_after_s);
            let object = answer.error(status, &format!("simulated status {status}"));
            put_error_object(
                &mut self.out,
                status,
                &object,
                &answer.limit_fields,
                retry_s,
                last.close,
            );
            self.phase = Phase::Last(last);
            return;
        }
        if !answer.stream {
            return self.start_plain(&answer, last);
        }
        answer.put_head(&mut self.out, 0);
        let due_ns = context.now_ns + nanoseconds(behaviour.first);
        self.phase = Phase::Stream { due_ns, answer };
        if due_ns == context.now_ns {
            // Head and first events go out in one write.
            self.stream(context);
        }
    }

    fn start_plain(&mut self, answer: &Answer, last: Ending) {
        let body = answer.plain_body();
        answer.put_head(&mut self.out, body.len());
        let Some(death) = answer.behaviour.death else {
            self.out.extend_from_slice(&body);
            self.phase = Phase::Last(last);
            return;
        };
        // A plain answer dies in its middle, wherever `after` says.
        self.out.extend_from_slice(&body[..body.len() / 2]);
        self.phase = Phase::Dying { death, stream: false };
    }

    /// Puts the next event, or as many as a flood gathers, into `out`.
    fn stream(&mut self, context: &mut Context<'_>) {
        let Phase::Stream { due_ns, answer } = &mut self.phase else {
            return;
        };
        let flood = answer.is_flood();
        let mut tokens = 0;
        let end = loop {
            match answer.step(context.event, &mut self.out) {
                Step::Token { content } => tokens += u64::from(content),
                end => break Some(end),
            }
            if !flood || self.out.len() >= FLOOD_BYTES || answer.behaviour.split_bytes > 0 {
                break None;
            }
        };
        context.shared.counters.tokens_sent.fetch_add(tokens, Relaxed);
        if !flood {
            *due_ns += answer.next_pace_ns();
        }
        if context.now_ns > *due_ns + BEHIND_NS_MAX {
            *due_ns = context.now_ns;
        }
        let last = Ending {
            close: answer.closes(),
            stale: answer.behaviour.stale,
            stream: true,
        };
        match end {
            None | Some(Step::Token { .. }) => {}
            Some(Step::End) => self.phase = Phase::Last(last),
            Some(Step::Broken(death)) => self.phase = Phase::Dying { death, stream: true },
        }
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
