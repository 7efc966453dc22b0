//! The commands that start targets themselves.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use gateway_bench::capacity::{self, Goal, Search};
use gateway_bench::compare;
use gateway_bench::html;
use gateway_bench::load::{self, Report};
use gateway_bench::scenario::Scenario;
use gateway_bench::soak::{self, Sample, Soak};
use gateway_bench::stand::{Paths, Stand};
use gateway_bench::sys;
use gateway_bench::target::{Running, Target};

use crate::args::{INTERRUPTED, parse_duration, say};

/// Where scenarios, targets and the gateway are
#[derive(clap::Args)]
pub struct StandArgs {
    /// The project's root [default: the folder above the present one that has bench/targets]
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// The gateway's program [default: beside this one]
    #[arg(long, env = "GATEWAY", value_name = "FILE")]
    gateway: Option<PathBuf>,
}

impl StandArgs {
    fn paths(&self) -> Result<Paths> {
        let bench = std::env::current_exe().context("cannot find this program")?;
        let root = match &self.root {
            Some(root) => root.clone(),
            None => find_root()?,
        };
        let beside = bench.with_file_name("gateway");
        Ok(Paths {
            root: root
                .canonicalize()
                .with_context(|| format!("there is no {}", root.display()))?,
            gateway: self.gateway.clone().unwrap_or(beside),
            bench,
        })
    }
}

fn find_root() -> Result<PathBuf> {
    let here = std::env::current_dir()?;
    here.ancestors()
        .find(|folder| folder.join("bench/targets").is_dir())
        .map(Path::to_owned)
        .context("no bench/targets here or above: use --root")
}

/// Run targets by turns under the same load, each pinned to its core, and put their figures side by side
///
/// Ends with 0 where every answer was whole, with 1 where one was not, with 2 where nothing could be run.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    gateway-bench compare --targets gateway,nginx --scenarios busy,light --rounds 3\n  \
    gateway-bench compare --targets direct,gateway,nginx,haproxy,envoy --scenarios all --window 10s --out target/bench")]
pub struct CompareArgs {
    #[command(flatten)]
    stand: StandArgs,
    /// Targets (files of bench/targets, or paths), `all` for all
    #[arg(long, value_delimiter = ',', default_value = "direct,nginx,gateway")]
    targets: Vec<String>,
    /// Scenarios (files of bench/scenarios, or paths), `all` for all
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "memory,json-1k,busy,light,flood"
    )]
    scenarios: Vec<String>,
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Time of each measured window [default: the scenario's]
    #[arg(long, value_parser = parse_duration, value_name = "TIME")]
    window: Option<Duration>,
    /// Where the reports go
    #[arg(long, default_value = "target/bench-results", value_name = "DIR")]
    out: PathBuf,
}

impl CompareArgs {
    pub fn run(&self) -> Result<ExitCode> {
        let paths = self.stand.paths()?;
        let options = compare::Options {
            scenarios: scenarios(&paths.root, &self.scenarios)?,
            targets: targets(&paths.root, &self.targets)?,
            rounds: self.rounds,
            window: self.window,
            out: self.out.clone(),
            command: command_line(),
        };
        std::fs::create_dir_all(&self.out).with_context(|| format!("cannot make {}", self.out.display()))?;
        sys::catch_interrupts()?;
        let stand = Stand::start(&paths)?;
        // A comparison may take hours: what stands is written after each scenario.
        let results = compare::run(&stand, &options, |results| self.write(results))?;
        drop(stand);
        say(&format!(
            "{}\nreports: {out}; to look at: {out}/compare.html\n",
            results.table(),
            out = self.out.display()
        ))?;
        if sys::interrupted() {
            eprintln!("gateway-bench: interrupted");
            return Ok(INTERRUPTED.into());
        }
        if results.cells.iter().all(|cell| cell.reports.is_empty()) {
            bail!("nothing could be run");
        }
        Ok(if results.is_sound() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

impl CompareArgs {
    fn write(&self, results: &compare::Results) -> Result<()> {
        let write = |name: &str, text: String| {
            let path = self.out.join(name);
            std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        write("compare.json", serde_json::to_string(results)? + "\n")?;
        write("compare.txt", results.table() + "\n")?;
        write("compare.html", html::page(results)?)
    }
}

/// What is loaded: a target that is started for it, or one that runs
#[derive(clap::Args)]
struct LoadedArgs {
    #[command(flatten)]
    stand: StandArgs,
    /// Target to start (a file of bench/targets, or a path), with a simulated upstream behind it
    #[arg(long, default_value = "gateway", conflicts_with = "url")]
    target: String,
    /// Target that runs already, as scheme, host and port
    #[arg(long, requires = "model")]
    url: Option<String>,
    /// With --url: the model that is asked for
    #[arg(long)]
    model: Option<String>,
    /// With --url: the key
    #[arg(long, env = "GATEWAY_BENCH_KEY", hide_env_values = true)]
    key: Option<String>,
    /// With --url: the processes that are measured
    #[arg(long = "pid", value_name = "PID")]
    pids: Vec<u32>,
    /// With --url: a real model answers, whose tokens cannot be known
    #[arg(long)]
    real: bool,
    /// Mix of requests (a file of bench/scenarios, or a path)
    #[arg(long, default_value = "mixed")]
    scenario: String,
    /// Tokens that an answer may have; no part of the mix asks for more
    #[arg(long, value_name = "N")]
    max_tokens: Option<u32>,
    /// Write the result as JSON to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What is loaded, while it runs.
struct Loaded {
    options: load::Options,
    stand: Option<Stand>,
    _running: Option<Running>,
}

impl LoadedArgs {
    fn start(&self, window: Option<Duration>) -> Result<Loaded> {
        sys::catch_interrupts()?;
        let paths = self.stand.paths()?;
        let scenario = Scenario::read(&file_of(&paths.root.join("bench/scenarios"), &self.scenario)?)?;
        sys::allow_descriptors(2 * scenario.connections_max() as u64 + 500);
        if let (Some(url), Some(model)) = (&self.url, &self.model) {
            let mut options = scenario.load(url, self.key.as_deref(), window, |_| model.clone())?;
            options.pids.clone_from(&self.pids);
            for part in options.parts.iter_mut().filter(|_| self.real) {
                (part.check, part.expect_tokens) = (load::Check::Shape, None);
            }
            self.limit_tokens(&mut options);
            return Ok(Loaded {
                options,
                stand: None,
                _running: None,
            });
        }
        let target = Target::read(&file_of(&paths.root.join("bench/targets"), &self.target)?)?;
        let stand = Stand::start(&paths)?;
        if let Some(reason) = target.missing(&stand.places) {
            bail!("{}: {reason}", target.name);
        }
        stand.set(&scenario)?;
        let running = stand.start_target(&target)?;
        let mut options = stand.options(&scenario, &target, running.as_ref(), window)?;
        options.count_system_calls = None;
        self.limit_tokens(&mut options);
        Ok(Loaded {
            options,
            stand: Some(stand),
            _running: running,
        })
    }

    fn limit_tokens(&self, options: &mut load::Options) {
        if let Some(most) = self.max_tokens {
            options.parts.iter_mut().for_each(|part| part.limit_tokens(most));
        }
    }

    fn write(&self, result: &impl serde::Serialize) -> Result<()> {
        match &self.json {
            Some(path) => std::fs::write(path, serde_json::to_string_pretty(result)? + "\n")
                .with_context(|| format!("cannot write {}", path.display())),
            None => Ok(()),
        }
    }
}

impl Loaded {
    fn run(&self, options: &load::Options) -> Result<Report> {
        match &self.stand {
            Some(stand) => stand.run(options),
            None => load::run(options).with_context(|| format!("cannot load {}", options.url)),
        }
    }
}

/// Find the highest rate of requests at which a 99th percentile holds and nothing fails
///
/// The open loop: a server that falls behind cannot hide it. Ends with 0 where a rate held, else with 1.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    gateway-bench capacity --target gateway --scenario json-1k --p99 total=20ms --from 1000\n  \
    gateway-bench capacity --url http://gpu-fleet:8000 --model llama --real --scenario chat --p99 ttft=2s --from 1")]
pub struct CapacityArgs {
    #[command(flatten)]
    loaded: LoadedArgs,
    /// What must hold: `ttft=TIME`, `inter-token=TIME`, `total=TIME` or `delay=TIME`
    #[arg(long, value_parser = parse_goal, value_name = "GOAL")]
    p99: Goal,
    /// Requests per second to begin with
    #[arg(long, default_value_t = 10.0, value_name = "R")]
    from: f64,
    /// Requests per second not to go beyond
    #[arg(long, default_value_t = 1_000_000.0, value_name = "R")]
    most: f64,
    /// Exactness, in per cent of the rate
    #[arg(long, default_value_t = 5.0, value_name = "PERCENT")]
    within: f64,
    /// Measured time of each rate, after the scenario's warm-up
    #[arg(long, value_parser = parse_duration, default_value = "5s", value_name = "TIME")]
    window: Duration,
    /// Requests under way at most
    #[arg(long, default_value_t = 4000, value_name = "N")]
    connections: usize,
}

fn parse_goal(text: &str) -> Result<Goal, String> {
    Goal::parse(text).ok_or_else(|| "expected ttft=, inter-token=, total= or delay= with a time".to_owned())
}

impl CapacityArgs {
    pub fn run(&self) -> Result<ExitCode> {
        let mut loaded = self.loaded.start(Some(self.window))?;
        loaded.options.connections = self.connections;
        sys::allow_descriptors(2 * self.connections as u64 + 500);
        let search = Search {
            goal: self.p99,
            from: self.from,
            most: self.most,
            within: self.within / 100.0,
            window: self.window,
        };
        let found = capacity::find(&search, |rate| {
            eprintln!("-- {rate:.1} requests/s");
            let report = loaded.run(&capacity::at_rate(&loaded.options, rate))?;
            if sys::interrupted() {
                bail!("interrupted at {rate:.1} requests/s");
            }
            Ok(report)
        })?;
        say(&found.to_string())?;
        self.loaded.write(&found)?;
        Ok(if found.rate.is_some() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

/// Run a mix for long and look for what grows: memory and descriptors
///
/// Ends with 0 where every answer was whole, nothing grew and no process ended, else with 1.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    gateway-bench soak --duration 1h\n  \
    gateway-bench soak --url http://127.0.0.1:8080 --model llama --real --pid $(pidof -s gateway) --duration 8h --every 10s")]
pub struct SoakArgs {
    #[command(flatten)]
    loaded: LoadedArgs,
    /// Time of the load after the scenario's warm-up; memory is judged over its second half
    #[arg(long, short, value_parser = parse_duration, default_value = "10m", value_name = "TIME")]
    duration: Duration,
    /// Time between two looks at the processes
    #[arg(long, value_parser = parse_duration, default_value = "1s", value_name = "TIME")]
    every: Duration,
    /// How long connections may take to close afterwards: longer than the target keeps idle ones (the gateway: 60 s)
    #[arg(long, value_parser = parse_duration, default_value = "90s", value_name = "TIME")]
    settle: Duration,
}

impl SoakArgs {
    pub fn run(&self) -> Result<ExitCode> {
        let loaded = self.loaded.start(Some(self.duration))?;
        let pids = loaded.options.pids.clone();
        if pids.is_empty() {
            bail!("a soak watches processes: name them with --pid");
        }
        if self.every.is_zero() || self.duration < self.every * soak::LOOKS_MIN {
            bail!(
                "a soak needs {} looks at the processes: a longer --duration, or --every",
                soak::LOOKS_MIN
            );
        }
        let before = Sample::read(&pids, 0.0).context("cannot watch the processes")?;
        let over = AtomicBool::new(false);
        let mut options = loaded.options.clone();
        let told = std::io::stderr().is_terminal();
        let (report, watched) = std::thread::scope(|scope| {
            let watch = scope.spawn(|| {
                let watched = soak::watch(&pids, before, self.every, &over);
                // At once: the load goes on for long.
                watched
                    .trouble
                    .iter()
                    .for_each(|trouble| eprintln!("-- {trouble}"));
                watched
            });
            let report = crate::watch::watched(told, &mut options, |options| loaded.run(options));
            over.store(true, Relaxed);
            (report, watch.join().unwrap_or_default())
        });
        let report = report?;
        let soak = Soak::judge(watched, Soak::settle(&pids, &before, self.settle));
        print!("{report}{soak}");
        self.loaded
            .write(&serde_json::json!({ "soak": soak, "report": report }))?;
        Ok(if soak.is_sound() && report.is_sound() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

/// The scenarios of these names, in their order.
fn scenarios(root: &Path, names: &[String]) -> Result<Vec<Scenario>> {
    let folder = root.join("bench/scenarios");
    if let [all] = names
        && all == "all"
    {
        return Ok(Scenario::read_all(&folder)?.into_values().collect());
    }
    names
        .iter()
        .map(|name| Scenario::read(&file_of(&folder, name)?))
        .collect()
}

/// The targets of these names, in their order.
fn targets(root: &Path, names: &[String]) -> Result<Vec<Target>> {
    let folder = root.join("bench/targets");
    if let [all] = names
        && all == "all"
    {
        return Ok(Target::read_all(&folder)?.into_values().collect());
    }
    names
        .iter()
        .map(|name| Target::read(&file_of(&folder, name)?))
        .collect()
}

/// A name in `folder`, or a path.
fn file_of(folder: &Path, name: &str) -> Result<PathBuf> {
    let named = folder.join(format!("{name}.yaml"));
    if named.is_file() {
        return Ok(named);
    }
    let path = PathBuf::from(name);
    if path.is_file() {
        return Ok(path);
    }
    bail!("there is neither {} nor a file {name}", named.display())
}

/// How this program was called, to be told with its results: without keys, for results are handed on.
pub fn command_line() -> String {
    let words: Vec<String> = std::env::args().skip(1).collect();
    format!("gateway-bench {}", without_secrets(&words).join(" "))
}

fn without_secrets(words: &[String]) -> Vec<String> {
    let hide = |option: &str, value: &str| match (option, value.split_once(':')) {
        ("--key", _) => "…".to_owned(),
        // Any field may be one that a provider takes a key in.
        (_, Some((name, _))) => format!("{name}: …"),
        (_, None) => "…".to_owned(),
    };
    let mut before = "";
    let mut told = Vec::new();
    for word in words {
        let secret = |option: &str| matches!(option, "--key" | "--header");
        told.push(match word.split_once('=') {
            _ if secret(before) => hide(before, word),
            Some((option, value)) if secret(option) => format!("{option}={}", hide(option, value)),
            _ => word.clone(),
        });
        before = if secret(before) { "" } else { word };
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_have_no_secrets() {
        let words = |text: &str| text.split('|').map(str::to_owned).collect::<Vec<String>>();
        let told = without_secrets(&words(
            "load|--key|sk-1|--header|authorization: Bearer sk-2|--key=sk-3|--header=x-api-key:sk-4|--keys|keys.txt|-c|4",
        ));
        assert_eq!(
            told.join(" "),
            "load --key … --header authorization: … --key=… --header=x-api-key: … --keys keys.txt -c 4"
        );
    }
}
