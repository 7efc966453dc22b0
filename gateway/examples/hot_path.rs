//! The hot path's functions one by one, for counting their instructions:
//! `cargo run --release -p gateway --example hot_path -- CASE REPETITIONS`; without arguments it lists the cases.
//! `perf/instructions.sh` runs it under callgrind and compares with the committed baseline.

use std::{hint::black_box, path::Path, process::ExitCode};

use gateway::{
    config,
    dialect::{Api, meter::Meter, request::Call, usage},
    http::{
        chunked::{CHUNK_HEAD_BYTES_MAX, ChunkedDecoder, frame_in_place, write_chunk_head},
        head::{Method, RequestHead, ResponseHead},
    },
    serve::snapshot::{Registry, Snapshot},
};
use sha2::{Digest, Sha256};

/// What a program of an SDK sends: ten fields.
const REQUEST: &[u8] =
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway:8080\r\nAccept: application/json\r\n\
    Content-Type: application/json\r\nUser-Agent: OpenAI/Python 1.99.0\r\nX-Stainless-Lang: python\r\n\
    X-Stainless-Async: false\r\nX-Stainless-Runtime: CPython\r\nAuthorization: Bearer sk-bench\r\n\
    Content-Length: 1024\r\n\r\n";

/// What a server answers a stream with.
const RESPONSE: &[u8] = b"HTTP/1.1 200 OK\r\ndate: Sat, 21 Nov 2026 10:00:00 GMT\r\nserver: uvicorn\r\n\
    cache-control: no-cache\r\ncontent-type: text/event-stream; charset=utf-8\r\nx-accel-buffering: no\r\n\
    transfer-encoding: chunked\r\n\r\n";

/// An event as vLLM sends it: 220 bytes with its empty line.
const EVENT: &[u8] = b"data: {\"id\":\"chatcmpl-0123456789abcdef0123456789abcdef\",\"object\":\"chat.completion.chunk\",\
    \"created\":1760000000,\"model\":\"llama-3.3-70b\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" token\"},\
    \"logprobs\":null,\"finish_reason\":null}]}\n\n";

/// The event that tells the usage.
const USAGE: &[u8] = b"data: {\"id\":\"chatcmpl-0123456789abcdef0123456789abcdef\",\"object\":\"chat.completion.chunk\",\
    \"created\":1760000000,\"model\":\"llama-3.3-70b\",\"choices\":[],\"usage\":{\"prompt_tokens\":1000,\"total_tokens\":1200,\
    \"completion_tokens\":200,\"prompt_tokens_details\":{\"cached_tokens\":400}}}\n\n";

/// One function of the hot path, prepared; the number is how often it runs.
type Case = (&'static str, fn(u64));

const CASES: [Case; 11] = [
    ("request_head", request_head),
    ("response_head", response_head),
    ("key_lookup", key_lookup),
    ("call_1KiB", |times| call(1, times)),
    ("call_32KiB", |times| call(32, times)),
    ("call_256KiB", |times| call(256, times)),
    ("event_passed", |times| event(false, times)),
    ("event_held", |times| event(true, times)),
    ("events_16_in_a_read", events),
    ("usage_event", usage_event),
    ("usage_of_answer", usage_of_answer),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let case = CASES
        .iter()
        .find(|(name, _)| arguments.first().is_some_and(|wanted| wanted == name));
    let times = arguments.get(1).and_then(|times| times.parse().ok());
    match (case, times) {
        (Some((_, run)), Some(times)) => {
            run(times);
            ExitCode::SUCCESS
        }
        _ if arguments.is_empty() => {
            CASES.iter().for_each(|(name, _)| println!("{name}"));
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("usage: hot_path CASE REPETITIONS; without arguments: the cases");
            ExitCode::from(2)
        }
    }
}

fn request_head(times: u64) {
    let mut head = RequestHead::new();
    for _ in 0..times {
        head.reset();
        assert!(head.parse(black_box(REQUEST)).is_ok_and(|whole| whole));
        black_box(head.field(REQUEST, "authorization"));
    }
}

fn response_head(times: u64) {
    let mut head = ResponseHead::new();
    for _ in 0..times {
        head.reset();
        assert!(
            head.parse(black_box(RESPONSE), Method::Post)
                .is_ok_and(|whole| whole)
        );
    }
}

fn key_lookup(times: u64) {
    // SHA-256 of "sk-bench".
    let text = "
listeners: [{ address: 127.0.0.1:0 }]
providers: { fleet: { kind: openai, endpoints: [http://127.0.0.1:9] } }
models: [{ name: fast, targets: [{ provider: fleet }] }]
keys: [{ name: bench, sha256: SHA }]
";
    let sha = config::sha256_hex(&config::key_hash("sk-bench"));
    let text = text.replace("SHA", &sha);
    let config = config::parse(&text, "hot_path", Path::new("."), &|_| None).expect("a configuration");
    let snapshot = Snapshot::build(&config, &mut Registry::default()).expect("a snapshot");
    for _ in 0..times {
        let hash: [u8; 32] = Sha256::digest(black_box(b"sk-bench")).into();
        assert!(snapshot.key(&hash).is_some());
    }
}

/// A request with a prompt of that size; the model first, as SDKs write it.
fn call(kib: usize, times: u64) {
    let word = "Read this and tell me what it says. \\n";
    let prompt = word.repeat(kib * 1024 / word.len());
    let body = format!(
        r#"{{"messages":[{{"role":"system","content":"Be short."}},{{"role":"user","content":"{prompt}"}}],"model":"fast","max_tokens":256,"stream":true,"temperature":0.7}}"#
    );
    for _ in 0..times {
        let call = Call::parse(Api::ChatCompletions, black_box(body.as_bytes())).expect("a call");
        black_box(call.pieces(body.as_bytes(), b"\"llama-3.3-70b\""));
    }
}

/// One read of a stream: chunk framing off, the event metered, framed again.
fn event(hold: bool, times: u64) {
    reads(&[EVENT], hold, times);
}

/// A read that brings sixteen events, as under load.
fn events(times: u64) {
    reads(&[EVENT; 16], false, times);
}

fn reads(events: &[&[u8]], hold: bool, times: u64) {
    let read: Vec<u8> = events.iter().flat_map(|event| chunk(event)).collect();
    let mut decoder = ChunkedDecoder::new();
    let mut meter = Meter::new(Api::ChatCompletions, hold);
    let mut scratch = vec![0; CHUNK_HEAD_BYTES_MAX + read.len() + 2];
    let at = CHUNK_HEAD_BYTES_MAX;
    for _ in 0..times {
        scratch[at..at + read.len()].copy_from_slice(black_box(&read));
        let decoded = decoder.decode(&mut scratch[at..at + read.len()]).expect("chunks");
        let payload = at + decoded.payload.start..at + decoded.payload.end;
        let kept = meter.feed(&mut scratch[payload.clone()]);
        let kept = payload.start + kept.start..payload.start + kept.end;
        black_box(frame_in_place(&mut scratch, kept));
    }
    assert_eq!(meter.seen.events, times * events.len() as u64);
}

fn chunk(event: &[u8]) -> Vec<u8> {
    let mut line = [0; CHUNK_HEAD_BYTES_MAX];
    [write_chunk_head(event.len(), &mut line), event, b"\r\n"].concat()
}

fn usage_event(times: u64) {
    let mut meter = Meter::new(Api::ChatCompletions, false);
    let mut event = USAGE.to_vec();
    for _ in 0..times {
        black_box(meter.feed(black_box(&mut event)));
    }
    assert_eq!(meter.seen.usage.map(|usage| usage.completion), Some(200));
}

/// A whole answer of 1 KiB.
fn usage_of_answer(times: u64) {
    let text = "So it goes. ".repeat(60);
    let body = format!(
        r#"{{"id":"chatcmpl-1","object":"chat.completion","model":"m","choices":[{{"index":0,"message":{{"role":"assistant","content":"{text}"}},"finish_reason":"stop"}}],"usage":{{"prompt_tokens":10,"completion_tokens":200,"total_tokens":210}}}}"#
    );
    for _ in 0..times {
        let usage = usage::find(Api::ChatCompletions, black_box(body.as_bytes())).expect("a usage");
        assert_eq!(usage.completion, 200);
    }
}
