//! A test stand: the simulated upstream as a process of its own, and the folder, cores and certificate of one run.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::load::{self, Report};
use crate::scenario::{Scenario, model_of};
use crate::sys;
use crate::target::{self, Places, Running, Target};

/// How long the upstream may take to answer what it is told.
const CONTROL: Duration = Duration::from_secs(5);
/// The key that every target of `bench/targets` knows.
pub const KEY: &str = "sk-bench";
/// How long system calls are counted after the window.
const SYSTEM_CALLS: Duration = Duration::from_secs(1);

/// Where a stand finds its programs.
#[derive(Clone, Debug)]
pub struct Paths {
    /// The project's root.
    pub root: PathBuf,
    /// This program, to be started as the upstream.
    pub bench: PathBuf,
    pub gateway: PathBuf,
}

/// A running stand. Dropping it ends the upstream and removes its folder.
#[derive(Debug)]
pub struct Stand {
    pub places: Places,
    upstream: Child,
    /// The core of the target; the load generator and the upstream have another.
    pub target_core: Option<usize>,
    pub load_core: Option<usize>,
}

impl Stand {
    /// Starts the upstream.
    ///
    /// # Errors
    /// A folder or certificate that cannot be written, and an upstream that does not start.
    pub fn start(paths: &Paths) -> Result<Self> {
        let (target_core, load_core) = if sys::cores() >= 2 {
            (Some(0), Some(1))
        } else {
            (None, None)
        };
        let state = new_folder()?;
        let started = prepare(&state).and_then(|(certificate, certificate_key)| {
            let (upstream, addr) = start_upstream(&paths.bench, load_core)?;
            Ok((certificate, certificate_key, upstream, addr))
        });
        let (certificate, certificate_key, upstream, addr) = match started {
            Ok(parts) => parts,
            Err(error) => {
                let _ = fs::remove_dir_all(&state);
                return Err(error);
            }
        };
        Ok(Self {
            places: Places {
                root: paths.root.clone(),
                state,
                gateway: paths.gateway.clone(),
                upstream: addr,
                certificate,
                certificate_key,
            },
            upstream,
            target_core,
            load_core,
        })
    }

    /// Tells the upstream what the parts of `scenario` get.
    ///
    /// # Errors
    /// An upstream that does not take it.
    pub fn set(&self, scenario: &Scenario) -> Result<()> {
        for (index, part) in scenario.parts.iter().enumerate() {
            set_model(self.places.upstream, &model_of(index), &part.behaviour)?;
        }
        Ok(())
    }

    /// Starts `target`, in a folder without a past; `None` for the direct one.
    ///
    /// # Errors
    /// Those of [`Target::start`].
    pub fn start_target(&self, target: &Target) -> Result<Option<Running>> {
        if target.direct {
            return Ok(None);
        }
        let _ = fs::remove_dir_all(self.places.state.join("ledger"));
        fs::create_dir_all(self.places.state.join("ledger"))?;
        target
            .start(&self.places, self.target_core)
            .map(Some)
            .with_context(|| format!("{} did not start", target.name))
    }

    /// What the load generator does to `running` for `scenario`.
    ///
    /// # Errors
    /// Those of [`Scenario::load`].
    pub fn options(
        &self,
        scenario: &Scenario,
        target: &Target,
        running: Option<&Running>,
        window: Option<Duration>,
    ) -> Result<load::Options> {
        let url = match running {
            Some(running) if scenario.tls => running.tls_url.clone(),
            Some(running) => running.url.clone(),
            None => format!("http://{}", self.places.upstream),
        };
        let mut options = scenario.load(&url, Some(KEY), window, model_of)?;
        options.headers = target.headers(&self.places);
        options.pids = running.map_or_else(|| vec![self.upstream.id()], Running::pids);
        options.count_system_calls = (scenario.held() < scenario.connections_max()).then_some(SYSTEM_CALLS);
        Ok(options)
    }

    /// Runs the load on its own core and reports.
    ///
    /// # Errors
    /// Those of [`load::run`].
    pub fn run(&self, options: &load::Options) -> Result<Report> {
        let core = self.load_core;
        std::thread::scope(|scope| {
            let run = scope.spawn(|| {
                if let Some(core) = core {
                    sys::pin(core)?;
                }
                load::run(options)
            });
            run.join()
                .unwrap_or_else(|_| Err(std::io::Error::other("the load generator panicked")))
        })
        .with_context(|| format!("cannot load {}", options.url))
    }
}

impl Drop for Stand {
    fn drop(&mut self) {
        target::end(&mut self.upstream);
        let _ = fs::remove_dir_all(&self.places.state);
    }
}

fn new_folder() -> Result<PathBuf> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let name = format!(
        "gateway-bench.{}.{}",
        std::process::id(),
        NUMBER.fetch_add(1, Relaxed)
    );
    let state = std::env::temp_dir().join(name);
    let _ = fs::remove_dir_all(&state);
    fs::create_dir_all(&state).with_context(|| format!("cannot make {}", state.display()))?;
    Ok(state)
}

/// Writes a certificate of this run for 127.0.0.1 and localhost, its key, and both in one file.
fn prepare(state: &Path) -> Result<(PathBuf, PathBuf)> {
    let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
    let made = rcgen::generate_simple_self_signed(names)?;
    let (certificate, key) = (made.cert.pem(), made.signing_key.serialize_pem());
    let (certificate_path, key_path) = (state.join("certificate.pem"), state.join("key.pem"));
    fs::write(&certificate_path, &certificate)?;
    fs::write(&key_path, &key)?;
    fs::write(state.join("pair.pem"), certificate + &key)?;
    Ok((certificate_path, key_path))
}

fn start_upstream(bench: &Path, core: Option<usize>) -> Result<(Child, SocketAddr)> {
    let mut command = Command::new(bench);
    command
        .args(["upstream", "--listen", "127.0.0.1:0"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut child = target::spawn(&mut command, core)?;
    let mut line = String::new();
    if let Some(output) = child.stdout.take() {
        BufReader::new(output).read_line(&mut line)?;
    }
    match line
        .trim()
        .rsplit_once("http://")
        .and_then(|(_, addr)| addr.parse().ok())
    {
        Some(addr) => Ok((child, addr)),
        None => {
            target::end(&mut child);
            bail!("the simulated upstream did not start: it said `{}`", line.trim())
        }
    }
}

/// Tells a simulated upstream what calls of `model` get.
///
/// # Errors
/// An upstream that is not there or does not take the words.
pub fn set_model(upstream: SocketAddr, model: &str, words: &str) -> Result<()> {
    let mut socket = TcpStream::connect_timeout(&upstream, CONTROL)?;
    socket.set_read_timeout(Some(CONTROL))?;
    write!(
        socket,
        "PUT /sim/models/{model} HTTP/1.1\r\nhost: sim\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{words}",
        words.len()
    )?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer)?;
    if !answer.starts_with("HTTP/1.1 200") {
        bail!("the simulated upstream does not take `{words}` for {model}: {answer}");
    }
    Ok(())
}
