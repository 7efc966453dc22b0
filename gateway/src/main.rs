//! Reads the command line and hands over to a command of [`gateway::cli`].

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use gateway::cli;

#[cfg(feature = "mimalloc")]
#[global_allocator]
static ALLOCATOR: gateway::net::allocator::Allocator = gateway::net::allocator::Allocator;

/// An eBPF-accelerated, high-throughput gateway for LLM traffic
#[derive(Parser)]
#[command(
    version,
    after_help = "\
Examples:
  gateway demo                             see it work, on loopback, with a simulated fleet
  gateway run -c /etc/gateway/gateway.yaml run it
  gateway keys create --name alice         make a key
  gateway status                           how is it

The configuration's fields stand in `gateway schema` and in examples/gateway.yaml."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(cli::run::Args),
    Demo(cli::demo::Args),
    Check(cli::check::Args),
    Schema(cli::schema::Args),
    Keys(cli::keys::Args),
    Budgets(cli::budgets::Args),
    Limits(cli::limits::Args),
    Status(cli::status::Args),
    Top(cli::top::Args),
    Usage(cli::usage::Args),
    Prices(cli::prices::Args),
    Kernel(cli::kernel::Args),
    Reload(cli::reload::Args),
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Run(args) => cli::run::run(&args),
        Command::Demo(args) => cli::demo::run(&args),
        Command::Check(args) => cli::check::run(&args),
        Command::Schema(args) => cli::schema::run(&args),
        Command::Keys(args) => cli::keys::run(&args),
        Command::Budgets(args) => cli::budgets::run(&args),
        Command::Limits(args) => cli::limits::run(&args),
        Command::Status(args) => cli::status::run(&args),
        Command::Top(args) => cli::top::run(&args),
        Command::Usage(args) => cli::usage::run(&args),
        Command::Prices(args) => cli::prices::run(&args),
        Command::Kernel(args) => cli::kernel::run(&args),
        Command::Reload(args) => cli::reload::run(&args),
    }
}
