//! `gateway schema`: prints the JSON Schema of the configuration.

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use crate::config;

/// Print the JSON Schema of the configuration file
///
/// Draft 2020-12, with every field's meaning, default and bound. Editors complete and check with it.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  gateway schema > gateway.schema.json
  # then as the first line of gateway.yaml, for editors with the YAML language server:
  # yaml-language-server: $schema=gateway.schema.json")]
pub struct Args {}

/// Runs the command.
pub fn run(_args: &Args) -> ExitCode {
    let text = format!("{:#}\n", config::json_schema());
    match io::stdout().lock().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        // Who reads only the beginning (`| head`) has what it wants.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cannot write: {error}");
            ExitCode::FAILURE
        }
    }
}
