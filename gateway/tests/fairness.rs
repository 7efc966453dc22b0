//! One client, however greedy or slow, takes nothing from the others: neither the core, nor its memory, nor an upstream
//! for longer than its request may last.

mod support;

use std::{
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use gateway::ledger::record::Outcome;
use support::{
    Setup,
    client::{Client, chat_request},
    fleet,
    scripted::{STREAM_HEAD, Scripted, Then, chunk, token},
};

#[test]
fn a_client_that_does_not_wait_for_answers_does_not_keep_others_waiting() {
    for driver in ["auto", "epoll"] {
        let gateway = Setup::new("http://127.0.0.1:1").workers(1, driver).start();
        let mut flood = TcpStream::connect(gateway.addr()).expect("a connection");
        let mut answers = flood.try_clone().expect("a descriptor");
        let over = Arc::new(AtomicBool::new(false));
        let reader = thread::spawn(move || {
            let mut buffer = vec![0; 1 << 20];
            while answers.read(&mut buffer).is_ok_and(|n| n > 0) {}
        });
        let writer = thread::spawn({
            let over = over.clone();
            move || {
                let requests = "GET /healthz HTTP/1.1\r\nhost: test\r\n\r\n".repeat(2000);
                while !over.load(Ordering::Acquire) {
                    flood.write_all(requests.as_bytes()).expect("the gateway reads");
                }
                let _ = flood.shutdown(std::net::Shutdown::Both);
            }
        });
        thread::sleep(Duration::from_millis(300));
        let mut worst = Duration::ZERO;
        for _ in 0..5 {
            let began = Instant::now();
            let mut client = Client::connect(gateway.addr());
            client.get("/healthz");
            assert_eq!(client.answer().status, 200);
            worst = worst.max(began.elapsed());
        }
        over.store(true, Ordering::Release);
        writer.join().expect("the writer");
        reader.join().expect("the reader");
        assert!(worst < Duration::from_secs(1), "{driver}: {worst:?}");
    }
}

#[test]
fn requests_sent_ahead_are_taken_in_within_bounds() {
    let fleet = fleet("tokens=2,pace=0,first=120ms");
    let gateway = Setup::new(fleet.url()).workers(1, "auto").start();
    let mut socket = TcpStream::connect(gateway.addr()).expect("a connection");
    socket
        .set_write_timeout(Some(Duration::from_millis(150)))
        .expect("a timeout");
    socket
        .set_read_timeout(Some(Duration::from_millis(20)))
        .expect("a timeout");
    let requests = chat_request("fast", true).repeat(500);
    let (mut at, mut sent, mut settled) = (0, 0, None);
    let began = Instant::now();
    let mut buffer = vec![0; 1 << 16];
    // Until nothing more was taken for a while the kernel's buffers fill; from then on what goes is what the gateway
    // takes in.
    while began.elapsed() < Duration::from_secs(8) {
        match socket.write(&requests[at..]) {
            Ok(n) => {
                sent += n;
                at = (at + n) % requests.len();
            }
            Err(error) => assert!(matches!(
                error.kind(),
                ErrorKind::WouldBlock | ErrorKind::TimedOut
            )),
        }
        let _ = socket.read(&mut buffer);
        if began.elapsed() > Duration::from_secs(3) {
            settled.get_or_insert(sent);
        }
    }
    let more = sent - settled.expect("a while");
    assert!(more < 1 << 20, "{more} bytes for some dozens of requests");
}

#[test]
fn a_client_that_does_not_read_holds_its_upstream_only_for_the_requests_time() {
    let endless = Scripted::start(|socket, _| {
        let _ = socket.write_all(STREAM_HEAD.as_bytes());
        let piece = chunk(&token(&"x".repeat(8000)));
        while socket.write_all(piece.as_bytes()).is_ok() {}
        Then::Close
    });
    let long = Scripted::start(|socket, _| {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: audio/wav\r\ncontent-length: 1000000000\r\n\r\n";
        let _ = socket.write_all(head.as_bytes());
        while socket.write_all(&[b'x'; 8192]).is_ok() {}
        Then::Close
    });
    for upstream in [endless, long] {
        let gateway = Setup::new(upstream.url())
            .timeouts("{ connect: 1s, first_token: 2s, idle: 2s, total: 2s }")
            .start();
        let began = Instant::now();
        let mut client = Client::connect(gateway.addr());
        client.send(chat_request("fast", true));
        let records = gateway.await_records(1);
        assert_eq!(records[0].outcome, Outcome::TimedOut);
        assert!(began.elapsed() < Duration::from_secs(10));
    }
}

#[test]
fn an_upstream_that_is_always_ready_does_not_outlast_the_requests_time() {
    let endless = Scripted::start(|socket, _| {
        let _ = socket.write_all(STREAM_HEAD.as_bytes());
        let piece = chunk(&token(&"x".repeat(4000))).repeat(100);
        while socket.write_all(piece.as_bytes()).is_ok() {}
        Then::Close
    });
    for driver in ["auto", "epoll"] {
        let gateway = Setup::new(endless.url())
            .workers(1, driver)
            .timeouts("{ connect: 1s, first_token: 2s, idle: 2s, total: 2s }")
            .start();
        let began = Instant::now();
        let mut socket = TcpStream::connect(gateway.addr()).expect("a connection");
        socket.write_all(&chat_request("fast", true)).expect("a request");
        let reader = thread::spawn(move || {
            let mut buffer = vec![0; 1 << 20];
            while socket.read(&mut buffer).is_ok_and(|n| n > 0) {}
        });
        let records = gateway.await_records(1);
        assert_eq!(records[0].outcome, Outcome::TimedOut, "{driver}");
        assert!(began.elapsed() < Duration::from_secs(10), "{driver}");
        reader.join().expect("the reader");
    }
}
