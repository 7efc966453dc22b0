//! The access log: one JSON object a line for every request, written off the hot path.

use std::{
    fmt,
    fs::{File, OpenOptions},
    io::{self, BufWriter, Write},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use serde::{Serialize, Serializer, ser::SerializeMap};

use super::CoreShared;
use crate::{dialect::Usage, ledger::record::RequestId};

/// How often the queues are emptied. With [`crate::bounds::ACCESS_LOG_QUEUE`] entries a core may log
/// 80,000 requests a second before any is dropped.
const DRAIN_EVERY: Duration = Duration::from_millis(100);

/// Orders that may wait for the writer. More wait only where its destination takes nothing.
const ORDERS_MAX: usize = 8;

/// Longest wait for the writer to hand over what is queued. A pipe that nobody reads must not keep
/// the process from ending.
const FLUSH_WAIT_MAX: Duration = Duration::from_secs(2);

/// A short text of at most `N` bytes (at most 255) that lives where it stands, without allocation.
#[derive(Clone, Copy)]
pub struct Text<const N: usize> {
    len: u8,
    bytes: [u8; N],
}

impl<const N: usize> Text<N> {
    const FITS: () = assert!(N <= u8::MAX as usize);

    /// The text, cut at the last character that fits.
    pub fn cut(text: &str) -> Text<N> {
        let () = Self::FITS;
        let mut len = text.len().min(N);
        while !text.is_char_boundary(len) {
            len -= 1;
        }
        let mut bytes = [0; N];
        bytes[..len].copy_from_slice(&text.as_bytes()[..len]);
        Text {
            len: len as u8,
            bytes,
        }
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.bytes[..usize::from(self.len)]).unwrap_or_default()
    }
}

impl<const N: usize> Default for Text<N> {
    fn default() -> Self {
        Text {
            len: 0,
            bytes: [0; N],
        }
    }
}

impl<const N: usize> fmt::Debug for Text<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl<const N: usize> From<&str> for Text<N> {
    fn from(text: &str) -> Self {
        Text::cut(text)
    }
}

/// One request, as the access log tells it. Holds names and figures only: no header, no body, no
/// credential, and of the target the path alone, since a query may carry a key.
#[derive(Debug, Clone, Default)]
pub struct AccessEntry {
    /// When the request's head was complete, milliseconds since the Unix epoch.
    pub time_unix_ms: u64,
    pub request_id: Option<RequestId>,
    pub client: Option<IpAddr>,
    pub method: Text<7>,
    /// Path without its query; give it to [`path_of`] first.
    pub path: Text<64>,
    /// Name of the virtual key; none when it is not known who asked.
    pub key: Option<Arc<str>>,
    /// Virtual model; none when the request named none that exists.
    pub model: Option<Arc<str>>,
    pub provider: Option<Arc<str>>,
    pub upstream_model: Option<Arc<str>>,
    /// Status that the client was sent; 0 when it was sent none.
    pub status: u16,
    /// How it ended: a name of the ledger's `Outcome`, or `refused`.
    pub outcome: &'static str,
    /// Code of the error that the client was sent.
    pub error: Option<&'static str>,
    pub stream: bool,
    /// The token counts are the gateway's estimate.
    pub estimated: bool,
    pub usage: Usage,
    /// Requests made to upstreams.
    pub attempts: u8,
    /// From complete head to the first byte of the answer's body, microseconds; 0 for none.
    pub ttft_us: u64,
    /// From complete head to the end, microseconds.
    pub duration_us: u64,
    /// Bytes of the request's body.
    pub bytes_in: u64,
    /// Bytes of the answer's body.
    pub bytes_out: u64,
}

// A core's queue holds ACCESS_LOG_QUEUE of these: 2.5 MiB.
const _: () = assert!(size_of::<AccessEntry>() <= 312);

/// A request target without its query.
pub fn path_of(target: &str) -> &str {
    target.split(['?', '#']).next().unwrap_or_default()
}

impl Serialize for AccessEntry {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("time", &rfc3339(self.time_unix_ms))?;
        if let Some(id) = self.request_id {
            map.serialize_entry("request_id", &format_args!("{:032x}", u128::from_be_bytes(id.0)))?;
        }
        if let Some(client) = self.client {
            map.serialize_entry("client", &client)?;
        }
        map.serialize_entry("method", self.method.as_str())?;
        map.serialize_entry("path", self.path.as_str())?;
        let names = [
            ("key", &self.key),
            ("model", &self.model),
            ("provider", &self.provider),
            ("upstream_model", &self.upstream_model),
        ];
        for (name, value) in names {
            if let Some(value) = value {
                map.serialize_entry(name, &**value)?;
            }
        }
        map.serialize_entry("status", &self.status)?;
        map.serialize_entry("outcome", self.outcome)?;
        if let Some(error) = self.error {
            map.serialize_entry("error", error)?;
        }
        map.serialize_entry("stream", &self.stream)?;
        map.serialize_entry("attempts", &self.attempts)?;
        map.serialize_entry("prompt_tokens", &self.usage.prompt)?;
        map.serialize_entry("cached_tokens", &self.usage.cached)?;
        map.serialize_entry("completion_tokens", &self.usage.completion)?;
        map.serialize_entry("reasoning_tokens", &self.usage.reasoning)?;
        map.serialize_entry("estimated", &self.estimated)?;
        map.serialize_entry("ttft_us", &self.ttft_us)?;
        map.serialize_entry("duration_us", &self.duration_us)?;
        map.serialize_entry("bytes_in", &self.bytes_in)?;
        map.serialize_entry("bytes_out", &self.bytes_out)?;
        map.end()
    }
}

/// `2026-01-31T12:00:00.123Z`, the form of RFC 3339; empty for a time beyond year 9999.
fn rfc3339(unix_ms: u64) -> String {
    i64::try_from(unix_ms)
        .ok()
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
        .map_or_else(String::new, |time| format!("{time:.3}"))
}

/// Where the access log goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    Off,
    Stdout,
    Stderr,
    File(PathBuf),
}

impl Destination {
    /// Reads `log.access` of the configuration: `off`, `stdout`, `stderr` or a file's path.
    pub fn parse(text: &str) -> Destination {
        match text {
            "off" => Destination::Off,
            "stdout" => Destination::Stdout,
            "stderr" => Destination::Stderr,
            path => Destination::File(PathBuf::from(path)),
        }
    }

    fn open(&self) -> io::Result<Option<Box<dyn Write + Send>>> {
        Ok(match self {
            Destination::Off => None,
            Destination::Stdout => Some(Box::new(io::stdout())),
            Destination::Stderr => Some(Box::new(io::stderr())),
            Destination::File(path) => Some(Box::new(append(path)?)),
        })
    }
}

/// Opens for appending; made readable for its owner and group only, as it names who asked for what.
///
/// To open a pipe that nobody reads would wait for a reader (fifo(7)), and the control thread with it: that is an error.
fn append(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = OpenOptions::new();
    options.append(true).create(true).mode(0o640);
    let file = options.clone().custom_flags(libc::O_NONBLOCK).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        // There is a reader: opened again, as the writer's thread may wait for it.
        false => options.open(path),
    }
}

/// The access log's writer: a thread that empties the cores' queues.
#[derive(Debug)]
pub struct AccessLog {
    cores: Vec<Arc<CoreShared>>,
    orders: Sender<Order>,
    /// Disconnected when the thread has ended.
    ended: Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

enum Order {
    Write(Destination, Box<dyn Write + Send>),
    Pause,
    Flush(Sender<()>),
}

impl AccessLog {
    /// Starts the writer and turns the cores' queues on, unless the destination is `off`.
    ///
    /// # Errors
    /// The file cannot be opened for appending, or the thread not be started.
    pub fn start(cores: Vec<Arc<CoreShared>>, destination: &Destination) -> io::Result<AccessLog> {
        let (orders, inbox) = bounded(ORDERS_MAX);
        let (alive, ended) = bounded::<()>(1);
        let mut writer = Writer {
            cores: cores.clone(),
            out: None,
            failing: false,
        };
        let thread = std::thread::Builder::new()
            .name("access-log".into())
            .spawn(move || {
                writer.run(&inbox);
                drop(alive);
            })?;
        let log = AccessLog {
            cores,
            orders,
            ended,
            thread: Some(thread),
        };
        log.reopen(destination)?;
        Ok(log)
    }

    /// Opens the destination anew: after a reload, which may name another one, and for logrotate,
    /// which has moved the file away. When that fails the old one stays in use.
    ///
    /// # Errors
    /// The file cannot be opened for appending, or the writer is stuck in its old destination.
    pub fn reopen(&self, destination: &Destination) -> io::Result<()> {
        let order = match destination.open()? {
            Some(out) => Order::Write(destination.clone(), out),
            None => Order::Pause,
        };
        let on = !matches!(order, Order::Pause);
        self.orders.try_send(order).map_err(|_| {
            io::Error::new(io::ErrorKind::WouldBlock, "the writer of the access log is stuck")
        })?;
        for core in &self.cores {
            core.set_access_log(on);
        }
        Ok(())
    }

    /// Waits until everything that is queued now is handed to the operating system, at most
    /// [`FLUSH_WAIT_MAX`]. For tests and for the end of the process; blocks.
    pub fn flush(&self) {
        let (done, wait) = bounded(1);
        if self.orders.try_send(Order::Flush(done)).is_ok() {
            let _ = wait.recv_timeout(FLUSH_WAIT_MAX);
        }
    }
}

impl Drop for AccessLog {
    /// Writes what is queued and ends the thread; a thread that is stuck is left behind.
    fn drop(&mut self) {
        self.orders = bounded(1).0;
        let ended = self.ended.recv_timeout(FLUSH_WAIT_MAX);
        if let (Err(RecvTimeoutError::Disconnected), Some(thread)) = (ended, self.thread.take()) {
            let _ = thread.join();
        }
    }
}

/// State of the writing thread.
struct Writer {
    cores: Vec<Arc<CoreShared>>,
    out: Option<(Destination, BufWriter<Box<dyn Write + Send>>)>,
    /// Whether the last write failed: so that a full disk is told once, not ten times a second.
    failing: bool,
}

impl Writer {
    fn run(&mut self, inbox: &Receiver<Order>) {
        loop {
            // Without a destination there is nothing to do before the next order.
            let order = match self.out {
                Some(_) => inbox.recv_timeout(DRAIN_EVERY),
                None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            self.drain();
            match order {
                Ok(Order::Write(destination, out)) => {
                    self.out = Some((destination, BufWriter::with_capacity(64 * 1024, out)));
                    self.failing = false;
                }
                Ok(Order::Pause) => self.out = None,
                Ok(Order::Flush(done)) => drop(done),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Writes what the queues hold. One turn is bounded: entries that come while it writes are for
    /// the next. Without a destination the queues are left alone; no core fills them then.
    fn drain(&mut self) {
        let Some((destination, out)) = &mut self.out else {
            return;
        };
        let mut result = Ok(());
        for core in &self.cores {
            for _ in 0..crate::bounds::ACCESS_LOG_QUEUE {
                let Some(entry) = core.next_access() else { break };
                if result.is_ok() {
                    result = write_line(out, &entry);
                }
            }
        }
        let result = result.and_then(|()| out.flush());
        match &result {
            Err(error) if !self.failing => {
                tracing::error!(?destination, %error, "the access log cannot be written");
            }
            Ok(()) if self.failing => tracing::info!(?destination, "the access log is written again"),
            _ => {}
        }
        self.failing = result.is_err();
    }
}

/// Writes one entry and the end of its line.
fn write_line(out: &mut impl Write, entry: &AccessEntry) -> io::Result<()> {
    serde_json::to_writer(&mut *out, entry)?;
    out.write_all(b"\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::CoreTelemetry;

    fn entry(path: &str) -> AccessEntry {
        AccessEntry {
            time_unix_ms: 1_769_860_800_123,
            request_id: Some(RequestId([0x0f; 16])),
            client: Some(IpAddr::from([127, 0, 0, 1])),
            method: "POST".into(),
            path: path.into(),
            key: Some("alice \"a\"\n".into()),
            model: Some("fast".into()),
            status: 200,
            outcome: "complete",
            ..AccessEntry::default()
        }
    }

    fn lines(path: &Path) -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(path).expect("log file");
        text.lines()
            .map(|line| serde_json::from_str(line).expect("one object a line"))
            .collect()
    }

    #[test]
    fn a_text_is_cut_between_characters() {
        assert_eq!(Text::<4>::cut("abc").as_str(), "abc");
        assert_eq!(Text::<4>::cut("abcdef").as_str(), "abcd");
        assert_eq!(Text::<4>::cut("abcé").as_str(), "abc");
        assert_eq!(Text::<1>::cut("é").as_str(), "");
    }

    #[test]
    fn a_query_is_never_logged() {
        assert_eq!(path_of("/v1/models?key=secret"), "/v1/models");
        assert_eq!(path_of("/v1/models#x?y"), "/v1/models");
        assert_eq!(path_of("*"), "*");
    }

    #[test]
    fn an_entry_is_one_line_of_json() {
        let mut line = Vec::new();
        write_line(&mut line, &entry("/v1/chat/completions")).expect("memory");
        let text = String::from_utf8(line).expect("json is utf-8");
        assert_eq!(text.matches('\n').count(), 1);
        let value: serde_json::Value = serde_json::from_str(&text).expect("json");
        assert_eq!(value["time"], "2026-01-31T12:00:00.123Z");
        assert_eq!(value["request_id"], "0f".repeat(16));
        assert_eq!(value["client"], "127.0.0.1");
        assert_eq!(value["key"], "alice \"a\"\n");
        assert_eq!(value["path"], "/v1/chat/completions");
        assert!(value.get("provider").is_none());
        assert!(value.get("error").is_none());
    }

    #[test]
    fn a_pipe_that_nobody_reads_is_refused() {
        let dir = tempfile::tempdir().expect("directory");
        let pipe = dir.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        assert!(made.expect("mkfifo").success());
        assert!(append(&pipe).is_err());
        let reader = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&pipe)
            .expect("reader");
        append(&pipe)
            .expect("opened")
            .write_all(b"line")
            .expect("written");
        drop(reader);
        assert!(append(Path::new("/dev/null")).is_ok());
    }

    #[test]
    fn entries_of_all_cores_reach_the_file_and_rotation_moves_on() {
        let dir = tempfile::tempdir().expect("directory");
        let (path, moved) = (dir.path().join("access.log"), dir.path().join("access.log.1"));
        let destination = Destination::File(path.clone());
        let cores = [CoreTelemetry::new(0), CoreTelemetry::new(1)];
        let shared = cores.iter().map(|core| core.shared().clone()).collect();
        let log = AccessLog::start(shared, &destination).expect("start");
        cores.iter().for_each(|core| core.log_access(entry("/one")));
        log.flush();
        assert_eq!(lines(&path).len(), 2);

        std::fs::rename(&path, &moved).expect("rotate");
        log.reopen(&destination).expect("reopen");
        log.flush();
        cores[0].log_access(entry("/two"));
        drop(log);
        assert_eq!(lines(&moved).len(), 2);
        assert_eq!(lines(&path).len(), 1);
        assert_eq!(lines(&path)[0]["path"], "/two");
    }

    #[test]
    fn off_means_that_cores_queue_nothing() {
        let core = CoreTelemetry::new(0);
        let log = AccessLog::start(vec![core.shared().clone()], &Destination::Off).expect("start");
        assert!(!core.access_log_on());
        core.log_access(entry("/one"));
        assert!(core.shared().next_access().is_none());
        drop(log);
    }

    #[test]
    fn a_directory_that_is_not_there_is_an_error() {
        let dir = tempfile::tempdir().expect("directory");
        let destination = Destination::File(dir.path().join("no/access.log"));
        assert!(AccessLog::start(Vec::new(), &destination).is_err());
    }

    #[test]
    fn destinations_are_read() {
        assert_eq!(Destination::parse("off"), Destination::Off);
        assert_eq!(Destination::parse("stdout"), Destination::Stdout);
        assert_eq!(Destination::parse("stderr"), Destination::Stderr);
        assert_eq!(
            Destination::parse("/var/log/a"),
            Destination::File("/var/log/a".into())
        );
    }
}
