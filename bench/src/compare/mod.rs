//! Targets by turns in one run: A B C, A B C, each pinned to its core, so that what the machine does meanwhile hits all.

mod machine;
mod results;
mod table;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

pub use machine::Machine;
pub use results::{BASELINE, Cell, DIRECT, Figures, Results, Spread, TargetInfo, median};

use crate::scenario::Scenario;
use crate::stand::Stand;
use crate::sys;
use crate::target::Target;

/// Descriptors that the load generator may need beyond two for each connection.
const DESCRIPTORS_OVER: u64 = 500;

/// What is compared.
#[derive(Clone, Debug)]
pub struct Options {
    pub scenarios: Vec<Scenario>,
    pub targets: Vec<Target>,
    pub rounds: u32,
    /// Time of each measured window; the scenario's own where it is not set.
    pub window: Option<Duration>,
    /// Where each run's report is put, as `SCENARIO.TARGET.ROUND.json`.
    pub out: PathBuf,
    /// How it was called, to be told with the results.
    pub command: String,
}

/// Runs everything and tells on standard error what it does. What cannot be run is skipped with a reason.
///
/// # Errors
/// Reports that cannot be written, and those of `after`, which is called with what stands after each scenario. Targets that
/// fail are no errors: the results have the reason.
pub fn run(
    stand: &Stand,
    options: &Options,
    mut after: impl FnMut(&Results) -> Result<()>,
) -> Result<Results> {
    let mut results = Results {
        machine: Machine::read(),
        command: options.command.clone(),
        rounds: options.rounds,
        targets: options
            .targets
            .iter()
            .map(|target| TargetInfo {
                name: target.name.clone(),
                about: target.about.clone(),
                on: target.on.clone(),
                off: target.off.clone(),
                version: target.version(&stand.places),
                missing: target.missing(&stand.places),
            })
            .collect(),
        cells: Vec::new(),
    };
    std::fs::create_dir_all(&options.out)
        .with_context(|| format!("cannot make {}", options.out.display()))?;
    for scenario in &options.scenarios {
        stand.set(scenario)?;
        let mut cells: Vec<Cell> = options
            .targets
            .iter()
            .map(|target| Cell::new(scenario, &target.name))
            .collect();
        for (cell, target) in cells.iter_mut().zip(&options.targets) {
            cell.skipped = why_not(stand, scenario, target);
            if let Some(reason) = &cell.skipped {
                eprintln!("-- {}, {}: skipped: {reason}", scenario.name, target.name);
            }
        }
        for round in 1..=options.rounds {
            for (cell, target) in cells.iter_mut().zip(&options.targets) {
                if cell.skipped.is_none() && !sys::interrupted() {
                    one(stand, options, scenario, target, round, cell)?;
                }
            }
        }
        results.cells.extend(cells);
        after(&results)?;
        if sys::interrupted() {
            break;
        }
    }
    Ok(results)
}

fn one(
    stand: &Stand,
    options: &Options,
    scenario: &Scenario,
    target: &Target,
    round: u32,
    cell: &mut Cell,
) -> Result<()> {
    let report = stand.start_target(target).and_then(|running| {
        let load = stand.options(scenario, target, running.as_ref(), options.window)?;
        stand.run(&load)
    });
    if sys::interrupted() {
        // The signal went to the target and the upstream too: what the run saw of them means nothing.
        return Ok(());
    }
    match report {
        Ok(report) => {
            let figures = Figures::of(scenario.figure, &report);
            eprintln!("-- {}, {}, round {round}: {figures}", scenario.name, target.name);
            let path = options
                .out
                .join(format!("{}.{}.{round}.json", scenario.name, target.name));
            std::fs::write(&path, serde_json::to_string(&report)? + "\n")
                .with_context(|| format!("cannot write {}", path.display()))?;
            cell.reports.push(report);
        }
        Err(error) => {
            eprintln!("!! {}, {}, round {round}: {error:#}", scenario.name, target.name);
            cell.skipped = Some(format!("{error:#}"));
        }
    }
    Ok(())
}

/// Why a scenario is not run against a target, if it is not.
fn why_not(stand: &Stand, scenario: &Scenario, target: &Target) -> Option<String> {
    if let Some(reason) = target.missing(&stand.places) {
        return Some(reason);
    }
    if scenario.needs_keys && !target.checks_keys {
        return Some("it checks no keys".to_owned());
    }
    if scenario.tls && !target.tls {
        return Some("no TLS is set up for it".to_owned());
    }
    if target.slow && scenario.connections_max() > 256 && scenario.rate.is_none() {
        return Some("far more than it can bear: only its queue would be measured".to_owned());
    }
    let wanted = 2 * scenario.connections_max() as u64 + DESCRIPTORS_OVER;
    let allowed = sys::allow_descriptors(wanted);
    (allowed < wanted).then(|| format!("it needs {wanted} descriptors, {allowed} are allowed (ulimit -n)"))
}
