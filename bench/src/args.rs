//! The command line.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::{Parser, Subcommand};
use gateway_bench::html;
use gateway_bench::load::{self, Arrivals, Check, HangUp, Part, Sources, Stage, Trace, Trust};
use gateway_bench::scenario::Scenario;
use gateway_bench::upstream::{self, Behaviour, Tls, behaviour};

use crate::stands::{CapacityArgs, CompareArgs, SoakArgs, command_line};

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
    Capacity(CapacityArgs),
    Soak(SoakArgs),
}

/// Simulate a fleet of servers that speak OpenAI's, Anthropic's and Google's APIs
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
    /// Behaviour of one model, `NAME=WORDS` (can be repeated)
    #[arg(long = "model", value_name = "NAME=WORDS")]
    models: Vec<String>,
    /// Serve TLS, with a certificate of its own unless --certificate names one
    #[arg(long)]
    tls: bool,
    #[arg(long, value_name = "FILE", requires_all = ["tls", "certificate_key"])]
    certificate: Option<PathBuf>,
    #[arg(long, value_name = "FILE", requires = "certificate")]
    certificate_key: Option<PathBuf>,
    /// Play a recorded fleet: each call gets the lengths and times of the trace's next line (docs/bench.md)
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
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
    /// Key, sent as the API wants it
    #[arg(long, env = "GATEWAY_BENCH_KEY", hide_env_values = true)]
    key: Option<String>,
    /// File with a key a line, used in turn
    #[arg(long, value_name = "FILE", conflicts_with = "key")]
    keys: Option<PathBuf>,
    /// Further field of every request's head, `NAME: VALUE` (can be repeated)
    #[arg(long = "header", value_parser = parse_header, value_name = "FIELD")]
    headers: Vec<(String, String)>,
    /// Mix of a scenario file, in place of what the options say of the requests; its models are --model, or `sim:` with
    /// the part's behaviour where that is not given
    #[arg(long, value_name = "FILE")]
    scenario: Option<PathBuf>,
    #[arg(long, default_value = "sim")]
    model: String,
    /// Believe answers that are well-formed: for real models, whose tokens cannot be known
    #[arg(long)]
    real: bool,
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
    /// Open loop with rates that change, `FROM-TO:TIME` each, for example `0-200:30s,200-200:1m`
    #[arg(long, value_delimiter = ',', value_parser = parse_stage, value_name = "STAGE", conflicts_with = "rate")]
    stages: Vec<Stage>,
    /// Open loop: requests come as if by many who know nothing of each other
    #[arg(long)]
    poisson: bool,
    /// Open loop: send what a trace recorded (JSON lines; docs/bench.md), its time divided by --speed
    #[arg(long, value_name = "FILE", conflicts_with_all = ["rate", "stages"])]
    trace: Option<PathBuf>,
    #[arg(long, default_value_t = 1.0, value_name = "FACTOR")]
    speed: f64,
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
    /// Different prompts, sent in turn
    #[arg(long, default_value_t = 1, value_name = "N")]
    prompts: u32,
    /// Of a prompt's bytes, so many at its start are the same in all
    #[arg(long, default_value_t = 0, value_name = "N")]
    shared_bytes: usize,
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
    /// For https: resume sessions where the server hands tickets out [default: a whole handshake each]
    #[arg(long)]
    tls_resume: bool,
    /// Measure the cost of this process (can be repeated)
    #[arg(long = "pid", value_name = "PID")]
    pids: Vec<u32>,
    /// Hold N streams open and tell the processes' memory for each; use a model with a very slow pace
    #[arg(long, value_name = "N")]
    idle: Option<usize>,
    /// Count the processes' system calls for a second after the window
    #[arg(long)]
    system_calls: bool,
    /// Threads that share the load
    #[arg(long, default_value_t = 1, value_name = "N")]
    threads: usize,
    /// Where random choices start
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// Tell how it goes once a second [default: where standard error is a terminal]
    #[arg(long)]
    progress: bool,
    /// Write the report as one HTML page to this file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
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

fn parse_header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once(':').ok_or("expected `NAME: VALUE`")?;
    let plain = |text: &str| text.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    if name.is_empty() || !plain(name) || !plain(value) {
        return Err("a field has printable letters only".to_owned());
    }
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

fn parse_stage(text: &str) -> Result<Stage, String> {
    let parse = || {
        let (rates, time) = text.split_once(':')?;
        let (from, to) = rates.split_once('-')?;
        Some(Stage {
            from: from.parse().ok()?,
            to: to.parse().ok()?,
            time: behaviour::duration(time)?,
        })
    };
    parse().ok_or_else(|| "expected `FROM-TO:TIME`, for example `0-200:30s`".to_owned())
}

/// Does what the command line says.
pub fn run() -> Result<ExitCode> {
    match Args::parse().command {
        Command::Upstream(args) => run_upstream(&args),
        Command::Load(args) => run_load(&args),
        Command::Compare(args) => args.run(),
        Command::Capacity(args) => args.run(),
        Command::Soak(args) => args.run(),
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
        tls: match (&args.certificate, &args.certificate_key) {
            (Some(certificate), Some(key)) => {
                let tls = Tls::from_files(certificate, key);
                Some(tls.with_context(|| format!("cannot serve {}", certificate.display()))?)
            }
            _ if args.tls => Some(Tls::self_signed()?),
            _ => None,
        },
        trace: args.trace.as_ref().map(|path| read_trace(path)).transpose()?,
    };
    let server =
        upstream::Server::start(options).with_context(|| format!("cannot listen on {}", args.listen))?;
    for model in &args.models {
        let (name, words) = model.split_once('=').context("--model takes NAME=WORDS")?;
        server.set_model(name, words).map_err(|error| anyhow!(error))?;
    }
    let scheme = if args.tls { "https" } else { "http" };
    for addr in server.addrs() {
        println!("simulated upstream on {scheme}://{addr}");
    }
    server.join();
    Ok(ExitCode::FAILURE)
}

fn run_load(args: &LoadArgs) -> Result<ExitCode> {
    let mut options = load_options(args)?;
    let watched = args.progress || std::io::stderr().is_terminal();
    let report = crate::watch::watched(watched, &mut options, load::run)
        .with_context(|| format!("cannot load {}", args.url))?;
    let json = serde_json::to_string_pretty(&report)?;
    match &args.json {
        Some(path) if path.as_os_str() == "-" => println!("{json}"),
        Some(path) => {
            std::fs::write(path, json + "\n").with_context(|| format!("cannot write {}", path.display()))?;
            print!("{report}");
        }
        None => print!("{report}"),
    }
    let sound = report.is_sound();
    if let Some(path) = &args.html {
        let name = args
            .scenario
            .as_ref()
            .and_then(|path| path.file_stem())
            .map(|name| name.to_string_lossy());
        let results = html::of_load(
            report,
            &args.url,
            name.as_deref().unwrap_or("load"),
            command_line(),
        );
        std::fs::write(path, html::page(&results)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(if sound {
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
    let until = args.duration.or(match (args.requests, args.idle, &args.trace) {
        (None, None, None) => Some(Duration::from_secs(10)),
        (None, None, Some(_)) => Some(TRACE_MOST),
        _ => None,
    });
    let mut options = load::Options {
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
        tls_resume: args.tls_resume,
        pids: args.pids.clone(),
        idle: args.idle.is_some(),
        keys: match &args.keys {
            Some(path) => read(path)?
                .lines()
                .map(str::trim)
                .filter(|line| !line.is_empty())
                .map(str::to_owned)
                .collect(),
            None => Vec::new(),
        },
        headers: args.headers.clone(),
        stages: args.stages.clone(),
        arrivals: if args.poisson {
            Arrivals::Poisson
        } else {
            Arrivals::Even
        },
        trace: match &args.trace {
            Some(path) => Some(read_trace(path)?.at_speed(args.speed)),
            None => None,
        },
        count_system_calls: args.system_calls.then_some(Duration::from_secs(1)),
        threads: args.threads,
        seed: args.seed,
        ..load::Options::default()
    };
    options.parts = parts(args, &options)?;
    Ok(options)
}

/// A trace ends by itself.
const TRACE_MOST: Duration = Duration::from_secs(30 * 86_400);

fn read_trace(path: &Path) -> Result<Trace> {
    Trace::parse(&read(path)?).map_err(|error| anyhow!("{}: {error}", path.display()))
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The mix: a scenario's, or the one part that the options describe.
fn parts(args: &LoadArgs, options: &load::Options) -> Result<Vec<Part>> {
    let check = if args.real { Check::Shape } else { Check::Tokens };
    let Some(path) = &args.scenario else {
        return Ok(vec![Part {
            check,
            prompts: args.prompts,
            shared_bytes: args.shared_bytes,
            hold: options.idle,
            model: options.model.clone(),
            stream: options.stream,
            prompt_bytes: options.prompt_bytes,
            max_tokens: options.max_tokens,
            include_usage: options.include_usage,
            expect_tokens: options.expect_tokens,
            hang_up: options.hang_up,
            slow_reader: options.slow_reader,
            ..Part::default()
        }]);
    };
    let scenario = Scenario::read(path)?;
    let model = |index: usize| {
        if args.model == "sim" {
            format!("sim:{}", scenario.parts[index].behaviour)
        } else {
            args.model.clone()
        }
    };
    let mut parts = scenario.load(&args.url, None, None, model)?.parts;
    for part in &mut parts {
        part.check = check;
        if args.real {
            part.expect_tokens = None;
        }
    }
    Ok(parts)
}

/// The tokens that a simulator's model promises in its name.
fn tokens_of(model: &str, max_tokens: Option<u32>) -> Option<u64> {
    let words = model.strip_prefix("sim:")?;
    words
        .split(',')
        .any(|word| word.trim().starts_with("tokens="))
        .then_some(())?;
    let tokens = Behaviour::default().for_model(model).ok()?.tokens_fixed()?;
    Some(tokens.min(max_tokens.unwrap_or(u32::MAX)).into())
}
