//! The demo's steps. Each says what it shows, and fails where the gateway does otherwise.

use std::{
    io::{self, Write},
    net::Ipv4Addr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use serde_json::Value;

use super::{client, stage::Stage};
use crate::{dialect::Usage, ledger, ledger::record::Record};

/// Where the well-behaved client connects from.
const CLIENT: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// Where the client connects from that does not take no for an answer.
const OFFENDER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 66);

/// Tokens of the demo's stream.
const TOKENS: usize = 24;

/// Refusals after which the demo's configuration has a client dropped, and some more for the block to take effect.
const REFUSALS_MAX: usize = 200;

/// A streaming chat request of so many tokens.
pub fn request_body(tokens: usize) -> String {
    format!(
        r#"{{"model": "fast", "stream": true, "max_tokens": {tokens}, "messages": [{{"role": "user", "content": "Hello"}}]}}"#
    )
}

/// All steps in turn.
pub fn walk(stage: &Stage) -> anyhow::Result<()> {
    println!(
        "A simulated fleet at {}, the gateway at http://{}.\n",
        stage.fleet, stage.gateway
    );
    let id = stream(stage).context("step 1")?;
    let record = books(stage, &id).context("step 2")?;
    limits(stage, &record).context("step 3")?;
    refusal(stage).context("step 4")?;
    kernel(stage).context("step 5")
}

/// A streamed answer, token by token.
fn stream(stage: &Stage) -> anyhow::Result<String> {
    println!("1. A streaming chat request, as any OpenAI client sends it:\n");
    print!("   ");
    let began = Instant::now();
    let mut arrivals = Vec::new();
    let mut seen = 0;
    let mut text = Vec::new();
    let answer = client::request(
        CLIENT,
        stage.gateway,
        &stage.key,
        "POST",
        "/v1/chat/completions",
        &request_body(TOKENS),
        |part| {
            text.extend_from_slice(part);
            let tokens = tokens_of(&text);
            for token in &tokens[seen..] {
                print!("{token}");
                let _ = io::stdout().flush();
                arrivals.push(began.elapsed());
            }
            seen = tokens.len();
        },
    )?;
    println!("\n");
    ensure!(answer.status == 200, "status {}", answer.status);
    ensure!(
        arrivals.len() == TOKENS,
        "{} of {TOKENS} tokens came",
        arrivals.len()
    );
    ensure!(
        answer.body.ends_with(b"data: [DONE]\n\n"),
        "the stream has no end"
    );
    ensure!(
        !contains(&answer.body, b"\"usage\":{"),
        "a usage event that nobody asked for"
    );
    let spread = arrivals[TOKENS - 1] - arrivals[0];
    ensure!(
        spread > Duration::from_millis(100),
        "the tokens came in one piece"
    );
    let first = arrivals[0].as_millis();
    println!(
        "   {TOKENS} tokens, the first after {first} ms, the rest over {} ms, as the fleet made them.",
        spread.as_millis()
    );
    let id = answer
        .field("x-request-id")
        .context("no x-request-id")?
        .to_string();
    println!("   x-request-id: {id}\n");
    Ok(id)
}

/// The content of each chunk so far.
fn tokens_of(stream: &[u8]) -> Vec<String> {
    let events = String::from_utf8_lossy(stream).into_owned();
    // The last piece may be cut: only what an empty line ends is an event.
    let whole = events.rsplit_once("\n\n").map_or("", |(whole, _)| whole);
    let data = whole
        .split("\n\n")
        .filter_map(|event| event.strip_prefix("data: "));
    let chunks = data.filter_map(|data| serde_json::from_str::<Value>(data).ok());
    let content =
        chunks.filter_map(|chunk| Some(chunk["choices"][0]["delta"]["content"].as_str()?.to_string()));
    content.filter(|token| !token.is_empty()).collect()
}

/// The ledger's record of it, with the usage that the client did not ask for and the gateway did.
fn books(stage: &Stage, id: &str) -> anyhow::Result<Record> {
    let record = ledger::read::records(&stage.state).find(|record| record.id.to_string() == id);
    let record = record.context("the ledger has no record of it")?;
    let Usage {
        prompt, completion, ..
    } = record.usage;
    ensure!(
        completion == TOKENS as u64,
        "the ledger says {completion} output tokens"
    );
    println!(
        "2. The ledger's record, made before the answer's last byte left (a killed process does not lose it):\n"
    );
    println!(
        "   key {}  model {}  provider {}  upstream model {}",
        record.key, record.model, record.provider, record.upstream_model
    );
    println!(
        "   {prompt} input tokens, {completion} output tokens, status {}, first token after {} ms, {} ms in all\n",
        record.status,
        record.ttft_us / 1000,
        record.duration_us / 1000
    );
    Ok(record)
}

/// What the key has left: what was used is gone, what was reserved beyond it is back.
fn limits(stage: &Stage, record: &Record) -> anyhow::Result<()> {
    let answer = client::request(
        CLIENT,
        stage.gateway,
        &stage.key,
        "POST",
        "/v1/chat/completions",
        &request_body(1),
        |_| {},
    )?;
    let number = |name| answer.field(name).and_then(|value| value.parse::<u64>().ok());
    let limit = number("x-ratelimit-limit-tokens").context("no x-ratelimit-limit-tokens")?;
    let left = number("x-ratelimit-remaining-tokens").context("no x-ratelimit-remaining-tokens")?;
    ensure!(
        left < limit && left + record.usage.total() + 1_000 > limit,
        "{left} of {limit} left"
    );
    println!("3. What the key has left, as the next answer's headers say:\n");
    println!("   {left} of {limit} tokens a minute\n");
    Ok(())
}

/// What a client over its limit gets.
fn refusal(stage: &Stage) -> anyhow::Result<()> {
    println!("4. Another client, at {OFFENDER}, may do two requests a minute and tries a third:\n");
    let ask = || {
        client::request(
            OFFENDER,
            stage.gateway,
            &stage.small_key,
            "POST",
            "/v1/chat/completions",
            &request_body(1),
            |_| {},
        )
    };
    ensure!(
        ask()?.status == 200 && ask()?.status == 200,
        "the first two must be answered"
    );
    let refused = ask()?;
    ensure!(refused.status == 429, "status {}", refused.status);
    let wait = refused.field("retry-after").context("no Retry-After")?;
    let error: Value = serde_json::from_slice(&refused.body)?;
    let message = error["error"]["message"]
        .as_str()
        .context("no OpenAI error object")?;
    println!("   HTTP 429, Retry-After: {wait}, {message}\n");
    Ok(())
}

/// The same client does not stop asking, and is dropped before it costs anything.
fn kernel(stage: &Stage) -> anyhow::Result<()> {
    let loaded = kernel_status(stage)?;
    if loaded["loaded"] != true {
        println!(
            "5. The kernel plane is off here ({}), so the client goes on getting 429.\n",
            loaded["reason"]
        );
        return Ok(());
    }
    println!(
        "5. It goes on asking. Ten refusals make it an offender; moments later the kernel drops it, before TLS, HTTP or JSON:\n"
    );
    let mut refusals = 0;
    let dropped = loop {
        let asked = client::request(
            OFFENDER,
            stage.gateway,
            &stage.small_key,
            "POST",
            "/v1/chat/completions",
            &request_body(1),
            |_| {},
        );
        match asked {
            Ok(answer) => ensure!(answer.status == 429, "status {}", answer.status),
            Err(error) => break error,
        }
        refusals += 1;
        ensure!(refusals < REFUSALS_MAX, "the kernel does not drop it");
        thread::sleep(Duration::from_millis(2));
    };
    let after = kernel_status(stage)?;
    let count = after["dropped"].as_u64().unwrap_or(0);
    ensure!(
        count > loaded["dropped"].as_u64().unwrap_or(0),
        "the drop counter did not move: {dropped:#}"
    );
    println!("   refused {refusals} more times, then: {dropped:#}");
    println!("   connection attempts dropped by the kernel: {count}");
    let other = client::request(CLIENT, stage.gateway, &stage.key, "GET", "/v1/models", "", |_| {})?;
    ensure!(
        other.status == 200,
        "others must be served: status {}",
        other.status
    );
    println!("   meanwhile {CLIENT} is served as before\n");
    Ok(())
}

/// `GET /kernel` of the admin API.
fn kernel_status(stage: &Stage) -> anyhow::Result<Value> {
    let token = std::fs::read_to_string(stage.state.join("admin.token")).context("no admin token")?;
    let answer = client::request(CLIENT, stage.admin, token.trim(), "GET", "/kernel", "", |_| {})?;
    ensure!(answer.status == 200, "the admin API answers {}", answer.status);
    Ok(serde_json::from_slice(&answer.body)?)
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    memchr::memmem::find(text, part).is_some()
}
