//! What the behaviour tests have in common: the built binary as a process of its own, a simulated fleet, and a client
//! that sends and receives exactly the bytes that a test wants.
#![allow(dead_code)] // each test file uses a part of it

pub mod client;
pub mod redis;
pub mod scripted;
pub mod skip;

use std::{
    fs,
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use gateway_bench::upstream::{Behaviour, Options, Server};

#[allow(unused_imports)] // as above
pub use skip::skipped;

/// How long a test waits for something that must happen. Generous: the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The key that [`Setup::config`] lets in.
pub const KEY: &str = "sk-test-alice";

/// The data plane's driver in tests that do not name one: `GATEWAY_TEST_DRIVER`, to run every suite on epoll too.
pub fn driver() -> String {
    std::env::var("GATEWAY_TEST_DRIVER").unwrap_or_else(|_| "auto".into())
}

/// The built binary.
pub const BINARY: &str = env!("CARGO_BIN_EXE_gateway");

/// A gateway under test. Dropping it kills the process and removes its directory.
pub struct Gateway {
    child: Child,
    /// Where its listeners are, in the order of the configuration.
    pub listeners: Vec<SocketAddr>,
    /// Where its admin API is.
    pub admin: SocketAddr,
    directory: tempfile::TempDir,
    log: Arc<Mutex<Vec<String>>>,
}

impl Gateway {
    /// Starts with the text of a configuration; `{dir}` in it stands for a directory of the test's own. Add the listeners'
    /// and the admin's port as 0.
    pub fn start(config: &str) -> Gateway {
        Gateway::start_in(tempfile::tempdir().expect("a directory"), config)
    }

    /// As [`Gateway::start`], in a directory that may hold an earlier run's state.
    pub fn start_in(directory: tempfile::TempDir, config: &str) -> Gateway {
        Gateway::try_start_in(directory, config)
            .unwrap_or_else(|log| panic!("the gateway did not start:\n{log}"))
    }

    /// As [`Gateway::start_in`]; an error is what the process said before it ended.
    pub fn try_start_in(directory: tempfile::TempDir, config: &str) -> Result<Gateway, String> {
        Gateway::try_start_by(Command::new(BINARY), directory, config)
    }

    /// As [`Gateway::try_start_in`], by a command that ends in the binary: with an environment or below another program.
    pub fn try_start_by(
        mut command: Command,
        directory: tempfile::TempDir,
        config: &str,
    ) -> Result<Gateway, String> {
        let path = write_config(directory.path(), config);
        command
            .arg("run")
            .arg("-c")
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().expect("the gateway's binary");
        let log = Arc::new(Mutex::new(Vec::new()));
        let (ready, started) = mpsc::channel();
        collect(child.stdout.take().expect("a pipe"), log.clone(), None);
        collect(child.stderr.take().expect("a pipe"), log.clone(), Some(ready));
        let mut gateway = Gateway {
            child,
            listeners: Vec::new(),
            admin: ([127, 0, 0, 1], 0).into(),
            directory,
            log,
        };
        loop {
            match started.recv_timeout(PATIENCE) {
                Ok(line) if line.contains("\"listening\"") => gateway.listeners.push(field(&line, "address")),
                Ok(line) if line.contains("\"ready\"") => {
                    gateway.admin = field(&line, "admin");
                    return Ok(gateway);
                }
                Ok(_) => {}
                Err(_) => {
                    let _ = gateway.child.kill();
                    let _ = gateway.child.wait();
                    return Err(gateway.log());
                }
            }
        }
    }

    /// The first listener's address.
    pub fn addr(&self) -> SocketAddr {
        self.listeners[0]
    }

    /// The configuration file.
    pub fn config_path(&self) -> PathBuf {
        self.directory.path().join("gateway.yaml")
    }

    /// The test's directory; the state is in `state` where [`Setup`] made the configuration.
    pub fn dir(&self) -> &Path {
        self.directory.path()
    }

    /// The state directory of a configuration by [`Setup`].
    pub fn state(&self) -> PathBuf {
        self.dir().join("state")
    }

    /// The process' id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All that it has written so far.
    pub fn log(&self) -> String {
        self.log.lock().expect("no panic while locked").join("\n")
    }

    /// Waits until it has written `text` to its log, and returns the line.
    pub fn await_log(&self, text: &str) -> String {
        eventually(&format!("{text:?} in the log:\n{}", self.log()), || {
            self.log()
                .lines()
                .find(|line| line.contains(text))
                .map(str::to_string)
        })
    }

    /// Puts another configuration into its file and asks it to reload; returns what the log says of it.
    pub fn reload(&self, config: &str) -> String {
        const OUTCOMES: [&str; 2] = ["configuration reloaded", "the old one stays"];
        let outcomes = || -> Vec<String> {
            let is_outcome = |line: &&str| OUTCOMES.iter().any(|outcome| line.contains(outcome));
            self.log()
                .lines()
                .filter(is_outcome)
                .map(str::to_string)
                .collect()
        };
        let before = outcomes().len();
        write_config(self.dir(), config);
        self.signal(libc::SIGHUP);
        eventually("a reload", || outcomes().get(before).cloned())
    }

    /// Asks the admin API with its token, as `GET /status`; the body, if any, is sent as JSON.
    pub fn admin(&self, request: &str, body: &str) -> client::Answer {
        let token = fs::read_to_string(self.state().join("admin.token")).expect("a generated token");
        let mut client = client::Client::connect(self.admin);
        let (token, length) = (token.trim(), body.len());
        client.send(format!(
            "{request} HTTP/1.1\r\nhost: admin\r\nauthorization: Bearer {token}\r\n\
             content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        ));
        client.answer()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        // SAFETY: kill takes plain numbers; the child has not been waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }

    /// Waits for the process to end by itself.
    pub fn wait(&mut self) -> ExitStatus {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status;
            }
            assert!(
                began.elapsed() < PATIENCE,
                "the gateway does not end:\n{}",
                self.log()
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Kills it (SIGKILL) and gives its directory back, to start again in it.
    pub fn kill(mut self) -> tempfile::TempDir {
        let _ = self.child.kill();
        let _ = self.child.wait();
        std::mem::replace(&mut self.directory, tempfile::tempdir().expect("a directory"))
    }

    /// Runs another command of the binary with this gateway's configuration; returns its standard output.
    pub fn command(&self, arguments: &[&str]) -> std::process::Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gateway"));
        command
            .args(arguments)
            .arg("-c")
            .arg(self.config_path())
            .stdin(Stdio::null());
        command.output().expect("the gateway's binary")
    }

    /// All records in its ledger now.
    pub fn records(&self) -> Vec<gateway::ledger::record::Record> {
        gateway::ledger::read::records(&self.state()).collect()
    }

    /// Waits until the ledger has `count` records, and returns them.
    pub fn await_records(&self, count: usize) -> Vec<gateway::ledger::record::Record> {
        eventually(&format!("{count} records"), || {
            let records = self.records();
            (records.len() >= count).then_some(records)
        })
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("--- the gateway's log:\n{}", self.log());
        }
    }
}

/// Writes a configuration into a directory, for which `{dir}` in it stands.
pub fn write_config(directory: &Path, config: &str) -> PathBuf {
    let path = directory.join("gateway.yaml");
    fs::write(&path, config.replace("{dir}", &directory.display().to_string())).expect("a file");
    path
}

/// Waits until `check` gives something.
pub fn eventually<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(value) = check() {
            return value;
        }
        assert!(began.elapsed() < PATIENCE, "did not happen: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn collect(
    pipe: impl std::io::Read + Send + 'static,
    log: Arc<Mutex<Vec<String>>>,
    ready: Option<mpsc::Sender<String>>,
) {
    thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            if let Some(ready) = &ready {
                let _ = ready.send(line.clone());
            }
            log.lock().expect("no panic while locked").push(line);
        }
    });
}

/// An address in a line of the JSON log.
fn field(line: &str, name: &str) -> SocketAddr {
    let value: serde_json::Value = serde_json::from_str(line).expect("a JSON log line");
    let text = value["fields"][name]
        .as_str()
        .or(value[name].as_str())
        .unwrap_or_else(|| panic!("{name} in {line}"));
    text.parse().expect("an address")
}

/// A simulated fleet of one endpoint.
pub fn fleet(behaviour: &str) -> Server {
    let mut words = Behaviour::default();
    words.apply(behaviour).expect("words of the simulator");
    let listen = ([127, 0, 0, 1], 0).into();
    Server::start(Options {
        listen,
        behaviour: words,
        ..Options::default()
    })
    .expect("a port")
}

/// Builds the usual configuration: one listener, one provider `sim`, key [`KEY`] named `alice`.
pub struct Setup {
    /// Base URL of the provider; several with commas between them.
    pub upstream: String,
    /// Virtual models: name, and the upstream's model.
    pub models: Vec<(String, String)>,
    pub limits: String,
    /// Further lines of `providers`, `models` and `keys`.
    pub providers: String,
    pub further_models: String,
    pub keys: String,
    /// Further lines at the top level.
    pub more: String,
    pub timeouts: String,
}

impl Setup {
    /// A configuration in front of `upstream` (a base URL), with a model `fast` that is `sim` there.
    pub fn new(upstream: impl Into<String>) -> Setup {
        Setup {
            upstream: upstream.into(),
            models: vec![("fast".into(), "sim".into())],
            limits: String::new(),
            providers: String::new(),
            further_models: String::new(),
            keys: String::new(),
            more: format!(
                "kernel: {{ mode: \"off\" }}\nworkers: {{ threads: 2, driver: {} }}\n",
                driver()
            ),
            timeouts: "{ connect: 2s, first_token: 20s, idle: 20s, total: 5m }".into(),
        }
    }

    /// Adds a virtual model.
    pub fn model(mut self, name: &str, upstream: &str) -> Setup {
        self.models.push((name.into(), upstream.into()));
        self
    }

    /// Sets the limits, as YAML list items.
    pub fn limits(mut self, limits: &str) -> Setup {
        self.limits = limits.into();
        self
    }

    /// Sets the timeouts of all models, as a YAML map.
    pub fn timeouts(mut self, timeouts: &str) -> Setup {
        self.timeouts = timeouts.into();
        self
    }

    /// Sets the data plane's threads and engine; `auto` is the suite's own.
    pub fn workers(mut self, threads: usize, driver: &str) -> Setup {
        let own = self::driver();
        let driver = if driver == "auto" { &own } else { driver };
        self.more =
            format!("kernel: {{ mode: \"off\" }}\nworkers: {{ threads: {threads}, driver: {driver} }}\n");
        self
    }

    /// Adds lines at the top level.
    pub fn more(mut self, lines: &str) -> Setup {
        self.more.push_str(lines);
        self
    }

    /// Adds a key, with the rest of its YAML map (`, team: x`).
    pub fn key(mut self, name: &str, secret: &str, rest: &str) -> Setup {
        let hash = gateway::config::sha256_hex(&gateway::config::key_hash(secret));
        self.keys
            .push_str(&format!("  - {{ name: {name}, sha256: {hash}{rest} }}\n"));
        self
    }

    /// Adds a provider `other` at `upstream`, and a model `pair`: `sim` first, `other` when that fails.
    pub fn fallback(mut self, upstream: impl std::fmt::Display) -> Setup {
        self.providers =
            format!("  other: {{ kind: openai, key: other-secret, endpoints: [\"{upstream}\"] }}\n");
        self.further_models = format!(
            "  - {{ name: pair, targets: [{{ provider: sim, model: sim }}, \
             {{ provider: other, model: sim, priority: 1 }}], timeouts: {} }}\n",
            self.timeouts
        );
        self
    }

    /// The text of the configuration.
    pub fn config(&self) -> String {
        let hash = |key: &str| gateway::config::sha256_hex(&gateway::config::key_hash(key));
        let models: String = self.models.iter().map(|(name, upstream)| {
            format!(
                "  - {{ name: \"{name}\", targets: [{{ provider: sim, model: \"{upstream}\" }}], timeouts: {} }}\n",
                self.timeouts
            )
        }).collect();
        let limits = if self.limits.is_empty() {
            String::new()
        } else {
            format!("limits:\n{}\n", self.limits)
        };
        format!(
            "listeners:\n  - address: 127.0.0.1:0\nadmin: {{ address: \"127.0.0.1:0\" }}\n\
             providers:\n  sim: {{ kind: openai, key: upstream-secret, endpoints: [{}] }}\n{}\
             models:\n{models}{}keys:\n  - {{ name: alice, sha256: {} }}\n{}{limits}\
             ledger: {{ path: \"{{dir}}/state\" }}\nlog: {{ format: json }}\n{}",
            self.upstream
                .split(',')
                .map(|url| format!("\"{url}\""))
                .collect::<Vec<_>>()
                .join(", "),
            self.providers,
            self.further_models,
            hash(KEY),
            self.keys,
            self.more,
        )
    }

    /// Starts a gateway with it.
    pub fn start(&self) -> Gateway {
        Gateway::start(&self.config())
    }
}
