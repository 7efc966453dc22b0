//! `gateway reload`: puts a changed configuration in force.

use std::process::ExitCode;

use serde_json::json;

use super::client::{AdminArgs, Client, exit, print, print_json};

/// Put the changed configuration file in force
///
/// The running gateway reads its own file again, whatever -c says here. A wrong one is refused with
/// its reason, and the old one stays. Running requests keep what they started with.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  gateway check -c /etc/gateway/gateway.yaml && gateway reload

Exit code: 0 it is in force, 1 it is not.")]
pub struct Args {
    #[command(flatten)]
    admin: AdminArgs,
}

/// Runs the command.
pub fn run(args: &Args) -> ExitCode {
    exit(reload(args))
}

fn reload(args: &Args) -> anyhow::Result<()> {
    let answer = Client::new(&args.admin)?.post("/reload", &json!({}))?;
    match args.admin.json {
        true => print_json(&answer),
        false => print(&format!("{}\n", answer["message"].as_str().unwrap_or("reloaded"))),
    }
}
