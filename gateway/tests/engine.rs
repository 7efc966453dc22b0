//! The data plane's engine under stress, on both drivers: random cuts, slow readers, resets, buffer exhaustion, waits that
//! are dropped. No byte may be lost, repeated or sent to somebody else; what was written is sent whatever becomes of the
//! socket. perf/asan.sh runs this file under AddressSanitizer.

use std::{
    cell::Cell,
    env,
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    rc::Rc,
    sync::{OnceLock, mpsc},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use gateway::net::{
    Conn, Either, race,
    runtime::{self, Engine, Streaming, set_gather, sleep, spawn, yield_now},
    tcp::{self, Listener, Sock, stop_listening},
};

const PATIENCE: Duration = Duration::from_secs(30);

/// The longest that a peer may take nothing.
const STALL: Duration = Duration::from_secs(20);

fn engines() -> Vec<Engine> {
    let mut engines = vec![Engine::Epoll];
    match runtime::choose(gateway::config::schema::Driver::IoUring) {
        Ok(engine) => engines.push(engine),
        Err(error) => eprintln!("skipped on io_uring: {error}"),
    }
    engines
}

/// Changes all cuts and contents. Without it they are the same in every run.
const SEED: &str = "GATEWAY_TEST_SEED";

/// Where the random numbers of this run begin, told once: a failure's output has it.
fn base() -> u64 {
    static BASE: OnceLock<u64> = OnceLock::new();
    *BASE.get_or_init(|| {
        let base = match env::var(SEED) {
            Ok(seed) => seed.parse().expect("GATEWAY_TEST_SEED is a number"),
            Err(_) => 0,
        };
        // To standard error itself: the harness keeps what `eprintln!` says from whichever test comes first.
        let _ = writeln!(io::stderr(), "{SEED}={base}");
        base
    })
}

/// SplitMix64: cuts and contents that are the same in every run with one [`SEED`].
#[derive(Clone)]
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        // Far apart, so that neighbouring seeds of two runs have no number in common.
        Self(seed.wrapping_add(base().wrapping_mul(0xd134_2543_de82_ef95)))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, most: usize) -> usize {
        (self.next() % most as u64) as usize
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(count + 8);
        while bytes.len() < count {
            bytes.extend_from_slice(&self.next().to_le_bytes());
        }
        bytes.truncate(count);
        bytes
    }
}

/// A thread with an engine that serves each connection with `serve`, until it is dropped.
struct Server {
    addr: SocketAddr,
    fd: i32,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start<F, S>(engine: Engine, serve: S) -> Server
    where
        S: Fn(Rc<Sock>, u64) -> F + Send + 'static,
        F: Future<Output = ()> + 'static,
    {
        let socket = tcp::listen(([127, 0, 0, 1], 0).into()).expect("a port");
        let addr = socket.local_addr().expect("an address");
        let (told, fd) = mpsc::channel();
        let thread = thread::spawn(move || {
            runtime::run(engine, async move {
                let listener = Listener::new(socket).expect("a listener");
                told.send(listener.fd()).expect("the test waits");
                let running = Rc::new(Cell::new(0));
                let mut number = 0;
                while let Ok((sock, _)) = listener.accept().await {
                    number += 1;
                    running.set(running.get() + 1);
                    let (served, running) = (serve(sock, number), running.clone());
                    spawn(async move {
                        served.await;
                        running.set(running.get() - 1);
                    });
                }
                let deadline = Instant::now() + PATIENCE;
                while running.get() > 0 && Instant::now() < deadline {
                    sleep(Duration::from_millis(5)).await;
                }
                assert_eq!(running.get(), 0, "every connection ends");
            })
            .expect("an engine");
        });
        Server {
            addr,
            fd: fd.recv().expect("a listener"),
            thread: Some(thread),
        }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.addr).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
        stream
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        stop_listening(self.fd);
        let ended = self.thread.take().expect("a thread").join();
        if !thread::panicking() {
            ended.expect("the engine's thread does not panic");
        }
    }
}

/// Sends back what comes, in cuts of its own; drops waits in their middle; reads slowly now and then.
async fn echo(sock: Rc<Sock>, seed: u64) {
    let mut random = Random::new(seed);
    let mut conn = Conn::plain(sock);
    let mut buffer = vec![0; 40_000];
    loop {
        let room = 1 + random.below(buffer.len());
        match conn.try_read(&mut buffer[..room]) {
            Ok(Some(0)) => return conn.shutdown(),
            Err(_) => return,
            Ok(None) => {
                // Dropped and begun again: no wait may lose anything.
                if let Either::Second(()) = race(conn.readable(), sleep(Duration::from_millis(1))).await {
                    yield_now().await;
                }
            }
            Ok(Some(n)) => {
                if random.below(50) == 0 {
                    sleep(Duration::from_millis(random.below(8) as u64)).await;
                }
                let cut = random.below(n + 1);
                let (one, two) = buffer[..n].split_at(cut);
                if conn.write_slices(&[one, two], STALL).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// What a client of [`echo`] does.
#[derive(Clone, Copy)]
enum Manner {
    Steady,
    /// Reads with pauses, so that the engine must hold its peer back.
    Slow,
    /// Resets the connection in the middle.
    Resets,
}

fn converse(stream: TcpStream, seed: u64, bytes: usize, manner: Manner) {
    let mut random = Random::new(seed);
    let sent = random.bytes(bytes);
    let mut writer = stream.try_clone().expect("a descriptor");
    let (to_send, mut cuts) = (sent.clone(), random.clone());
    let sender = thread::spawn(move || {
        let mut rest = &to_send[..];
        while !rest.is_empty() {
            let most = if cuts.below(4) == 0 { 60_000 } else { 400 };
            let n = (1 + cuts.below(most)).min(rest.len());
            if writer.write_all(&rest[..n]).is_err() {
                return;
            }
            rest = &rest[n..];
        }
        let _ = writer.shutdown(Shutdown::Write);
    });
    let mut reader = &stream;
    let mut got = 0;
    let mut buffer = vec![0; 50_000];
    loop {
        let room = 1 + random.below(buffer.len());
        let n = reader
            .read(&mut buffer[..room])
            .unwrap_or_else(|error| panic!("{got} bytes of {bytes}: {error}"));
        assert_eq!(&buffer[..n], &sent[got..got + n], "after {got} bytes");
        got += n;
        match manner {
            _ if n == 0 => break,
            Manner::Slow if random.below(8) == 0 => thread::sleep(Duration::from_millis(2)),
            Manner::Resets if got > bytes / 3 => {
                let socket = socket2::SockRef::from(&stream);
                socket.set_linger(Some(Duration::ZERO)).expect("an option");
                // Both descriptors must be gone for the reset; the sender's then fails.
                stream.shutdown(Shutdown::Both).ok();
                drop(sender);
                return;
            }
            _ => {}
        }
    }
    assert_eq!(got, bytes);
    sender.join().expect("the sender");
}

#[test]
fn nothing_is_lost_by_cuts_slow_readers_and_resets() {
    for engine in engines() {
        let server = Server::start(engine, echo);
        let clients: Vec<_> = (0..24)
            .map(|seed| {
                let stream = server.connect();
                let manner = [Manner::Steady, Manner::Slow, Manner::Resets][seed % 3];
                thread::spawn(move || converse(stream, 1_000 + seed as u64, 400_000, manner))
            })
            .collect();
        for client in clients {
            client.join().expect("what was sent comes back");
        }
    }
}

#[test]
fn more_may_come_than_there_are_buffers() {
    // Far more than the provided buffers hold, at a server that does not read for a while.
    const BYTES: usize = 1 << 20;
    for engine in engines() {
        let server = Server::start(engine, |sock, seed| async move {
            sleep(Duration::from_millis(50)).await;
            echo(sock, seed).await;
        });
        let clients: Vec<_> = (0..24)
            .map(|seed| {
                let stream = server.connect();
                thread::spawn(move || converse(stream, seed, BYTES, Manner::Steady))
            })
            .collect();
        for client in clients {
            client.join().expect("what was sent comes back");
        }
    }
}

#[test]
fn what_was_written_is_sent_though_the_socket_is_dropped() {
    for engine in engines() {
        let server = Server::start(engine, |sock, number| async move {
            let bytes = Random::new(number).bytes(3_000);
            // In pieces, so that some wait behind others.
            for piece in bytes.chunks(700) {
                assert!(matches!(sock.try_write(piece), Ok(Some(n)) if n == piece.len()));
                if number % 2 == 0 {
                    yield_now().await;
                }
            }
            if number % 3 == 0 {
                sock.shutdown_write();
            }
        });
        for number in 1..=60 {
            let mut got = Vec::new();
            let mut stream = server.connect();
            stream.read_to_end(&mut got).expect("all of it, and an end");
            assert_eq!(got, Random::new(number).bytes(3_000), "connection {number}");
        }
    }
}

#[test]
fn what_was_written_is_sent_though_the_engine_ends() {
    for engine in engines() {
        let socket = tcp::listen(([127, 0, 0, 1], 0).into()).expect("a port");
        let addr = socket.local_addr().expect("an address");
        let thread = thread::spawn(move || {
            runtime::run(engine, async move {
                let listener = Listener::new(socket).expect("a listener");
                let (sock, _) = listener.accept().await.expect("a connection");
                assert!(matches!(sock.try_write(b"the last words"), Ok(Some(14))));
            })
        });
        let mut stream = TcpStream::connect(addr).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut got = Vec::new();
        stream.read_to_end(&mut got).expect("all of it");
        assert_eq!(got, b"the last words");
        thread.join().expect("no panic").expect("an engine");
    }
}

#[test]
fn a_reset_is_seen_as_one() {
    for engine in engines() {
        let server = Server::start(engine, |sock, _| async move {
            let _ = sock.try_write(b"cut");
            sock.reset_on_close();
        });
        for _ in 0..20 {
            let mut stream = server.connect();
            // What was written before may be seen or not.
            let error = stream.read_to_end(&mut Vec::new()).expect_err("no proper end");
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
    }
}

#[test]
fn a_socket_can_be_dropped_while_bytes_arrive() {
    for engine in engines() {
        let server = Server::start(engine, |sock, number| async move {
            if number % 2 == 0 {
                sock.readable().await;
            }
        });
        for round in 0..40 {
            let mut stream = server.connect();
            let bytes = vec![7; 200_000];
            // Takes what it takes; then the peer is gone.
            let _ = stream.write_all(&bytes[..1_000 * (round + 1)]);
            let _ = stream.read_to_end(&mut Vec::new());
        }
        // The engine is sound afterwards.
        let mut stream = server.connect();
        stream.write_all(b"x").expect("room");
        let _ = stream.read_to_end(&mut Vec::new());
    }
}

/// Passes bytes between a client and an origin, as the gateway does.
async fn relay(client: Rc<Sock>, origin: SocketAddr) {
    let _streaming = Streaming::begin();
    let Ok(upstream) = Sock::connect(origin, PATIENCE).await else {
        return;
    };
    let (mut near, mut far) = (Conn::plain(client), Conn::plain(upstream));
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let (near_sock, far_sock) = (near.sock().clone(), far.sock().clone());
        let which = race(near_sock.readable(), far_sock.readable()).await;
        let (from, to) = match which {
            Either::First(()) => (&mut near, &mut far),
            Either::Second(()) => (&mut far, &mut near),
        };
        match from.try_read(&mut buffer) {
            Ok(Some(0)) | Err(_) => return,
            Ok(Some(n)) => {
                if to.write_all(&buffer[..n], STALL).await.is_err() {
                    return;
                }
            }
            Ok(None) => {}
        }
    }
}

#[test]
fn gathering_delays_but_loses_nothing() {
    for engine in engines() {
        let origin = Server::start(engine, echo);
        let to = origin.addr;
        let server = Server::start(engine, move |sock, _| async move {
            set_gather(Duration::from_millis(2));
            relay(sock, to).await;
        });
        let clients: Vec<_> = (0..16)
            .map(|seed| {
                let mut stream = server.connect();
                thread::spawn(move || {
                    let mut random = Random::new(seed);
                    for _ in 0..100 {
                        let sent = random.bytes(220);
                        stream.write_all(&sent).expect("room");
                        let mut got = vec![0; sent.len()];
                        stream.read_exact(&mut got).expect("what was sent");
                        assert_eq!(got, sent);
                    }
                })
            })
            .collect();
        for client in clients {
            client.join().expect("what was sent comes back");
        }
    }
}

#[test]
fn a_peer_that_is_not_there_is_told_at_once() {
    let gone = tcp::listen(([127, 0, 0, 1], 0).into()).expect("a port");
    let addr = gone.local_addr().expect("an address");
    drop(gone);
    for engine in engines() {
        let failed = runtime::run(engine, Sock::connect(addr, PATIENCE)).expect("an engine");
        assert_eq!(
            failed.err().map(|error| error.kind()),
            Some(ErrorKind::ConnectionRefused)
        );
    }
}

#[test]
fn timers_fire_in_order_and_never_early() {
    for engine in engines() {
        runtime::run(engine, async {
            let fired = Rc::new(std::cell::RefCell::new(Vec::new()));
            let began = Instant::now();
            for ms in [30_u64, 5, 20, 10, 1] {
                let fired = fired.clone();
                spawn(async move {
                    sleep(Duration::from_millis(ms)).await;
                    assert!(began.elapsed() >= Duration::from_millis(ms));
                    fired.borrow_mut().push(ms);
                });
            }
            // A wait that is dropped takes its timer with it.
            let Either::Second(()) =
                race(sleep(Duration::from_secs(3600)), sleep(Duration::from_millis(60))).await
            else {
                panic!("the hour was shorter");
            };
            while fired.borrow().len() < 5 {
                sleep(Duration::from_millis(5)).await;
            }
            assert_eq!(*fired.borrow(), [1, 5, 10, 20, 30]);
        })
        .expect("an engine");
    }
}
