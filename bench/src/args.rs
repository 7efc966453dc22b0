//! The command line.

use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow};
use clap::{Parser, Subcommand};
use gateway_bench::upstream::{self, Behaviour};

#[derive(Parser)]
#[command(
    version,
    about = "Load harness of the gateway: a simulated fleet and a load generator"
)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Upstream(UpstreamArgs),
}

/// Simulate a fleet of OpenAI-compatible servers
#[derive(clap::Args)]
#[command(
    after_help = "The model's name says what a call gets, for example `sim:tokens=50,pace=10ms,die=rst,after=7`.\n\
    All words stand in bench/README.md. GET /sim/stats answers counters, GET /sim/last the last call."
)]
struct UpstreamArgs {
    /// Address of the first endpoint
    #[arg(long, default_value = "127.0.0.1:9101", value_name = "ADDR")]
    listen: SocketAddr,
    /// Endpoints, on consecutive ports
    #[arg(long, default_value_t = 1, value_name = "N")]
    endpoints: u16,
    /// Threads, each serving all endpoints
    #[arg(long, default_value_t = 1, value_name = "N")]
    threads: usize,
    /// Behaviour where the model's name does not say otherwise, for example `tokens=20,pace=5ms`
    #[arg(
        long,
        default_value = "",
        env = "GATEWAY_BENCH_BEHAVIOUR",
        value_name = "WORDS"
    )]
    behaviour: String,
}

/// Does what the command line says.
pub fn run() -> Result<ExitCode> {
    match Args::parse().command {
        Command::Upstream(args) => run_upstream(&args),
    }
}

fn run_upstream(args: &UpstreamArgs) -> Result<ExitCode> {
    let mut behaviour = Behaviour::default();
    behaviour.apply(&args.behaviour).map_err(|error| anyhow!(error))?;
    let options = upstream::Options {
        listen: args.listen,
        endpoints: args.endpoints,
        threads: args.threads,
        behaviour,
    };
    let server =
        upstream::Server::start(options).with_context(|| format!("cannot listen on {}", args.listen))?;
    for addr in server.addrs() {
        println!("simulated upstream on http://{addr}");
    }
    server.join();
    Ok(ExitCode::FAILURE)
}
