//! The real programs in the real kernel: early drop, steering, accounting.
//!
//! Each test runs in a child process of its own, in a fresh network namespace and a fresh cgroup, so that tests neither
//! meet each other nor the host. It needs root, BPF, cgroup2 and `unshare`, `ip`, `setpriv`; without them it prints
//! `skipped: <reason>` and passes, unless `GATEWAY_KERNEL_TESTS=required` is set.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use gateway::{
    config::schema,
    kernel::{BlockError, Kernel, Off, Plan},
};
use gateway_common::{LOAD_SLACK, overloaded};
use socket2::{Domain, SockAddr, Socket, Type};

/// Longest wait for anything that the kernel does by itself.
const PATIENCE: Duration = Duration::from_secs(10);
const HOLD: Duration = Duration::from_secs(600);
/// Set in the child: which test it is to run.
const INNER: &str = "GATEWAY_KERNEL_TEST";

// ---- isolation ----

/// Declares tests that run isolated, with a bounding set of capabilities (of `setpriv`; empty: all that there are).
macro_rules! isolated {
    ($($name:ident($caps:literal) $body:block)*) => {$(
        #[test]
        fn $name() {
            if std::env::var(INNER).as_deref() == Ok(stringify!($name)) {
                $body
            } else {
                in_isolation(stringify!($name), $caps);
            }
        }
    )*};
}

fn in_isolation(name: &str, caps: &str) {
    if let Some(reason) = cannot() {
        assert_ne!(
            std::env::var("GATEWAY_KERNEL_TESTS").as_deref(),
            Ok("required"),
            "{reason}"
        );
        println!("skipped: {reason}");
        return;
    }
    let cgroup = Cgroup::new(name).expect("a cgroup");
    // The addresses of two IPv6 networks, so that clients can differ in their /64.
    let setup = "echo $$ > \"$0\"/cgroup.procs && ip link set lo up \
                 && ip addr add 2001:db8:0:1::1/64 dev lo && ip addr add 2001:db8:0:1::2/64 dev lo \
                 && ip addr add 2001:db8:0:2::1/64 dev lo && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--net", "sh", "-c", setup]).arg(&cgroup.0);
    if !caps.is_empty() {
        command.args(["setpriv", "--bounding-set", caps, "--inh-caps", "-all"]);
    }
    let output = command
        .arg(std::env::current_exe().expect("this test"))
        .args(["--exact", name, "--nocapture"])
        .env(INNER, name)
        .output()
        .expect("unshare");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}{errors}"
    );
}

/// What is missing to run at all. A program that the verifier rejects is not: the tests must fail then.
fn cannot() -> Option<String> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    if !status.lines().any(|line| line.starts_with("Uid:\t0\t")) {
        return Some("not root".into());
    }
    for tool in ["ip", "setpriv"] {
        if let Err(error) = Command::new(tool).arg("-V").output() {
            return Some(format!("{tool}: {error}"));
        }
    }
    match Command::new("unshare").args(["--net", "true"]).output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => return Some(String::from_utf8_lossy(&output.stderr).trim().to_string()),
        Err(error) => return Some(format!("unshare: {error}")),
    }
    if let Err(error) = Cgroup::new("probe") {
        return Some(format!("no cgroup2 to write to: {error}"));
    }
    let config = schema::Kernel {
        cgroup: Some("/nonexistent".into()),
        ..schema::Kernel::default()
    };
    match Kernel::load(&Plan {
        config: &config,
        cores: 1,
        ports: &[],
    }) {
        Err(off) if off.reason.contains("missing") || off.reason.contains("not permitted") => {
            Some(off.reason)
        }
        _ => None,
    }
}

/// A cgroup2 directory, removed again.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(name: &str) -> io::Result<Cgroup> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        let mount = mounts
            .lines()
            .find(|line| line.contains(" - cgroup2 "))
            .ok_or(ErrorKind::NotFound)?;
        let point = mount.split(' ').nth(4).ok_or(ErrorKind::InvalidData)?;
        let (pid, next) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let directory = Path::new(point).join(format!("gateway-test-{pid}-{next}-{name}"));
        std::fs::create_dir(&directory)?;
        Ok(Cgroup(directory))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

// ---- helpers ----

/// A group of listeners on one address, in the order of their cores.
struct Group(Vec<TcpListener>);

impl Group {
    fn new(address: &str, cores: usize) -> Group {
        let mut address: SocketAddr = address.parse().expect("an address");
        let mut sockets = Vec::new();
        for _ in 0..cores {
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).expect("a socket");
            if address.is_ipv6() {
                socket.set_only_v6(false).expect("dual stack");
            }
            socket.set_reuse_port(true).expect("SO_REUSEPORT");
            socket.bind(&address.into()).expect("bind");
            socket.listen(1024).expect("listen");
            socket.set_nonblocking(true).expect("non-blocking");
            let listener = TcpListener::from(socket);
            address.set_port(listener.local_addr().expect("an address").port());
            sockets.push(listener);
        }
        Group(sockets)
    }

    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.0.iter().map(AsFd::as_fd).collect()
    }

    fn port(&self) -> u16 {
        self.0[0].local_addr().expect("an address").port()
    }

    /// The core whose listener has the next connection, and the connection.
    fn accept(&self) -> (usize, TcpStream) {
        let start = Instant::now();
        loop {
            for (core, listener) in self.0.iter().enumerate() {
                match listener.accept() {
                    Ok((stream, _)) => {
                        stream.set_nonblocking(false).expect("blocking");
                        return (core, stream);
                    }
                    Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}"),
                }
            }
            assert!(start.elapsed() < PATIENCE, "no connection came");
            std::thread::yield_now();
        }
    }

    /// Connects from `client`; the core that got it.
    fn core_of(&self, client: &str) -> usize {
        let _stream = connect(client, self.port()).expect("a connection");
        self.accept().0
    }
}

/// Connects from the address `client` to loopback (IPv4) or to `2001:db8:0:1::1` (IPv6).
fn connect(client: &str, port: u16) -> io::Result<TcpStream> {
    let client: IpAddr = client.parse().expect("an address");
    let server: IpAddr = match client {
        IpAddr::V4(_) => [127, 0, 0, 1].into(),
        IpAddr::V6(_) => "2001:db8:0:1::1".parse::<Ipv6Addr>().expect("an address").into(),
    };
    let server = SocketAddr::new(server, port);
    let socket = Socket::new(Domain::for_address(server), Type::STREAM, None)?;
    socket.bind(&SockAddr::from(SocketAddr::new(client, 0)))?;
    socket.connect_timeout(&server.into(), PATIENCE)?;
    Ok(socket.into())
}

fn refused(client: &str, port: u16) -> bool {
    match connect(client, port) {
        Ok(_) => false,
        Err(error) => {
            let kind = error.kind();
            assert!(
                matches!(kind, ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset),
                "{error}"
            );
            true
        }
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn load(config: &schema::Kernel, cores: usize) -> Result<Kernel, Off> {
    Kernel::load(&Plan {
        config,
        cores,
        ports: &[],
    })
}

/// The programs before a group of two listeners on 127.0.0.1.
fn guarded() -> (Kernel, Group) {
    let group = Group::new("127.0.0.1:0", 2);
    let mut kernel = load(&schema::Kernel::default(), 2).expect("the programs");
    kernel.guard(&group.fds()).expect("guarded");
    assert_eq!(kernel.degraded(), Vec::<String>::new());
    (kernel, group)
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// Sends every packet, from whichever CPU, to `core`.
fn place_everything(kernel: &mut Kernel, core: usize) {
    for cpu in 0..std::thread::available_parallelism().expect("CPUs").get() {
        kernel.place(core, cpu).expect("placed");
    }
}

// ---- tests ----

isolated! {
    a_blocked_client_is_refused_and_others_are_served("") {
        let (kernel, group) = guarded();
        kernel.block(ip("127.0.0.7"), HOLD).expect("blocked");
        for _ in 0..3 {
            assert!(refused("127.0.0.7", group.port()));
        }
        group.core_of("127.0.0.8");
        let stats = kernel.stats();
        assert_eq!((stats.dropped, stats.would_drop, stats.steered, stats.fallback), (3, 0, 1, 0));
        assert_eq!((stats.stray, stats.unreadable), (0, 0));
        let blocked = kernel.blocked();
        assert_eq!(blocked.len(), 1);
        assert_eq!((blocked[0].client, blocked[0].dropped), (ip("127.0.0.7"), 3));
        assert!(blocked[0].remaining <= HOLD && blocked[0].remaining > HOLD - PATIENCE);
    }

    an_open_connection_outlives_the_block("") {
        let (kernel, group) = guarded();
        let mut client = connect("127.0.0.7", group.port()).expect("a connection");
        let (_, mut server) = group.accept();
        kernel.block(ip("127.0.0.7"), HOLD).expect("blocked");
        client.write_all(b"hello").expect("sent");
        let mut text = [0; 5];
        server.read_exact(&mut text).expect("received");
        assert_eq!(&text, b"hello");
        assert!(refused("127.0.0.7", group.port()));
    }

    a_block_ends_by_itself("") {
        let (kernel, group) = guarded();
        let hold = Duration::from_millis(300);
        let start = Instant::now();
        kernel.block(ip("127.0.0.7"), hold).expect("blocked");
        until("the block ends", || !refused("127.0.0.7", group.port()));
        assert!(start.elapsed() >= hold, "ended after {:?}", start.elapsed());
        assert!(kernel.blocked().is_empty());
        assert!(kernel.stats().dropped > 0);
        assert!(!kernel.unblock(ip("127.0.0.7")).expect("asked"), "over is not blocked");
    }

    a_block_ends_by_hand("") {
        let (kernel, group) = guarded();
        kernel.block(ip("127.0.0.7"), HOLD).expect("blocked");
        assert!(refused("127.0.0.7", group.port()));
        assert!(kernel.unblock(ip("127.0.0.7")).expect("unblocked"));
        group.core_of("127.0.0.7");
        assert!(!kernel.unblock(ip("127.0.0.7")).expect("asked"));
    }

    blocking_again_changes_the_end_and_keeps_the_count("") {
        let (kernel, group) = guarded();
        kernel.block(ip("127.0.0.7"), HOLD).expect("blocked");
        assert!(refused("127.0.0.7", group.port()));
        kernel.block(ip("127.0.0.7"), HOLD * 2).expect("blocked");
        assert!(refused("127.0.0.7", group.port()));
        let blocked = kernel.blocked();
        assert_eq!(blocked[0].dropped, 2);
        assert!(blocked[0].remaining > HOLD);
    }

    observing_counts_and_lets_in("") {
        let (kernel, group) = guarded();
        kernel.block(ip("127.0.0.7"), HOLD).expect("blocked");
        kernel.set_observe(true);
        group.core_of("127.0.0.7");
        assert_eq!((kernel.stats().dropped, kernel.stats().would_drop), (0, 1));
        assert_eq!(kernel.blocked()[0].would_drop, 1);
        kernel.set_observe(false);
        assert!(refused("127.0.0.7", group.port()));
        assert_eq!((kernel.stats().dropped, kernel.stats().would_drop), (1, 1));
    }

    the_mode_of_the_configuration_may_be_observe("") {
        let group = Group::new("127.0.0.1:0", 1);
        let config = schema::Kernel { mode: schema::KernelMode::Observe, ..schema::Kernel::default() };
        let mut kernel = load(&config, 1).expect("the programs");
        kernel.guard(&group.fds()).expect("guarded");
        kernel.block(ip("127.0.0.7"), HOLD).expect("blocked");
        group.core_of("127.0.0.7");
        assert_eq!(kernel.stats().would_drop, 1);
    }

    ipv6_clients_are_blocked_by_their_64_and_ipv4_ones_on_a_dual_stack_listener("") {
        let group = Group::new("[::]:0", 2);
        let mut kernel = load(&schema::Kernel::default(), 2).expect("the programs");
        kernel.guard(&group.fds()).expect("guarded");
        kernel.block(ip("2001:db8:0:1::2"), HOLD).expect("blocked");
        assert!(refused("2001:db8:0:1::2", group.port()));
        assert!(refused("2001:db8:0:1::1", group.port()), "shares the /64");
        group.core_of("2001:db8:0:2::1");
        assert_eq!(kernel.blocked()[0].client, ip("2001:db8:0:1::"));
        kernel.block(ip("127.0.0.7"), HOLD).expect("blocked");
        assert!(refused("127.0.0.7", group.port()));
        group.core_of("127.0.0.8");
        assert_eq!((kernel.stats().dropped, kernel.stats().steered), (3, 2));
        assert_eq!(kernel.stats().unreadable, 0);
        until("both are counted", || kernel.stats().closed == 2);
        let clients: Vec<IpAddr> = kernel.clients(10).iter().map(|client| client.client).collect();
        assert!(clients.contains(&ip("2001:db8:0:2::")) && clients.contains(&ip("127.0.0.8")), "{clients:?}");
    }

    the_host_itself_and_exempt_networks_are_not_blocked("") {
        let group = Group::new("127.0.0.1:0", 1);
        let mut config = schema::Kernel::default();
        config.drop.exempt = vec!["127.0.1.0/24".parse().expect("a network")];
        let mut kernel = load(&config, 1).expect("the programs");
        kernel.guard(&group.fds()).expect("guarded");
        for client in ["127.0.0.1", "127.0.1.9"] {
            assert!(!kernel.may_block(ip(client)));
            let error = kernel.block(ip(client), HOLD).expect_err("exempt");
            assert!(matches!(error, BlockError::Exempt(_)), "{error}");
            group.core_of(client);
        }
        kernel.block(ip("127.0.0.7"), HOLD).expect("blocked");
        kernel.set_exempt(&["127.0.0.0/24".parse().expect("a network")]);
        group.core_of("127.0.0.7");
        assert!(kernel.blocked().is_empty());
    }

    every_packet_of_a_cpu_goes_to_its_core("") {
        let (mut kernel, group) = guarded();
        for core in [0, 1, 0] {
            place_everything(&mut kernel, core);
            kernel.publish_load(0, 0);
            kernel.publish_load(1, 0);
            for _ in 0..20 {
                assert_eq!(group.core_of("127.0.0.8"), core);
            }
        }
        let stats = kernel.stats();
        assert_eq!((stats.steered, stats.steered_away, stats.fallback), (60, 0, 0));
    }

    an_overloaded_core_gives_away_just_enough("") {
        let (mut kernel, group) = guarded();
        place_everything(&mut kernel, 0);
        let own = LOAD_SLACK + 68;
        kernel.publish_load(0, own as u32);
        kernel.publish_load(1, 0);
        let moved = (0..).find(|least| !overloaded(own, *least)).expect("an end");
        assert!(moved > 20);
        for _ in 0..moved {
            assert_eq!(group.core_of("127.0.0.8"), 1);
        }
        assert_eq!(group.core_of("127.0.0.8"), 0, "what was steered counts at once");
        assert_eq!(kernel.stats().steered_away, moved);
        kernel.publish_load(1, own as u32);
        assert_eq!(group.core_of("127.0.0.8"), 0);
    }

    two_groups_are_told_apart("") {
        let (mut kernel, first) = guarded();
        let second = Group::new("127.0.0.1:0", 2);
        kernel.guard(&second.fds()).expect("guarded");
        place_everything(&mut kernel, 1);
        assert_eq!(first.core_of("127.0.0.8"), 1);
        assert_eq!(second.core_of("127.0.0.8"), 1);
        assert_eq!((kernel.stats().steered, kernel.stats().fallback), (2, 0));
        kernel.block(ip("127.0.0.7"), HOLD).expect("blocked");
        assert!(refused("127.0.0.7", first.port()) && refused("127.0.0.7", second.port()));
    }

    a_core_without_listener_is_replaced_by_the_hash("") {
        let (mut kernel, mut group) = guarded();
        place_everything(&mut kernel, 1);
        drop(group.0.remove(1));
        assert_eq!(group.core_of("127.0.0.8"), 0);
        assert_eq!((kernel.stats().steered, kernel.stats().fallback), (0, 1));
        kernel.guard(&group.fds()).expect("guarded again");
        place_everything(&mut kernel, 0);
        assert_eq!(group.core_of("127.0.0.8"), 0);
        assert_eq!((kernel.stats().steered, kernel.stats().fallback), (1, 1));
    }

    guarding_again_releasing_and_steering_off("") {
        let (mut kernel, group) = guarded();
        // More often than there are slots: each time the group keeps its own.
        for _ in 0..20 {
            kernel.guard(&group.fds()).expect("guarded again");
        }
        kernel.set_steering(false);
        group.core_of("127.0.0.8");
        assert_eq!((kernel.stats().steered, kernel.stats().fallback), (0, 1));
        kernel.block(ip("127.0.0.7"), HOLD).expect("blocked");
        kernel.release(&group.fds()).expect("released");
        group.core_of("127.0.0.7");
        assert_eq!(kernel.stats().fallback, 1, "the program is off");
        for _ in 0..20 {
            let other = Group::new("127.0.0.1:0", 2);
            kernel.guard(&other.fds()).expect("guarded");
            kernel.release(&other.fds()).expect("released");
        }
    }

    sockets_without_a_group_are_refused_with_a_reason("") {
        let mut kernel = load(&schema::Kernel::default(), 1).expect("the programs");
        let plain = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let off = kernel.guard(&[plain.as_fd()]).expect_err("no SO_REUSEPORT");
        assert!(off.reason.contains("listeners"), "{off}");
        assert!(kernel.guard(&[]).is_err());
    }

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

    two_gateways_share_a_cgroup("") {
        let (first, first_group) = guarded();
        let (second, second_group) = guarded();
        first_group.core_of("127.0.0.8");
        second_group.core_of("127.0.0.8");
        second_group.core_of("127.0.0.8");
        until("all have ended", || first.stats().closed == 1 && second.stats().closed == 2);
        drop(first);
        second_group.core_of("127.0.0.8");
        until("the other goes on", || second.stats().closed == 3);
    }

    nothing_is_dropped_after_the_end("") {
        let (kernel, group) = guarded();
        kernel.block(ip("127.0.0.7"), HOLD).expect("blocked");
        assert!(refused("127.0.0.7", group.port()));
        drop(kernel);
        group.core_of("127.0.0.7");
    }

    a_drop_is_logged_once_for_many("") {
        let lines = Lines::default();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(lines.clone()).finish();
        tracing::subscriber::with_default(subscriber, || {
            let (kernel, group) = guarded();
            kernel.block(ip("127.0.0.7"), HOLD).expect("blocked");
            for _ in 0..50 {
                assert!(refused("127.0.0.7", group.port()));
            }
            until("a line", || {
                kernel.tick();
                !lines.text().is_empty()
            });
            let text = lines.text();
            assert!(text.contains("refused connections of blocked client 127.0.0.7: 1 "), "{text}");
            assert!(text.contains("gateway::kernel"), "{text}");
            // Sampled by powers of two: 1, 2, 4, 8, 16, 32 at most.
            assert!(text.lines().count() <= 6, "{text}");
        });
    }

    the_two_capabilities_of_the_unit_suffice("-all,+bpf,+net_admin") {
        let (kernel, group) = guarded();
        kernel.block(ip("127.0.0.7"), HOLD).expect("blocked");
        assert!(refused("127.0.0.7", group.port()));
        group.core_of("127.0.0.8");
        until("it is counted", || kernel.stats().closed == 1);
    }

    without_net_admin_only_accounting_is_off("-all,+bpf") {
        let group = Group::new("127.0.0.1:0", 2);
        let mut kernel = load(&schema::Kernel::default(), 2).expect("the programs");
        kernel.guard(&group.fds()).expect("guarded");
        let degraded = kernel.degraded();
        assert_eq!(degraded.len(), 1);
        assert!(degraded[0].starts_with("connection accounting is off: CAP_NET_ADMIN is missing"), "{degraded:?}");
        kernel.block(ip("127.0.0.7"), HOLD).expect("blocked");
        assert!(refused("127.0.0.7", group.port()));
        group.core_of("127.0.0.8");
        assert_eq!(kernel.stats().opened, 0);
    }

    without_rights_the_reason_says_so("-all") {
        let off = load(&schema::Kernel::default(), 1).expect_err("no rights");
        assert!(off.reason.starts_with("CAP_BPF is missing"), "{off}");
    }

    a_cgroup_that_is_none_degrades_with_a_reason("") {
        for directory in ["/nonexistent", "/tmp"] {
            let config = schema::Kernel { cgroup: Some(directory.into()), ..schema::Kernel::default() };
            let kernel = load(&config, 1).expect("the programs");
            let degraded = kernel.degraded();
            assert_eq!(degraded.len(), 1);
            assert!(degraded[0].contains(directory), "{degraded:?}");
        }
    }
}

#[test]
fn switched_off_is_off_whatever_the_rights() {
    let config = schema::Kernel {
        mode: schema::KernelMode::Off,
        ..schema::Kernel::default()
    };
    let off = load(&config, 1).expect_err("off");
    assert_eq!(off.reason, "switched off by kernel.mode");
}

/// Collects what tracing writes.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Lines {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().expect("no panic").clone()).expect("text")
    }
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("no panic").write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl tracing_subscriber::fmt::MakeWriter<'_> for Lines {
    type Writer = Lines;
    fn make_writer(&self) -> Lines {
        self.clone()
    }
}
