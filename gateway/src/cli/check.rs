//! `gateway check`: says what is wrong with a configuration.

mod explain;

use std::process::ExitCode;

use super::common::{ConfigArg, EXIT_USAGE};
use crate::config::{self, Config};

/// Check a configuration file without starting anything
///
/// Reports every error with its line, column and field, and the nearest known word. Secrets are
/// looked up and certificates read, so run it as the user and in the environment of the service.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  gateway check -c gateway.yaml
  gateway check --explain key=alice model=fast user=bob header.x-tier=gold
  sudo -u gateway gateway check && sudo systemctl reload gateway

Exit code: 0 the file is good (there may be warnings), 2 it is not.")]
pub struct Args {
    #[command(flatten)]
    config: ConfigArg,
    /// Also exit with 2 where there are warnings
    #[arg(long)]
    strict: bool,
    /// Print which limits and budgets would bind such a request, in the order in which they are asked: key, model, user,
    /// provider, path, client, header.NAME
    #[arg(long, num_args = 0.., value_name = "NAME=VALUE")]
    explain: Option<Vec<String>>,
}

/// Runs the command. Errors and warnings go to stderr, the summary to stdout.
pub fn run(args: &Args) -> ExitCode {
    let path = &args.config.config;
    let config = match config::load(path) {
        Ok(config) => config,
        Err(errors) => {
            eprintln!("{errors}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    for warning in &config.warnings {
        eprintln!("warning: {warning}");
    }
    if let Some(words) = &args.explain {
        match explain::explain(&config, words) {
            Ok(lines) if lines.is_empty() => println!("nothing limits this request"),
            Ok(lines) => lines.iter().for_each(|line| println!("{line}")),
            Err(error) => {
                eprintln!("{error:#}");
                return ExitCode::from(EXIT_USAGE);
            }
        }
        return ExitCode::SUCCESS;
    }
    println!("{}: ok ({})", path.display(), summary(&config));
    match args.strict && !config.warnings.is_empty() {
        true => ExitCode::from(EXIT_USAGE),
        false => ExitCode::SUCCESS,
    }
}

/// What the configuration has, for example `1 listener, 2 providers, 1 model, …`.
fn summary(config: &Config) -> String {
    let counts = [
        ("listener", config.listeners.len()),
        ("provider", config.providers.len()),
        ("model", config.models.len()),
        ("team", config.teams.len()),
        ("key", config.keys.len()),
        ("limit", config.limits.len()),
    ];
    let parts = counts.map(|(what, count)| format!("{count} {what}{}", if count == 1 { "" } else { "s" }));
    parts.join(", ")
}
