//! What is counted of connections.

use std::{
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    os::fd::AsFd,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use socket2::SockRef;

use crate::support::{PATIENCE, Peer, connect, guarded, ip, load_on, until};

/// Connections of the test against drift: more than there are slots (`CONN_SLOTS`) …
const MANY: usize = 100_000;

/// … so that the slots of these, which stay open meanwhile, are wanted by others.
const KEPT: usize = 200;

isolated! {
    accounting_is_exact("") {
        let (kernel, group) = guarded();
        const CONNECTIONS: usize = 50;
        const REQUEST: usize = 1000;
        const ANSWER: usize = 70_000;
        for index in 0..CONNECTIONS {
            let mut client = connect("127.0.0.8", group.port()).expect("a connection");
            let (_, mut server) = group.accept();
            client.write_all(&[1; REQUEST]).expect("sent");
            server.read_exact(&mut [0; REQUEST]).expect("received");
            let writer = std::thread::spawn(move || {
                server.write_all(&[2; ANSWER]).expect("sent");
                server
            });
            client.read_exact(&mut [0; ANSWER]).expect("received");
            let server = writer.join().expect("the writer");
            // Both ways to end must count the same, though the FINs are seen in different states.
            let (first, second) = if index % 2 == 0 { (client, server) } else { (server, client) };
            drop(first);
            assert_eq!(second.peek(&mut [0]).expect("a FIN"), 0);
            drop(second);
        }
        // What comes in on other ports does not count.
        let other = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let _other = TcpStream::connect(other.local_addr().expect("an address")).expect("a connection");
        until("all connections have ended", || kernel.stats().closed == CONNECTIONS as u64);
        let stats = kernel.stats();
        assert_eq!(stats.opened, CONNECTIONS as u64);
        assert_eq!(stats.bytes_in, (CONNECTIONS * REQUEST) as u64);
        assert_eq!(stats.bytes_out, (CONNECTIONS * ANSWER) as u64);
        assert_eq!(stats.untracked, 0);
        let clients = kernel.clients(10);
        assert_eq!(clients.len(), 1);
        let client = clients[0];
        assert_eq!((client.client, client.opened, client.closed), (ip("127.0.0.8"), stats.opened, stats.closed));
        assert_eq!((client.bytes_in, client.bytes_out), (stats.bytes_in, stats.bytes_out));
        assert!(client.srtt > Duration::ZERO && client.srtt < PATIENCE, "{:?}", client.srtt);
    }

    open_connections_and_aborted_ones_are_counted("") {
        let (kernel, group) = guarded();
        let aborted = connect("127.0.0.9", group.port()).expect("a connection");
        let kept = connect("127.0.0.8", group.port()).expect("a connection");
        let servers = [group.accept(), group.accept()];
        assert_eq!((kernel.stats().opened, kernel.stats().closed), (2, 0));
        socket2::SockRef::from(&aborted).set_linger(Some(Duration::ZERO)).expect("a reset at close");
        drop(aborted);
        until("the reset connection is closed", || kernel.stats().closed == 1);
        let clients = kernel.clients(1);
        assert_eq!((clients[0].client, clients[0].opened, clients[0].closed), (ip("127.0.0.8"), 1, 0));
        assert_eq!(kernel.clients(10).len(), 2);
        drop((kept, servers));
    }

    open_connections_tell_what_they_have_carried("") {
        let (kernel, group) = guarded();
        let mut client = connect("127.0.0.8", group.port()).expect("a connection");
        let (_, mut server) = group.accept();
        let mut sent = 0;
        until("the open connection's bytes are counted", || {
            server.write_all(b"a token").expect("sent");
            let mut token = [0; 7];
            client.read_exact(&mut token).expect("received");
            client.write_all(b"ack").expect("sent");
            sent += 7;
            let counted = kernel.clients(1)[0];
            counted.bytes_out > 0 && counted.bytes_in > 0
        });
        let told = kernel.clients(1)[0];
        assert!(told.bytes_out <= sent && told.open() == 1, "{told:?}");
        drop(client);
        drop(server);
        until("it has ended", || kernel.stats().closed == 1);
        assert_eq!(kernel.stats().bytes_out, sent, "nothing is counted twice");
        assert_eq!(kernel.clients(1)[0].bytes_out, sent);
    }

    ports_are_counted_apart_and_lives_in_buckets("") {
        let (mut kernel, first) = guarded();
        let second = crate::support::Group::new("127.0.0.1:0", 2);
        kernel.guard(&second.fds()).expect("guarded");
        first.core_of("127.0.0.8");
        let kept = connect("127.0.0.8", second.port()).expect("a connection");
        let server = second.accept();
        kernel.block(crate::support::net("127.0.0.7"), crate::support::HOLD).expect("blocked");
        assert!(crate::support::refused("127.0.0.7", second.port()));
        until("the first has ended", || kernel.stats().closed == 1);
        let ports = kernel.ports();
        let of = |port: u16| *ports.iter().find(|stats| stats.port == port).expect("counted");
        let (one, two) = (of(first.port()), of(second.port()));
        assert_eq!((one.opened, one.open(), one.refused), (1, 0, 0));
        assert_eq!((two.opened, two.open(), two.refused), (1, 1, 1));
        assert_eq!(one.life.iter().sum::<u64>(), 1);
        assert!(one.life[..15].contains(&1), "shorter than half a minute: {:?}", one.life);
        std::thread::sleep(Duration::from_millis(70));
        drop((kept, server));
        until("the second has ended", || kernel.stats().closed == 2);
        // It lasted 70 ms at least: 64 ms have seven bits.
        assert_eq!(kernel.stats().life[7..].iter().sum::<u64>(), 1, "{:?}", kernel.stats().life);
        assert!(kernel.stats().life_ms >= 70);
        assert_eq!(kernel.clients(1)[0].life.iter().sum::<u32>(), 2);
    }

    nothing_drifts_over_many_connections_with_resets("") {
        let (kernel, group) = guarded();
        let port = group.port();
        let kept: Vec<_> = (1..=KEPT)
            .map(|number| (connect(&format!("127.0.9.{number}"), port).expect("a connection"), group.accept()))
            .collect();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for listener in &group.0 {
                let (listener, done) = (listener.try_clone().expect("a listener"), &done);
                scope.spawn(move || accept_and_end(&listener, done));
            }
            let clients: Vec<_> = (0..4).map(|part| scope.spawn(move || {
                for number in 0..MANY / 4 {
                    let client = format!("127.0.{}.{}", 1 + part, 1 + number % 250);
                    let stream = match connect(&client, port) {
                        Ok(stream) => stream,
                        // The server's reset may be there before this side has seen that it is connected; after its FIN it
                        // is a broken pipe (`tcp_reset`, net/ipv4/tcp_input.c).
                        Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => continue,
                        Err(error) => panic!("{client}: {error}"),
                    };
                    // A third ends by the client's reset, a third by its FIN, a third by the server's end, whichever that is.
                    match number % 3 {
                        0 => drop(SockRef::from(&stream).set_linger(Some(Duration::ZERO))),
                        1 => {}
                        _ => drop((&stream).read(&mut [0; 16])),
                    }
                }
            })).collect();
            let ended: Vec<_> = clients.into_iter().map(|client| client.join()).collect();
            // On a busy machine the last handshakes end after their clients: who is accepted by nobody never ends.
            let start = Instant::now();
            while kernel.stats().closed < MANY as u64 && start.elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_millis(2));
            }
            done.store(true, Ordering::Relaxed);
            assert!(ended.iter().all(Result::is_ok));
        });
        until("all others have ended", || kernel.stats().closed == MANY as u64);
        let clients = kernel.clients(2000);
        assert_eq!(clients.iter().filter(|client| client.open() == 1).count(), KEPT);
        drop(kept);
        const ALL: u64 = (MANY + KEPT) as u64;
        until("all have ended", || kernel.stats().closed == ALL);
        let stats = kernel.stats();
        assert_eq!((stats.opened, stats.closed, stats.untracked), (ALL, ALL, 0));
        let clients = kernel.clients(2000);
        assert_eq!(clients.len(), 1000 + KEPT);
        assert!(clients.iter().all(|client| client.open() == 0));
        assert_eq!(clients.iter().map(|client| client.opened).sum::<u64>(), ALL);
        let counted = kernel.ports()[0];
        assert_eq!((counted.opened, counted.closed), (ALL, ALL));
        assert_eq!(stats.life.iter().sum::<u64>(), ALL);
    }

    connections_that_time_out_are_closed("") {
        let peer = Peer::new();
        let listener = peer.listener();
        let kernel = load_on(&listener);
        let clients: Vec<TcpStream> = (2..8)
            .map(|host| peer.connect(&format!("10.77.0.{host}"), &listener).expect("a connection"))
            .collect();
        let servers: Vec<TcpStream> = clients.iter().map(|_| listener.accept().expect("accepted").0).collect();
        assert_eq!((kernel.stats().opened, kernel.stats().closed), (6, 0));
        // The wire is cut: what is sent now is never acknowledged.
        let cut = Command::new("ip").args(["link", "set", "veth0", "down"]).status().expect("ip");
        assert!(cut.success());
        for mut server in &servers {
            SockRef::from(server).set_tcp_user_timeout(Some(Duration::from_millis(300))).expect("a timeout");
            server.write_all(b"into the void").expect("sent");
        }
        until("all have timed out", || kernel.stats().closed == 6);
        assert!(kernel.clients(10).iter().all(|client| client.open() == 0));
        drop((clients, servers));
        assert_eq!(kernel.stats().closed, 6);
        assert_eq!(kernel.stats().bytes_out, 0);
    }

    clients_beyond_the_bound_go_and_the_totals_stay("") {
        let (mut kernel, group) = guarded();
        let kept = connect("127.0.0.8", group.port()).expect("a connection");
        let server = group.accept();
        // The entry of an open connection is evicted, and made anew by another connection of the client.
        kernel.forget(ip("127.0.0.8")).expect("forgotten");
        let again = connect("127.0.0.8", group.port()).expect("a connection");
        let other = group.accept();
        assert_eq!((kernel.stats().opened, kernel.clients(1)[0].open()), (2, 1));
        drop((kept, server));
        until("the first has ended", || kernel.stats().closed == 1);
        let client = kernel.clients(1)[0];
        assert_eq!((client.opened, client.closed), (1, 0), "the earlier entry's does not count down this one's");
        drop((again, other));
        until("both have ended", || kernel.stats().closed == 2);
        assert_eq!(kernel.clients(1)[0].closed, 1);
    }
}

/// Takes connections and ends them at once, in turn by FIN and by reset.
fn accept_and_end(listener: &TcpListener, done: &AtomicBool) {
    let mut number = 0;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                number += 1;
                if number % 2 == 0 {
                    let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
                }
            }
            Err(_) if done.load(Ordering::Relaxed) => return,
            Err(_) => {
                let mut ready = [libc::pollfd {
                    fd: std::os::fd::AsRawFd::as_raw_fd(&listener.as_fd()),
                    events: libc::POLLIN,
                    revents: 0,
                }];
                // SAFETY: one pollfd that lives for the call.
                unsafe { libc::poll(ready.as_mut_ptr(), 1, 50) };
            }
        }
    }
}
