//! Relaying an event allocates nothing, whatever pieces it comes in: neither in the framing and metering, nor in the
//! whole of a running data-plane thread.

mod support;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    fs,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicI32, AtomicU64, Ordering},
    },
};

use gateway::{
    config,
    core::{self, Listening, STOP, Shared, Threads},
    dialect::{Api, meter::Meter},
    http::chunked::{CHUNK_HEAD_BYTES_MAX, ChunkedDecoder, frame_in_place, write_chunk_head},
    ledger::Ledger,
    net::{runtime::Engine, tcp},
    serve::snapshot::{Registry, Snapshot},
};
use support::{
    Setup,
    client::{Client, chat},
    fleet,
};

/// Allocations of the thread that [`WATCHED`] names.
static WATCHED_COUNT: AtomicU64 = AtomicU64::new(0);
/// A thread's id (gettid(2)); 0 for none.
static WATCHED: AtomicI32 = AtomicI32::new(0);

thread_local! {
    static OWN_COUNT: Cell<u64> = const { Cell::new(0) };
    static OWN_ID: Cell<i32> = const { Cell::new(0) };
}

/// Counts what asks for memory: allocations and growth. Giving back is free.
struct Counting;

impl Counting {
    fn count() {
        OWN_COUNT.with(|count| count.set(count.get() + 1));
        let id = OWN_ID.with(|id| {
            if id.get() == 0 {
                // SAFETY: gettid has no arguments and cannot fail.
                id.set(unsafe { libc::gettid() });
            }
            id.get()
        });
        if id == WATCHED.load(Ordering::Relaxed) {
            WATCHED_COUNT.fetch_add(1, Ordering::Relaxed);
        }
    }
}

// SAFETY: every call goes to the system's allocator unchanged; counting touches no heap.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Counting::count();
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Counting::count();
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        Counting::count();
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(pointer, layout, bytes) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const EVENT: &str = "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\
    \"choices\":[{\"index\":0,\"delta\":{\"content\":\" token\"},\"finish_reason\":null}],\"usage\":null}\n\n";

/// What the relay does with the bytes of one read, but for the sockets. Returns how many would be sent.
fn relay(decoder: &mut ChunkedDecoder, meter: &mut Meter, buffer: &mut [u8], read: &[u8]) -> usize {
    let place = CHUNK_HEAD_BYTES_MAX;
    buffer[place..place + read.len()].copy_from_slice(read);
    let decoded = decoder
        .decode(&mut buffer[place..place + read.len()])
        .expect("chunks");
    let payload = place + decoded.payload.start..place + decoded.payload.end;
    let kept = meter.feed(&mut buffer[payload.clone()]);
    let kept = payload.start + kept.start..payload.start + kept.end;
    let mut line = [0; CHUNK_HEAD_BYTES_MAX];
    let ready = match meter.ready().len() {
        0 => 0,
        length => write_chunk_head(length, &mut line).len() + length,
    };
    ready + frame_in_place(buffer, kept).len()
}

#[test]
fn framing_and_metering_allocate_nothing_for_an_event() {
    let chunk = format!("{:x}\r\n{EVENT}\r\n", EVENT.len());
    let four = chunk.repeat(4);
    let mut buffer = vec![0; four.len() + 64];
    // Whole events, several at once, events cut by reads, and single bytes.
    for (read_bytes, events) in [
        (chunk.len(), 100_000),
        (four.len(), 20_000),
        (chunk.len() / 3 + 1, 20_000),
        (1, 2_000),
    ] {
        for hide_usage in [false, true] {
            for api in [Api::ChatCompletions, Api::Responses] {
                let mut decoder = ChunkedDecoder::new();
                let mut meter = Meter::new(api, hide_usage);
                let mut sent = 0;
                let mut run = |events: usize| {
                    for _ in 0..events / 4 {
                        for read in four.as_bytes().chunks(read_bytes) {
                            sent += relay(&mut decoder, &mut meter, &mut buffer, read);
                        }
                    }
                };
                run(400);
                let before = OWN_COUNT.get();
                run(events);
                let allocations = OWN_COUNT.get() - before;
                assert_eq!(
                    allocations, 0,
                    "reads of {read_bytes}, hide {hide_usage}, {api:?}"
                );
                assert!(sent >= events * EVENT.len());
                assert!(api == Api::Responses || meter.seen.events == events as u64 + 400);
            }
        }
    }
}

/// A data plane of one thread in this process.
struct Plane {
    shared: Arc<Shared>,
    threads: Option<Threads>,
    addr: SocketAddr,
    ledger: Ledger,
    _directory: tempfile::TempDir,
}

impl Plane {
    fn start(setup: &Setup, engine: Engine) -> Plane {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("gateway.yaml");
        let text = setup
            .config()
            .replace("{dir}", &directory.path().display().to_string());
        fs::write(&path, text).expect("a file");
        let config = config::load(&path).expect("a configuration");
        let (ledger, journals) = Ledger::start(&config.ledger, 1).expect("a ledger");
        let snapshot = Snapshot::build(&config, &mut Registry::default()).expect("a snapshot");
        let shared = Arc::new(Shared::new(snapshot, 1));
        let socket = tcp::listen(([127, 0, 0, 1], 0).into()).expect("a port");
        let addr = socket.local_addr().expect("an address");
        let listening = vec![Listening {
            socket,
            tls: None,
            trust: Default::default(),
        }];
        let cores = std::iter::once(listening).zip(journals).collect();
        let threads = core::start(&shared, engine, &[], cores).expect("a data plane");
        Plane {
            shared,
            threads: Some(threads),
            addr,
            ledger,
            _directory: directory,
        }
    }
}

impl Drop for Plane {
    fn drop(&mut self) {
        self.shared.raise(STOP);
        self.threads.take().into_iter().for_each(Threads::join);
        let _ = self.ledger.flush();
    }
}

/// The id of the data-plane thread (proc_pid_comm(5)).
fn core_thread() -> i32 {
    let tasks = fs::read_dir("/proc/self/task").expect("threads");
    tasks
        .filter_map(Result::ok)
        .find(|task| fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim() == "core-0"))
        .and_then(|task| task.file_name().to_str()?.parse().ok())
        .expect("a data-plane thread")
}

#[test]
fn a_running_stream_allocates_nothing_for_an_event() {
    const TOKENS: usize = 3_000;
    let fleet = fleet(&format!("tokens={TOKENS},pace=100us,first=1ms"));
    for engine in [Engine::Epoll, Engine::IoUring] {
        let plane = Plane::start(
            &Setup::new(fleet.url()).model("cut", "sim:split=70,gap=100us,tokens=600"),
            engine,
        );
        WATCHED.store(core_thread(), Ordering::Relaxed);
        for (model, tokens) in [("fast", TOKENS), ("cut", 600)] {
            let mut client = Client::connect(plane.addr);
            client.post("/v1/chat/completions", &chat(model, true));
            client.receive_until(b"\"t200 \"");
            let before = WATCHED_COUNT.load(Ordering::Relaxed);
            // The stream's end, which tells the usage and gives the connection back, comes later.
            client.receive_until(format!("\"t{} \"", tokens - 100).as_bytes());
            let allocations = WATCHED_COUNT.load(Ordering::Relaxed) - before;
            // On a busy machine a read may come to cut an event for the first time: the buffers that carry such events
            // then grow once. What is excluded is an allocation for each of the 2,700 or 300 events.
            assert!(
                allocations <= 32,
                "{allocations} allocations, {model} on {}",
                engine.name()
            );
        }
        // The count is not of the wrong thread: a new request does allocate.
        let before = WATCHED_COUNT.load(Ordering::Relaxed);
        let mut client = Client::connect(plane.addr);
        client.get("/healthz");
        assert_eq!(client.answer().status, 200);
        assert!(WATCHED_COUNT.load(Ordering::Relaxed) > before);
    }
}
