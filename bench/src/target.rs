//! Targets: small YAML files that say how a proxy is set up, started and measured.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Deserializer};

use crate::sys;
use crate::upstream::behaviour;

/// Descriptors that a target may have: the scenario with most streams needs two for each of 11,000.
const DESCRIPTORS: u64 = 50_000;
/// Of these, so many are for other things than the two sides of a stream.
const DESCRIPTORS_SPARE: u64 = 100;
/// How long a target may take to end after it was asked to.
const END: Duration = Duration::from_secs(10);
/// Lines of a target's output that an error repeats.
const OUTPUT_LINES: usize = 8;

/// One target, as its file says.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// The file's name without `.yaml`.
    #[serde(skip)]
    pub name: String,
    /// What it is, on one line.
    pub about: String,
    /// What it does beside passing bytes on, and what it could but does not.
    #[serde(default)]
    pub on: Vec<String>,
    #[serde(default)]
    pub off: Vec<String>,
    /// There is no target: the load goes to the simulated upstream.
    #[serde(default)]
    pub direct: bool,
    /// What must be there: a program on the path, or a file below the project's root.
    #[serde(default)]
    pub needs: String,
    /// Prints its version.
    #[serde(default)]
    pub version: Vec<String>,
    /// Files that are filled in and put into its state folder: name beside this file, name there.
    #[serde(default)]
    pub files: BTreeMap<String, String>,
    /// What its files say in braces besides what every target's may: name and text.
    #[serde(default)]
    pub settings: BTreeMap<String, String>,
    #[serde(default)]
    pub command: Vec<String>,
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// Fields of every request's head.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    #[serde(default)]
    pub checks_keys: bool,
    #[serde(default)]
    pub tls: bool,
    /// It is left out unless it is named: it takes a hundred times what the others do.
    #[serde(default)]
    pub slow: bool,
    /// How long it may take to listen.
    #[serde(default = "ten_seconds", deserialize_with = "time")]
    pub ready: Duration,
    #[serde(skip)]
    folder: PathBuf,
}

fn ten_seconds() -> Duration {
    Duration::from_secs(10)
}

fn time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    behaviour::duration(&text).ok_or_else(|| serde::de::Error::custom("expected a time such as 10s"))
}

/// Where a run finds things.
#[derive(Clone, Debug)]
pub struct Places {
    /// The project's root.
    pub root: PathBuf,
    /// A folder of this run alone.
    pub state: PathBuf,
    /// The gateway's program.
    pub gateway: PathBuf,
    /// The simulated upstream.
    pub upstream: SocketAddr,
    /// Certificate and key for TLS, as PEM files.
    pub certificate: PathBuf,
    pub certificate_key: PathBuf,
}

impl Target {
    /// Reads one file.
    ///
    /// # Errors
    /// A file that cannot be read or is no target.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut target: Self = serde_saphyr::from_str(&text)
            .map_err(|error| anyhow!("{} is no target: {error}", path.display()))?;
        target.name = path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        target.folder = path.parent().unwrap_or(Path::new(".")).to_owned();
        if !target.direct && target.command.is_empty() {
            bail!("{} has no command", path.display());
        }
        Ok(target)
    }

    /// Reads all files of a folder. Names with another dot are templates.
    ///
    /// # Errors
    /// Those of [`Self::read`].
    pub fn read_all(folder: &Path) -> Result<BTreeMap<String, Self>> {
        let mut targets = BTreeMap::new();
        let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
        for entry in entries {
            let path = entry?.path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if name.strip_suffix(".yaml").is_some_and(|stem| !stem.contains('.')) {
                let target = Self::read(&path)?;
                targets.insert(target.name.clone(), target);
            }
        }
        Ok(targets)
    }

    /// Why it cannot be run here, if it cannot.
    pub fn missing(&self, places: &Places) -> Option<String> {
        if self.direct {
            return None;
        }
        let needs = self.needs.replace("{gateway}", &places.gateway.to_string_lossy());
        let found = if needs.contains('/') {
            places.root.join(&needs).exists()
        } else {
            find_program(&needs).is_some()
        };
        (!found).then(|| format!("{needs} is not installed (make bench-peers)"))
    }

    /// The first line of what its version command prints.
    pub fn version(&self, places: &Places) -> Option<String> {
        let words: Vec<String> = self
            .version
            .iter()
            .map(|word| fill(word, places, &Ports::default()))
            .collect();
        let (program, arguments) = words.split_first()?;
        let output = Command::new(find_program(program)?)
            .args(arguments)
            .output()
            .ok()?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        let line = text
            .lines()
            .map(|line| line.trim().trim_start_matches(program.as_str()).trim())
            .find(|line| line.chars().any(|c| c.is_ascii_digit()))?;
        Some(line.chars().take(100).collect())
    }

    /// Starts it on core `core` and waits until it listens.
    ///
    /// # Errors
    /// A template that cannot be read, a program that cannot be started, or one that does not listen in time: then with
    /// the end of its output.
    pub fn start(&self, places: &Places, core: Option<usize>) -> Result<Running> {
        let ports = Ports::free()?;
        for (from, to) in &self.files {
            let path = self.folder.join(from);
            let text =
                fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let text = self.settings.iter().fold(text, |text, (name, value)| {
                text.replace(&format!("{{{name}}}"), value)
            });
            fs::write(places.state.join(to), fill(&text, places, &ports))?;
        }
        let words: Vec<String> = self
            .command
            .iter()
            .map(|word| fill(word, places, &ports))
            .collect();
        let (program, arguments) = words.split_first().context("it has no command")?;
        let program = find_program(program).with_context(|| format!("there is no {program}"))?;
        let output = places.state.join("output");
        let log = File::create(&output)?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .envs(
                self.environment
                    .iter()
                    .map(|(name, value)| (name, fill(value, places, &ports))),
            )
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let mut running = Running {
            child: spawn(&mut command, core)?,
            url: format!("http://127.0.0.1:{}", ports.plain),
            tls_url: format!("https://127.0.0.1:{}", ports.tls),
        };
        let addr = SocketAddr::from(([127, 0, 0, 1], ports.plain));
        running
            .wait_for(addr, self.ready)
            .with_context(|| last_lines(&output))?;
        Ok(running)
    }

    /// The fields of every request's head, filled in.
    pub fn headers(&self, places: &Places) -> Vec<(String, String)> {
        self.headers
            .iter()
            .map(|(name, value)| (name.clone(), fill(value, places, &Ports::default())))
            .collect()
    }
}

/// Starts `command` on core `core`, with many descriptors, to be ended with this process.
///
/// # Errors
/// Those of starting a process.
pub fn spawn(command: &mut Command, core: Option<usize>) -> Result<Child> {
    // SAFETY: between fork and exec only system calls are made that are safe there: no allocation, no lock.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            sys::allow_descriptors(DESCRIPTORS);
            match core {
                Some(core) => sys::pin(core),
                None => Ok(()),
            }
        });
    }
    command
        .spawn()
        .with_context(|| format!("cannot start {}", command.get_program().to_string_lossy()))
}

/// A target that runs. Dropping it ends it.
#[derive(Debug)]
pub struct Running {
    child: Child,
    /// Its address without a path.
    pub url: String,
    pub tls_url: String,
}

impl Running {
    /// The process and all that came from it.
    pub fn pids(&self) -> Vec<u32> {
        crate::process::family(self.child.id())
    }

    fn wait_for(&mut self, addr: SocketAddr, most: Duration) -> Result<()> {
        let deadline = Instant::now() + most;
        while !answers(addr) {
            if let Some(status) = self.child.try_wait()? {
                bail!("it ended with {status}");
            }
            if Instant::now() > deadline {
                bail!("it does not answer on {addr} after {most:?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// Whether a request gets any answer: a port may be open before the process that serves it has been forked.
fn answers(addr: SocketAddr) -> bool {
    const WAIT: Duration = Duration::from_millis(500);
    let exchange = || -> std::io::Result<usize> {
        let mut socket = TcpStream::connect_timeout(&addr, WAIT)?;
        socket.set_read_timeout(Some(WAIT))?;
        socket.write_all(b"GET /bench-ready HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n")?;
        socket.read(&mut [0; 512])
    };
    exchange().is_ok_and(|received| received > 0)
}

impl Drop for Running {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// Asks a process to end, and ends it where it does not.
pub fn end(child: &mut Child) {
    let family = crate::process::family(child.id());
    for pid in &family {
        // SAFETY: no memory is involved; the process is a child of ours that has not been waited for, or came from it.
        unsafe { libc::kill(*pid as libc::pid_t, libc::SIGTERM) };
    }
    let deadline = Instant::now() + END;
    while Instant::now() < deadline {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    let _ = child.wait();
}

#[derive(Debug, Default)]
struct Ports {
    plain: u16,
    tls: u16,
    admin: u16,
}

impl Ports {
    /// Ports that are free now. Another program may take one before the target does; then it does not start.
    fn free() -> Result<Self> {
        let listeners: std::io::Result<Vec<TcpListener>> =
            (0..3).map(|_| TcpListener::bind(("127.0.0.1", 0))).collect();
        let ports: std::io::Result<Vec<u16>> = listeners?
            .iter()
            .map(|listener| Ok(listener.local_addr()?.port()))
            .collect();
        match ports?[..] {
            [plain, tls, admin] => Ok(Self { plain, tls, admin }),
            _ => bail!("no free ports"),
        }
    }
}

/// Fills in what stands in braces.
fn fill(text: &str, places: &Places, ports: &Ports) -> String {
    let path = |path: &Path| path.to_string_lossy().into_owned();
    [
        ("{state}", path(&places.state)),
        ("{root}", path(&places.root)),
        ("{gateway}", path(&places.gateway)),
        ("{cert}", path(&places.certificate)),
        ("{cert_key}", path(&places.certificate_key)),
        ("{upstream}", places.upstream.to_string()),
        ("{upstream_port}", places.upstream.port().to_string()),
        ("{port}", ports.plain.to_string()),
        ("{tls_port}", ports.tls.to_string()),
        ("{admin_port}", ports.admin.to_string()),
        (
            "{connections}",
            (sys::allow_descriptors(DESCRIPTORS) / 2 - DESCRIPTORS_SPARE).to_string(),
        ),
    ]
    .iter()
    .fold(text.to_owned(), |text, (name, value)| text.replace(name, value))
}

/// A program by its path or on the path, `sbin` included.
fn find_program(name: &str) -> Option<PathBuf> {
    if name.contains('/') {
        let path = PathBuf::from(name);
        return path.exists().then_some(path);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into(), "/usr/local/sbin".into()])
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
}

fn last_lines(path: &Path) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(OUTPUT_LINES)..];
    format!("its output ends with `{}`", last.join(" | "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(state: &Path) -> Places {
        Places {
            root: "/r".into(),
            state: state.into(),
            gateway: "/r/gateway".into(),
            upstream: ([127, 0, 0, 1], 9).into(),
            certificate: "/c".into(),
            certificate_key: "/k".into(),
        }
    }

    #[test]
    fn the_targets_of_this_folder_are_read() {
        let targets = Target::read_all(&Path::new(env!("CARGO_MANIFEST_DIR")).join("targets")).unwrap();
        let names: Vec<&str> = targets.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            [
                "direct",
                "envoy",
                "gateway",
                "haproxy",
                "litellm",
                "nginx",
                "portkey",
                "ungathered"
            ]
        );
        for target in targets.values() {
            assert!(!target.on.is_empty() && !target.off.is_empty(), "{}", target.name);
            assert!(
                target.files.keys().all(|file| target.folder.join(file).exists()),
                "{}",
                target.name
            );
        }
    }

    #[test]
    fn a_target_that_does_not_start_says_why() {
        let state = tempfile::tempdir().unwrap();
        let mut target: Target =
            serde_saphyr::from_str("about: x\nneeds: sh\ncommand: [sh, -c, \"echo no license >&2; exit 3\"]")
                .unwrap();
        let error = format!("{:#}", target.start(&places(state.path()), None).unwrap_err());
        assert!(
            error.contains("no license") && error.contains("exit status: 3"),
            "{error}"
        );
        assert_eq!(target.missing(&places(state.path())), None);
        target.needs = "no-such-program".to_owned();
        assert!(
            target
                .missing(&places(state.path()))
                .unwrap()
                .contains("no-such-program")
        );
    }

    #[test]
    fn braces_are_filled_in_and_others_left() {
        let ports = Ports {
            plain: 1,
            tls: 2,
            admin: 3,
        };
        let text = fill(
            "http { listen {port}; {upstream} {upstream_port} {cert_key} }",
            &places(Path::new("/s")),
            &ports,
        );
        assert_eq!(text, "http { listen 1; 127.0.0.1:9 9 /k }");
    }
}
