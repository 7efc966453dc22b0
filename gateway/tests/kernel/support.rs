//! Isolation of the kernel tests, and what they share.

use std::{
    io::{self, ErrorKind, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use crate::skip::skipped;
use gateway::{
    config::schema,
    kernel::{Kernel, Off, Plan},
};
use ipnet::IpNet;
use socket2::{Domain, SockAddr, Socket, Type};

/// Longest wait for anything that the kernel does by itself, on an emulated machine too (tests/portability/boot.sh).
pub const PATIENCE: Duration = Duration::from_secs(30);
pub const HOLD: Duration = Duration::from_secs(600);
/// Set in the child: which test it is to run.
pub const INNER: &str = "GATEWAY_KERNEL_TEST";

pub fn in_isolation(name: &str, caps: &str) {
    static REASON: OnceLock<Option<String>> = OnceLock::new();
    if let Some(reason) = REASON.get_or_init(cannot) {
        skipped("kernel", reason);
        return;
    }
    let cgroup = Cgroup::new(name).expect("a cgroup");
    // The addresses of two IPv6 networks, so that clients can differ in their /64.
    // A BPF file system of its own: what is pinned goes with the mount namespace.
    let setup = "echo $$ > \"$0\"/cgroup.procs && ip link set lo up && mount -t bpf -o mode=0700 bpf /sys/fs/bpf \
                 && ip addr add 2001:db8:0:1::1/64 dev lo && ip addr add 2001:db8:0:1::2/64 dev lo \
                 && ip addr add 2001:db8:0:2::1/64 dev lo && exec \"$@\"";
    let mut command = Command::new("unshare");
    command
        .args(["--net", "--mount", "sh", "-c", setup])
        .arg(&cgroup.0);
    if !caps.is_empty() {
        command.args(["setpriv", "--bounding-set", caps, "--inh-caps", "-all"]);
    }
    let output = command
        .arg(std::env::current_exe().expect("this test"))
        .args(["--exact", name, "--nocapture", "--include-ignored"])
        .env(INNER, name)
        .output()
        .expect("unshare");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}{errors}"
    );
    // Shown with --nocapture: what a measurement says.
    print!("{text}");
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
    match Command::new("unshare")
        .args(["--net", "--mount", "true"])
        .output()
    {
        Ok(output) if output.status.success() => {}
        Ok(output) => return Some(String::from_utf8_lossy(&output.stderr).trim().to_string()),
        Err(error) => return Some(format!("unshare: {error}")),
    }
    if let Err(error) = Cgroup::new("probe") {
        return Some(format!("no cgroup2 to write to: {error}"));
    }
    let config = schema::Kernel {
        cgroup: Some("/nonexistent".into()),
        bpffs: "/nonexistent".into(),
        ..schema::Kernel::default()
    };
    match load(&config, 1) {
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
        let directory =
            Path::new(point).join(format!("gateway-test-{pid}-{next}-{}", name.replace("::", "-")));
        std::fs::create_dir(&directory)?;
        Ok(Cgroup(directory))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// A group of listeners on one address, in the order of their cores.
pub struct Group(pub Vec<TcpListener>);

impl Group {
    pub fn new(address: &str, cores: usize) -> Group {
        let mut address: SocketAddr = address.parse().expect("an address");
        let mut sockets = Vec::new();
        for _ in 0..cores {
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).expect("a socket");
            if address.is_ipv6() {
                socket.set_only_v6(false).expect("dual stack");
            }
            socket.set_reuse_address(true).expect("SO_REUSEADDR");
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

    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.0.iter().map(AsFd::as_fd).collect()
    }

    pub fn port(&self) -> u16 {
        self.0[0].local_addr().expect("an address").port()
    }

    /// The core whose listener has the next connection, and the connection.
    pub fn accept(&self) -> (usize, TcpStream) {
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
    pub fn core_of(&self, client: &str) -> usize {
        let _stream = connect(client, self.port()).expect("a connection");
        self.accept().0
    }
}

/// Connects from the address `client` to loopback (IPv4) or to `2001:db8:0:1::1` (IPv6).
pub fn connect(client: &str, port: u16) -> io::Result<TcpStream> {
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

pub fn refused(client: &str, port: u16) -> bool {
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

pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn load(config: &schema::Kernel, cores: usize) -> Result<Kernel, Off> {
    Kernel::load(&Plan {
        config,
        cores,
        ports: &[],
        state: Path::new("/tmp/state-of-a-test"),
    })
}

/// As [`load`], with ports that are counted from the start.
pub fn load_ports(config: &schema::Kernel, ports: &[u16]) -> Result<Kernel, Off> {
    Kernel::load(&Plan {
        config,
        cores: 1,
        ports,
        state: Path::new("/tmp/state-of-a-test"),
    })
}

/// As [`load`], of a gateway that has its books there.
pub fn in_state(state: &Path) -> Result<Kernel, Off> {
    Kernel::load(&Plan {
        config: &schema::Kernel::default(),
        cores: 1,
        ports: &[],
        state,
    })
}

/// The programs before one listener.
pub fn load_on(listener: &TcpListener) -> Kernel {
    load_with(&schema::Kernel::default(), listener)
}

/// The same with another configuration.
pub fn load_with(config: &schema::Kernel, listener: &TcpListener) -> Kernel {
    let mut kernel = load(config, 1).expect("the programs");
    kernel.guard(&[listener.as_fd()]).expect("guarded");
    kernel
}

/// Another host: a network namespace at the other end of a wire, with several addresses. This end is `veth0`.
pub struct Peer(Child);

impl Peer {
    pub fn new() -> Peer {
        let child = Command::new("unshare")
            .args(["--net", "sleep", "600"])
            .spawn()
            .expect("a namespace");
        let peer = Peer(child);
        let pid = peer.0.id();
        let own = std::fs::read_link("/proc/self/ns/net").expect("a namespace");
        until("it has its own network", || {
            std::fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|theirs| theirs != own)
        });
        let script = format!(
            "set -e; ip link add veth0 type veth peer name veth1 netns {pid}; \
             ip addr add 10.77.0.1/24 dev veth0; ip addr add 2001:db8:77::1/48 dev veth0 nodad; ip link set veth0 up; \
             nsenter --net=/proc/{pid}/ns/net sh -ec ' \
             for host in 2 3 4 5 6 7; do ip addr add 10.77.0.$host/24 dev veth1; done; \
             for net in 2 3; do for host in 2 3; do ip addr add 2001:db8:77:$net::$host/48 dev veth1 nodad; done; done; \
             ip link set veth1 up'"
        );
        let done = Command::new("sh").args(["-c", &script]).status().expect("sh");
        assert!(done.success());
        peer
    }

    /// A listener of this end's, on all its addresses.
    pub fn listener(&self) -> TcpListener {
        let group = Group::new("[::]:0", 1);
        let listener = group.0.into_iter().next().expect("a listener");
        listener.set_nonblocking(false).expect("blocking");
        listener
    }

    /// Connects from one of the addresses over there. What is dropped without an answer times out after a second.
    pub fn connect(&self, client: &str, listener: &TcpListener) -> io::Result<TcpStream> {
        let client = ip(client);
        let server = match client {
            IpAddr::V4(_) => ip("10.77.0.1"),
            IpAddr::V6(_) => ip("2001:db8:77::1"),
        };
        let server = SocketAddr::new(server, listener.local_addr()?.port());
        let namespace = std::fs::File::open(format!("/proc/{}/ns/net", self.0.id()))?;
        // In a thread of its own, which enters the namespace and ends there.
        let connecting = std::thread::spawn(move || {
            // SAFETY: setns takes a descriptor of a namespace; it changes this thread alone.
            if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
                return Err(io::Error::last_os_error());
            }
            let socket = Socket::new(Domain::for_address(server), Type::STREAM, None)?;
            socket.bind(&SockAddr::from(SocketAddr::new(client, 0)))?;
            socket.connect_timeout(&server.into(), Duration::from_secs(1))?;
            Ok(TcpStream::from(socket))
        });
        connecting.join().expect("a thread")
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The programs before a group of two listeners on 127.0.0.1.
pub fn guarded() -> (Kernel, Group) {
    guarded_with(&schema::Kernel::default())
}

/// The same with another configuration.
pub fn guarded_with(config: &schema::Kernel) -> (Kernel, Group) {
    let group = Group::new("127.0.0.1:0", 2);
    let mut kernel = load(config, 2).expect("the programs");
    kernel.guard(&group.fds()).expect("guarded");
    assert_eq!(kernel.degraded(), Vec::<String>::new());
    (kernel, group)
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// A network; an address is one of its own.
pub fn net(text: &str) -> IpNet {
    text.parse().unwrap_or_else(|_| IpNet::from(ip(text)))
}

/// Sends every packet, from whichever CPU, to `core`.
pub fn place_everything(kernel: &mut Kernel, core: usize) {
    for cpu in 0..std::thread::available_parallelism().expect("CPUs").get() {
        kernel.place(core, cpu).expect("placed");
    }
}

/// Collects what tracing writes.
#[derive(Clone, Default)]
pub struct Lines(Arc<Mutex<Vec<u8>>>);

impl Lines {
    pub fn text(&self) -> String {
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
