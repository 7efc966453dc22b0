//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::{Parser, Subcommand};
use gateway_bench::load::{self, HangUp, Sources, Trust};
use gateway_bench::upstream::{self, Behaviour, behaviour};

use crate::stands::CompareArgs;

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
    Load(Box<LoadArgs>),
    Compare(CompareArgs),
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

/// Send load to an OpenAI-compatible server, check every token, and measure
///
/// Ends with 0 where every answer was whole, with 1 where one was not, with 2 where nothing could be run.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    gateway-bench load --url http://127.0.0.1:8080/v1/chat/completions --key sk-x --model fast --connections 300\n  \
    gateway-bench load --url http://127.0.0.1:9101/v1/chat/completions --model sim:first=0 --plain --rate 2000 \\\n      \
    --connections 64 --duration 10s --warm-up 2s --pid $(pidof gateway)\n  \
    gateway-bench load --url http://127.0.0.1:8080/v1/chat/completions --model slow --idle 5000 --pid $(pidof gateway)")]
struct LoadArgs {
    /// Where requests go; the path's end tells the API
    #[arg(long, default_value = "http://127.0.0.1:8080/v1/chat/completions")]
    url: String,
    /// Key, sent as a bearer token
    #[arg(long, env = "GATEWAY_BENCH_KEY", hide_env_values = true)]
    key: Option<String>,
    #[arg(long, default_value = "sim")]
    model: String,
    /// Ask for streams (the default)
    #[arg(long, conflicts_with = "plain")]
    stream: bool,
    /// Ask for plain answers
    #[arg(long)]
    plain: bool,
    /// Connections at most; without --rate also requests at once
    #[arg(long, short, default_value_t = 1, value_name = "N")]
    connections: usize,
    /// Open a new connection for each request
    #[arg(long)]
    no_keep_alive: bool,
    /// Open loop: requests per second, latencies counted from when each was due
    #[arg(long, value_name = "R")]
    rate: Option<f64>,
    /// Stop after so many requests
    #[arg(long, short = 'n', value_name = "N")]
    requests: Option<u64>,
    /// Start requests for this long, warm-up included [default: 10s, unless --requests is given]
    #[arg(long, short, value_parser = parse_duration, value_name = "TIME")]
    duration: Option<Duration>,
    /// Check but do not measure for this long at first
    #[arg(long, value_parser = parse_duration, default_value = "0s", value_name = "TIME")]
    warm_up: Duration,
    /// Spread the first requests over this time, so that streams do not beat in step
    #[arg(long, value_parser = parse_duration, default_value = "0s", value_name = "TIME")]
    ramp: Duration,
    /// Time that one request may take
    #[arg(long, value_parser = parse_duration, default_value = "2m", value_name = "TIME")]
    timeout: Duration,
    #[arg(long, default_value_t = 256, value_name = "N")]
    prompt_bytes: usize,
    #[arg(long, value_name = "N")]
    max_tokens: Option<u32>,
    /// Ask for the usage chunk
    #[arg(long)]
    include_usage: bool,
    /// Tokens that each answer must have [default: what `tokens=` in a `sim:` model says]
    #[arg(long, value_name = "N")]
    expect_tokens: Option<u64>,
    /// Leave streams when so many tokens have come
    #[arg(long, value_name = "TOKENS")]
    hang_up_after: Option<u64>,
    /// Percentage of requests that leave so
    #[arg(long, default_value_t = 100, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    hang_up_share: u8,
    /// Read no faster than so many bytes per second
    #[arg(long, value_name = "BYTES")]
    slow_reader: Option<u64>,
    /// Connect from the addresses of this IPv4 network in turn, for example 127.0.0.0/8
    #[arg(long, value_parser = parse_sources, value_name = "NET")]
    source: Option<Sources>,
    /// For https: trust the authorities in this PEM file [default: trust any certificate]
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Measure the cost of this process (can be repeated)
    #[arg(long = "pid", value_name = "PID")]
    pids: Vec<u32>,
    /// Hold N streams open and tell the processes' memory for each; use a model with a very slow pace
    #[arg(long, value_name = "N")]
    idle: Option<usize>,
    /// Write the report as JSON to this file, `-` for standard output instead of the table
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub fn parse_duration(text: &str) -> Result<Duration, String> {
    behaviour::duration(text).ok_or_else(|| "expected a time such as 250ms, 10s or 2m".to_owned())
}

fn parse_sources(text: &str) -> Result<Sources, String> {
    Sources::parse(text).ok_or_else(|| "expected an IPv4 network such as 127.0.0.0/8".to_owned())
}

/// Does what the command line says.
pub fn run() -> Result<ExitCode> {
    match Args::parse().command {
        Command::Upstream(args) => run_upstream(&args),
        Command::Load(args) => run_load(&args),
        Command::Compare(args) => args.run(),
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

fn run_load(args: &LoadArgs) -> Result<ExitCode> {
    let report = load::run(&load_options(args)?).with_context(|| format!("cannot load {}", args.url))?;
    let json = serde_json::to_string_pretty(&report)?;
    match &args.json {
        Some(path) if path.as_os_str() == "-" => println!("{json}"),
        Some(path) => {
            std::fs::write(path, json + "\n").with_context(|| format!("cannot write {}", path.display()))?;
            print!("{report}");
        }
        None => print!("{report}"),
    }
    Ok(if report.is_sound() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn load_options(args: &LoadArgs) -> Result<load::Options> {
    let trust = match &args.ca {
        Some(path) => {
            let pem = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            Some(Trust::Authorities(pem))
        }
        None => None,
    };
    let until = args.duration.or(match (args.requests, args.idle) {
        (None, None) => Some(Duration::from_secs(10)),
        _ => None,
    });
    Ok(load::Options {
        url: args.url.clone(),
        key: args.key.clone(),
        model: args.model.clone(),
        stream: !args.plain,
        connections: args.idle.unwrap_or(args.connections),
        keep_alive: !args.no_keep_alive,
        rate: args.rate,
        requests: args.requests,
        duration: until,
        warm_up: args.warm_up,
        ramp: args.ramp,
        timeout: args.timeout,
        prompt_bytes: args.prompt_bytes,
        max_tokens: args.max_tokens,
        include_usage: args.include_usage,
        expect_tokens: args
            .expect_tokens
            .or_else(|| tokens_of(&args.model, args.max_tokens)),
        hang_up: args.hang_up_after.map(|after_tokens| HangUp {
            after_tokens,
            share_percent: args.hang_up_share,
        }),
        slow_reader: args.slow_reader,
        sources: args.source,
        trust,
        pids: args.pids.clone(),
        idle: args.idle.is_some(),
        ..load::Options::default()
    })
}

/// The tokens that a simulator's model promises in its name.
fn tokens_of(model: &str, max_tokens: Option<u32>) -> Option<u64> {
    let words = model.strip_prefix("sim:")?;
    words
        .split(',')
        .any(|word| word.trim().starts_with("tokens="))
        .then_some(())?;
    let tokens = Behaviour::default().for_model(model).ok()?.tokens;
    Some(tokens.min(max_tokens.unwrap_or(u32::MAX)).into())
}
