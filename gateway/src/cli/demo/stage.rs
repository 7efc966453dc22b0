//! The demo's processes and files.

use std::{
    env, fs,
    io::{BufRead, BufReader},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};

use super::client;
use crate::{config, net::process};

/// How long a process may take to be ready.
const READY_TIME: Duration = Duration::from_secs(20);

/// How long a process may take to end before it is killed.
const END_TIME: Duration = Duration::from_secs(10);

/// The running demo. Dropping it ends the processes and removes the files.
pub struct Stage {
    /// The gateway's own program.
    pub program: PathBuf,
    /// Its configuration.
    pub config: PathBuf,
    /// Where clients reach it.
    pub gateway: SocketAddr,
    /// Where its admin API is.
    pub admin: SocketAddr,
    /// The fleet.
    pub fleet: String,
    /// A key with room enough.
    pub key: String,
    /// A key that may do two requests a minute.
    pub small_key: String,
    /// The state directory.
    pub state: PathBuf,
    files: tempfile::TempDir,
    children: Vec<Child>,
}

impl Stage {
    /// Starts the fleet and the gateway and waits until both answer.
    pub fn set(port: u16) -> anyhow::Result<Stage> {
        let program = env::current_exe().context("cannot find this program's own file")?;
        let bench = program.with_file_name("gateway-bench");
        if !bench.exists() {
            bail!(
                "{} is missing: it is the simulated fleet (build it with `cargo build --release -p gateway-bench`)",
                bench.display()
            );
        }
        // Only this user can read it.
        let files = tempfile::Builder::new().prefix("gateway-demo-").tempdir()?;
        let directory = files.path();
        let mut stage = Stage {
            config: directory.join("gateway.yaml"),
            state: directory.join("state"),
            gateway: (Ipv4Addr::LOCALHOST, free_port(port)?).into(),
            admin: (Ipv4Addr::LOCALHOST, free_port(0)?).into(),
            fleet: String::new(),
            key: config::generate_key()?,
            small_key: config::generate_key()?,
            program,
            files,
            children: Vec::new(),
        };
        stage.start_fleet(&bench)?;
        stage.start_gateway()?;
        Ok(stage)
    }

    fn start_fleet(&mut self, bench: &Path) -> anyhow::Result<()> {
        let mut command = Command::new(bench);
        command.args([
            "upstream",
            "--listen",
            "127.0.0.1:0",
            "--behaviour",
            "pace=20ms,first=50ms",
        ]);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        process::end_with_parent(&mut command);
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start {}", bench.display()))?;
        let output = child.stdout.take();
        self.children.push(child);
        let mut line = String::new();
        BufReader::new(output.context("the fleet has no output")?).read_line(&mut line)?;
        let url = line.split_whitespace().find(|word| word.starts_with("http://"));
        self.fleet = url.context("the fleet did not start")?.to_string();
        Ok(())
    }

    fn start_gateway(&mut self) -> anyhow::Result<()> {
        fs::write(
            self.files.path().join("upstream.key"),
            "demo-upstream-credential\n",
        )?;
        fs::write(&self.config, self.configuration())?;
        let log = fs::File::create(self.files.path().join("gateway.log"))?;
        let mut command = Command::new(&self.program);
        command.arg("run").arg("-c").arg(&self.config);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        process::end_with_parent(&mut command);
        self.children
            .push(command.spawn().context("cannot start the gateway")?);
        let started = Instant::now();
        while !self.is_ready() {
            let ended = self.children[1].try_wait()?.is_some();
            if ended || started.elapsed() > READY_TIME {
                self.show_log();
                bail!("the gateway did not start");
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn is_ready(&self) -> bool {
        let ask = || {
            client::request(
                Ipv4Addr::LOCALHOST,
                self.gateway,
                "",
                "GET",
                "/readyz",
                "",
                |_| {},
            )
        };
        // The sockets listen before anybody accepts: wait for what a client would see.
        TcpStream::connect(self.admin).is_ok() && ask().is_ok_and(|answer| answer.status == 200)
    }

    /// What the gateway is told: as an operator would write it.
    fn configuration(&self) -> String {
        let hash = |key: &str| config::sha256_hex(&config::key_hash(key));
        format!(
            r#"# The demo's configuration: one fleet, one model, two keys.
listeners:
  - address: {gateway}
admin: {{ address: {admin} }}
providers:
  fleet: {{ kind: openai, key: "${{file:upstream.key}}", endpoints: ["{fleet}"] }}
models:
  - name: fast
    targets:
      - {{ provider: fleet, model: "sim" }}
keys:
  - {{ name: alice, sha256: {alice} }}
  - {{ name: small, sha256: {small} }}
limits:
  - {{ match: {{ key: alice }}, tokens: 100000, every: 1m }}
  - {{ match: {{ key: small }}, requests: 2, every: 1m }}
kernel: {{ mode: auto, drop: {{ after_refusals: 10, within: 10s, for: 30s }} }}
ledger: {{ path: {state} }}
"#,
            gateway = self.gateway,
            admin = self.admin,
            fleet = self.fleet,
            alice = hash(&self.key),
            small = hash(&self.small_key),
            state = self.state.display(),
        )
    }

    /// Shows what the gateway said, for a demo that went wrong.
    pub fn show_log(&self) {
        let log = fs::read_to_string(self.files.path().join("gateway.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        for line in &lines[lines.len().saturating_sub(20)..] {
            eprintln!("  gateway: {line}");
        }
    }

    /// Waits for Ctrl-C, or for the gateway's unexpected end.
    pub fn wait(&mut self) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            loop {
                tokio::select! {
                    pressed = tokio::signal::ctrl_c() => return Ok(pressed?),
                    () = tokio::time::sleep(Duration::from_secs(1)) => {}
                }
                if self.children[1].try_wait()?.is_some() {
                    self.show_log();
                    bail!("the gateway has ended");
                }
            }
        })
    }

    /// Ends the processes, the gateway first, and removes the files.
    pub fn strike(&mut self) {
        while let Some(mut child) = self.children.pop() {
            process::terminate(child.id());
            let asked = Instant::now();
            while matches!(child.try_wait(), Ok(None)) {
                if asked.elapsed() > END_TIME {
                    let _ = child.kill();
                    let _ = child.wait();
                    break;
                }
                thread::sleep(Duration::from_millis(20));
            }
        }
        let _ = fs::remove_dir_all(self.files.path());
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.strike();
    }
}

/// `wanted` if nobody has it, else one that is free now.
fn free_port(wanted: u16) -> anyhow::Result<u16> {
    let bind = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port));
    let listener = bind(wanted)
        .or_else(|_| bind(0))
        .context("no free port on 127.0.0.1")?;
    Ok(listener.local_addr()?.port())
}
