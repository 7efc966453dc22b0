//! The commands that start targets themselves.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use gateway_bench::compare;
use gateway_bench::html;
use gateway_bench::scenario::Scenario;
use gateway_bench::stand::{Paths, Stand};
use gateway_bench::target::Target;

use crate::args::parse_duration;

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
        let stand = Stand::start(&paths)?;
        let results = compare::run(&stand, &options)?;
        let table = results.table();
        std::fs::write(
            self.out.join("compare.json"),
            serde_json::to_string(&results)? + "\n",
        )?;
        std::fs::write(self.out.join("compare.txt"), table.clone() + "\n")?;
        std::fs::write(self.out.join("compare.html"), html::page(&results)?)?;
        println!("{table}");
        println!("reports: {0}; to look at: {0}/compare.html", self.out.display());
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

pub fn command_line() -> String {
    let words: Vec<String> = std::env::args().skip(1).collect();
    format!("gateway-bench {}", words.join(" "))
}
