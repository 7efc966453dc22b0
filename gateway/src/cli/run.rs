//! `gateway run`: the gateway itself.

use std::process::ExitCode;

use super::common::{ConfigArg, EXIT_USAGE};
use crate::{config, control};

/// Run the gateway
///
/// SIGHUP (or `gateway reload`) puts a changed configuration in force; SIGTERM stops accepting and lets running
/// requests finish for up to `drain`; a second SIGTERM ends at once.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  gateway run -c gateway.yaml
  gateway check -c gateway.yaml && gateway run -c gateway.yaml

Exit code: 0 it was told to end, 1 it could not go on, 2 the configuration is wrong.")]
pub struct Args {
    #[command(flatten)]
    config: ConfigArg,
}

/// Runs the command.
pub fn run(args: &Args) -> ExitCode {
    let config = match config::load(&args.config.config) {
        Ok(config) => config,
        Err(errors) => {
            eprintln!("{errors}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    match control::run(args.config.config.clone(), config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gateway: {error:#}");
            ExitCode::FAILURE
        }
    }
}
