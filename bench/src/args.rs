//! The command line.

mod options;

use std::fs::OpenOptions;
use std::io::{ErrorKind, IsTerminal, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::{Parser, Subcommand};
use gateway_bench::html;
use gateway_bench::load::{self, Sources, Stage, Trace};
use gateway_bench::process::Snapshot;
use gateway_bench::sys;
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

/// The words of a behaviour, for who has no docs/bench.md at hand.
const WORDS: &str = "\
The model's name says what a call gets: `sim:WORD,WORD,…`, for example `sim:tokens=50,pace=10ms,die=rst,after=7`.
GET /sim/stats answers counters, GET /sim/last the last call, PUT /sim/models/NAME sets one model's words.

Words:
  tokens=N  pace=TIME  first=TIME  size=BYTES   length of the answer, time between tokens, to the first; text of each.
      Also uniform:LOW:HIGH, normal:MEAN:DEVIATION, lognormal:MEDIAN:SIGMA, exp:MEAN, and here file:PATH
  slowhead=TIME  huge=BYTES                     request to head; text of the first token
  usage=on|off|always  cached=N  reasoning=N    the usage and what it tells
  tools=N  dims=N  ctype=TYPE                   tool calls; dimensions of an embedding; another content type
  split=BYTES  gap=TIME                         writes of so many bytes, so far apart
  crlf  done=off  azure  comment=N  stamp       shape of the events; stamp: each token tells when it was sent
  status=N  retry=S                             an error object; its Retry-After
  die=rst|fin|stall  after=N                    death, after N tokens or before the head
  error=N  badchunk  garbage                    an error inside the stream; a bad chunk; no HTTP
  fault=KIND@SHARE                              that share of calls: a status, rst, fin, stall, error, badchunk, garbage,
      slow:TIME (can be repeated)
  rpm=N  tpm=N  parallel=N                      limits of one model on one endpoint: 429
  kv=BLOCKS  prefill=TIME                       a cache of prompt prefixes; time of 1,000 tokens that are not in it
  close  unframed  stale=on|now                 how connections end
Times are 250us, 20ms, 2s, 5m, 1h or a bare number of milliseconds.";

/// Simulate a fleet of servers that speak OpenAI's, Anthropic's and Google's APIs
#[derive(clap::Args)]
#[command(
    after_help = "The model's name says what a call gets, for example `sim:tokens=50,pace=10ms,die=rst,after=7`.\n\
    --help lists all words. GET /sim/stats answers counters, GET /sim/last the last call.",
    after_long_help = WORDS
)]
struct UpstreamArgs {
    /// Address of the first endpoint
    #[arg(long, default_value = "127.0.0.1:9101", value_name = "ADDR")]
    listen: SocketAddr,
    /// Endpoints, on consecutive ports
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    endpoints: u16,
    /// Threads, each serving all endpoints
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: u16,
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
    /// Certificate chain to serve, as PEM
    #[arg(long, value_name = "FILE", requires_all = ["tls", "certificate_key"])]
    certificate: Option<PathBuf>,
    /// Its private key, as PEM
    #[arg(long, value_name = "FILE", requires = "certificate")]
    certificate_key: Option<PathBuf>,
    /// Play a recorded fleet: each call gets the lengths and times of the trace's next line (docs/bench.md)
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
}

/// Send load to a server that speaks OpenAI's, Anthropic's or Gemini's API, check every token, and measure
///
/// Ends with 0 where every answer was whole and had status 200 (or what --scenario or --any-status says) and all that was
/// due was sent, with 1 where not, with 2 where nothing could be run, with 130 where a signal ended it early.
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
    /// File with a key a line, used in turn, instead of --key
    #[arg(long, value_name = "FILE")]
    keys: Option<PathBuf>,
    /// Further field of every request's head, `NAME: VALUE` (can be repeated)
    #[arg(long = "header", value_parser = parse_header, value_name = "FIELD")]
    headers: Vec<(String, String)>,
    /// Requests as a scenario file says, at its rate, with its connections and for its time where no option says
    /// otherwise; its models are --model, or `sim:` with the part's behaviour where that is not given
    #[arg(long, value_name = "FILE", conflicts_with_all = ["plain", "stream", "prompt_bytes", "prompts", "shared_bytes",
        "include_usage", "expect_tokens", "hang_up_after", "slow_reader", "idle"])]
    scenario: Option<PathBuf>,
    /// Model that is asked for [default: the one in the URL, else sim]
    #[arg(long)]
    model: Option<String>,
    /// Believe answers that are well-formed: for real models, whose tokens cannot be known
    #[arg(long)]
    real: bool,
    /// Ask for streams (the default)
    #[arg(long, conflicts_with = "plain")]
    stream: bool,
    /// Ask for plain answers
    #[arg(long)]
    plain: bool,
    /// Connections at most; in the closed loop also requests at once [default: 1; open loop: 1000]
    #[arg(long, short, value_name = "N")]
    connections: Option<usize>,
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
    /// The trace's time is divided by this
    #[arg(long, default_value_t = 1.0, value_parser = parse_speed, value_name = "FACTOR")]
    speed: f64,
    /// Open loop: requests that were due and found no free connection up to the end are no failure
    #[arg(long)]
    overload: bool,
    /// Any status will do [default: 200, or what the scenario says]
    #[arg(long)]
    any_status: bool,
    /// Stop after so many requests
    #[arg(long, short = 'n', value_name = "N")]
    requests: Option<u64>,
    /// Start requests for this long, warm-up included [default: the stages' or the trace's own time, else 10s unless
    /// --requests is given]
    #[arg(long, short, value_parser = parse_duration, value_name = "TIME")]
    duration: Option<Duration>,
    /// Check but do not measure for this long at first [default: 0s]
    #[arg(long, value_parser = parse_duration, value_name = "TIME")]
    warm_up: Option<Duration>,
    /// Spread the first requests over this time, so that streams do not beat in step [default: 0s]
    #[arg(long, value_parser = parse_duration, value_name = "TIME")]
    ramp: Option<Duration>,
    /// Time that one request may take [default: 2m]
    #[arg(long, value_parser = parse_duration, value_name = "TIME")]
    timeout: Option<Duration>,
    /// Bytes of text in the prompt
    #[arg(long, default_value_t = 256, value_name = "N")]
    prompt_bytes: usize,
    /// Different prompts, sent in turn
    #[arg(long, default_value_t = 1, value_name = "N")]
    prompts: u32,
    /// Of a prompt's bytes, so many at its start are the same in all
    #[arg(long, default_value_t = 0, value_name = "N")]
    shared_bytes: usize,
    /// Tokens that an answer may have; with --scenario no part asks for more
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
    #[arg(long, requires = "pids")]
    system_calls: bool,
    /// Threads that share the load
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: u16,
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

fn parse_speed(text: &str) -> Result<f64, String> {
    let speed = text.parse().ok();
    speed
        .filter(|speed: &f64| speed.is_finite() && *speed > 0.0)
        .ok_or_else(|| "expected a factor above 0".to_owned())
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
        threads: args.threads.into(),
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
        say(&format!("simulated upstream on {scheme}://{addr}\n"))?;
    }
    server.join();
    Ok(ExitCode::FAILURE)
}

fn run_load(args: &LoadArgs) -> Result<ExitCode> {
    let mut options = options::load_options(args)?;
    for path in [&args.html, &args.json].into_iter().flatten() {
        writable(path)?;
    }
    for pid in &options.pids {
        if Snapshot::read(*pid).is_none() {
            bail!("there is no process {pid} to measure");
        }
    }
    sys::allow_descriptors(options.connections as u64 + DESCRIPTORS_OVER);
    sys::catch_interrupts()?;
    let watched = args.progress || std::io::stderr().is_terminal();
    let report = crate::watch::watched(watched, &mut options, load::run)
        .with_context(|| format!("cannot load {}", args.url))?;
    let json = serde_json::to_string_pretty(&report)?;
    match &args.json {
        Some(path) if path.as_os_str() == "-" => say(&(json + "\n"))?,
        Some(path) => {
            std::fs::write(path, json + "\n").with_context(|| format!("cannot write {}", path.display()))?;
            say(&report.to_string())?;
        }
        None => say(&report.to_string())?,
    }
    let interrupted = report.interrupted;
    let sound = report.is_sound() || (args.overload && report.failures.total() == 0);
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
    Ok(match (interrupted, sound) {
        (true, _) => INTERRUPTED.into(),
        (false, true) => ExitCode::SUCCESS,
        (false, false) => ExitCode::FAILURE,
    })
}

/// Exit status of a run that a signal ended early: what shells make of SIGINT.
pub const INTERRUPTED: u8 = 130;
/// Descriptors of the load generator beyond its connections.
const DESCRIPTORS_OVER: u64 = 100;

/// Writes to standard output. A reader who has seen enough is no error.
pub fn say(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output")
        }
        _ => Ok(()),
    }
}

/// Finds out before a run whether its report can be written; what is there is left alone.
fn writable(path: &Path) -> Result<()> {
    if path.as_os_str() == "-" {
        return Ok(());
    }
    let opened = OpenOptions::new().create(true).append(true).open(path);
    opened
        .map(drop)
        .with_context(|| format!("cannot write {}", path.display()))
}

fn read_trace(path: &Path) -> Result<Trace> {
    Trace::parse(&read(path)?).map_err(|error| anyhow!("{}: {error}", path.display()))
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}
