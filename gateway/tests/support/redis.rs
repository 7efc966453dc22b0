//! A real Redis or Valkey for a test.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use super::{eventually, skipped};

/// A server of the test's own; dropping it kills it and removes its data.
pub struct Redis {
    child: Child,
    pub port: u16,
    binary: &'static str,
    arguments: Vec<String>,
    directory: tempfile::TempDir,
}

/// The servers that this machine has. None: says so, and the test ends.
pub fn servers() -> Vec<&'static str> {
    let there = |name: &&str| {
        let version = Command::new(name)
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        version.is_ok_and(|status| status.success())
    };
    let found: Vec<_> = ["redis-server", "valkey-server"]
        .into_iter()
        .filter(there)
        .collect();
    if found.is_empty() {
        skipped("redis", "neither redis-server nor valkey-server is installed");
    }
    found
}

impl Redis {
    /// Starts a server without persistence on a free port, with further arguments.
    pub fn start(binary: &'static str, arguments: &[&str]) -> Redis {
        Redis::start_with(binary, || arguments.iter().map(ToString::to_string).collect())
    }

    /// As [`Redis::start`], with arguments that name further free ports.
    pub fn start_with(binary: &'static str, arguments: impl Fn() -> Vec<String>) -> Redis {
        Redis::start_if_it_can(binary, arguments).expect("a server on a free port")
    }

    /// As [`Redis::start_with`]; `None`: the server ends with these arguments.
    pub fn start_if_it_can(binary: &'static str, arguments: impl Fn() -> Vec<String>) -> Option<Redis> {
        // Another process may take a free port before the server does.
        (0..10).find_map(|_| Redis::try_start(binary, arguments(), free_port()))
    }

    fn try_start(binary: &'static str, arguments: Vec<String>, port: u16) -> Option<Redis> {
        let directory = tempfile::tempdir().expect("a directory");
        let mut redis = Redis {
            child: spawn(binary, port, &arguments, directory.path()),
            port,
            binary,
            arguments,
            directory,
        };
        redis.is_ready().then_some(redis)
    }

    /// Waits until it answers; false: it has ended.
    fn is_ready(&mut self) -> bool {
        eventually("the server answers", || {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return Some(false);
            }
            // Also one that asks for a password is ready.
            let answer = self.ask("PING")?;
            (!answer.contains("LOADING")).then_some(true)
        })
    }

    /// Where it is.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    pub fn address(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.port).into()
    }

    /// The first bytes of the answer to an inline command.
    pub fn ask(&self, command: &str) -> Option<String> {
        let mut stream = TcpStream::connect_timeout(&self.address(), Duration::from_secs(1)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
        stream.write_all(format!("{command}\r\n").as_bytes()).ok()?;
        let mut answer = [0; 4096];
        let length = loop {
            match stream.read(&mut answer) {
                // As in `Client`: the process was stopped for a moment.
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                read => break read.ok()?,
            }
        };
        Some(String::from_utf8_lossy(&answer[..length]).into_owned())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        // SAFETY: kill takes plain numbers; the child has not been waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }

    /// SIGKILL; what it held in memory is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Starts it again on the same port and directory.
    pub fn restart(&mut self) {
        self.kill();
        self.child = spawn(self.binary, self.port, &self.arguments, self.directory.path());
        assert!(self.is_ready(), "the server does not start again");
    }

    /// Three masters of one cluster.
    pub fn cluster(binary: &'static str) -> Vec<Redis> {
        let arguments = ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000"];
        let nodes: Vec<Redis> = (0..3).map(|_| Redis::start(binary, &arguments)).collect();
        let cli = binary.replace("-server", "-cli");
        let mut create = Command::new(cli);
        create.args(["--cluster", "create", "--cluster-yes"]);
        create.args(nodes.iter().map(|node| node.address().to_string()));
        let made = create
            .stdin(Stdio::null())
            .output()
            .expect("the command line client");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stdout));
        for node in &nodes {
            eventually("a cluster", || {
                node.ask("CLUSTER INFO")
                    .filter(|info| info.contains("cluster_state:ok"))
            });
        }
        nodes
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A port that is free now, and whose cluster bus port (10,000 higher) exists.
pub fn free_port() -> u16 {
    loop {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        if port < 50_000 && TcpListener::bind(("127.0.0.1", port + 10_000)).is_ok() {
            return port;
        }
    }
}

fn spawn(binary: &str, port: u16, arguments: &[String], directory: &Path) -> Child {
    let mut command = Command::new(binary);
    command.args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir"]);
    command
        .arg(directory)
        .args(["--port", &port.to_string()])
        .args(arguments);
    gateway::net::process::end_with_parent(&mut command);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.spawn().expect("the server's binary")
}
