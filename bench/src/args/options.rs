//! What the options of `load` say to the load generator.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use gateway_bench::load::{self, Arrivals, Check, HangUp, Part, Trust};
use gateway_bench::scenario::Scenario;
use gateway_bench::upstream::Behaviour;

use super::{LoadArgs, read, read_trace};

/// What the load generator is to do.
pub(super) fn load_options(args: &LoadArgs) -> Result<load::Options> {
    let trust = match &args.ca {
        Some(path) => {
            let pem = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            Some(Trust::Authorities(pem))
        }
        None => None,
    };
    let base = match &args.scenario {
        Some(path) => of_scenario(args, &Scenario::read(path)?)?,
        None => of_options(args)?,
    };
    let base = loop_of(args, base)?;
    let is_open_loop = base.rate.is_some() || base.trace.is_some() || !base.stages.is_empty();
    let connections = match (&args.scenario, is_open_loop) {
        (Some(_), _) => base.connections,
        (None, true) => OPEN_LOOP_CONNECTIONS,
        (None, false) => 1,
    };
    Ok(load::Options {
        key: args.key.clone(),
        connections: args.idle.or(args.connections).unwrap_or(connections),
        keep_alive: base.keep_alive && !args.no_keep_alive,
        requests: args.requests,
        warm_up: args.warm_up.unwrap_or(base.warm_up),
        ramp: args.ramp.unwrap_or(base.ramp),
        timeout: args.timeout.unwrap_or(base.timeout),
        sources: args.source.or(base.sources),
        trust,
        tls_resume: base.tls_resume || args.tls_resume,
        pids: args.pids.clone(),
        idle: args.idle.is_some(),
        keys: match &args.keys {
            Some(path) => read_keys(path)?,
            None => Vec::new(),
        },
        headers: args.headers.clone(),
        count_system_calls: args.system_calls.then_some(Duration::from_secs(1)),
        threads: args.threads.into(),
        seed: args.seed,
        ..base
    })
}

/// When requests start: as `base` does where the options do not say it.
fn loop_of(args: &LoadArgs, base: load::Options) -> Result<load::Options> {
    let duration = until(args, &base);
    let arrivals = if args.poisson {
        Arrivals::Poisson
    } else {
        base.arrivals
    };
    let timed = load::Options {
        duration,
        arrivals,
        ..base
    };
    if args.rate.is_none() && args.stages.is_empty() && args.trace.is_none() {
        return Ok(timed);
    }
    Ok(load::Options {
        rate: args.rate,
        stages: args.stages.clone(),
        trace: match &args.trace {
            Some(path) => Some(read_trace(path)?.at_speed(args.speed)),
            None => None,
        },
        ..timed
    })
}

/// Requests that may be under way in the open loop, where nobody says it: fewer, and what is measured is their queue.
const OPEN_LOOP_CONNECTIONS: usize = 1000;

/// How long requests are started, warm-up included.
fn until(args: &LoadArgs, base: &load::Options) -> Option<Duration> {
    if args.duration.is_some() || args.idle.is_some() {
        return args.duration;
    }
    if !args.stages.is_empty() {
        return Some(args.stages.iter().map(|stage| stage.time).sum());
    }
    match (args.requests, &args.trace, base.duration) {
        (Some(_), _, _) => None,
        (None, Some(_), _) => Some(TRACE_MOST),
        // The scenario's window is as long as it says, whatever the warm-up.
        (None, None, Some(whole)) => Some(whole - base.warm_up + args.warm_up.unwrap_or(base.warm_up)),
        (None, None, None) => Some(Duration::from_secs(10)),
    }
}

/// A trace ends by itself.
const TRACE_MOST: Duration = Duration::from_secs(30 * 86_400);

fn read_keys(path: &Path) -> Result<Vec<String>> {
    let text = read(path)?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let keys: Vec<String> = lines.map(str::to_owned).collect();
    if keys.is_empty() {
        bail!("there is no key in {}", path.display());
    }
    Ok(keys)
}

/// The one part that the options describe.
fn of_options(args: &LoadArgs) -> Result<load::Options> {
    let model = match (&args.model, model_in(&args.url)) {
        (Some(model), Some(named)) if model != named && named != "{model}" => {
            bail!(
                "the URL names the model {named}, --model {model}: leave one out, or write {{model}} in the URL"
            )
        }
        (Some(model), _) => model.as_str(),
        (None, Some(named)) if named != "{model}" => named,
        (None, _) => "sim",
    };
    let part = Part {
        check: check(args),
        prompts: args.prompts,
        shared_bytes: args.shared_bytes,
        hold: args.idle.is_some(),
        model: model.to_owned(),
        stream: !args.plain,
        prompt_bytes: args.prompt_bytes,
        max_tokens: args.max_tokens,
        include_usage: args.include_usage,
        expect_tokens: args.expect_tokens.or_else(|| tokens_of(model, args.max_tokens)),
        expect_status: (!args.any_status).then_some(200),
        hang_up: args.hang_up_after.map(|after_tokens| HangUp {
            after_tokens,
            share_percent: args.hang_up_share,
        }),
        slow_reader: args.slow_reader,
        ..Part::default()
    };
    Ok(load::Options {
        url: args.url.clone(),
        model: model.to_owned(),
        parts: vec![part],
        ..load::Options::default()
    })
}

/// What a scenario says, as far as the options let it.
fn of_scenario(args: &LoadArgs, scenario: &Scenario) -> Result<load::Options> {
    let model = |index: usize| match &args.model {
        Some(model) => model.clone(),
        None => format!("sim:{}", scenario.parts[index].behaviour),
    };
    let mut options = scenario.load(&args.url, None, None, model)?;
    for part in &mut options.parts {
        part.check = check(args);
        if args.any_status {
            part.expect_status = None;
        }
        if args.real {
            part.expect_tokens = None;
        }
        if let Some(most) = args.max_tokens {
            part.limit_tokens(most);
        }
    }
    Ok(options)
}

fn check(args: &LoadArgs) -> Check {
    if args.real { Check::Shape } else { Check::Tokens }
}

/// The model that an URL of Gemini's API names.
fn model_in(url: &str) -> Option<&str> {
    let (_, rest) = url.split_once("/models/")?;
    Some(rest.rsplit_once(':')?.0)
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
