//! The load generator against the simulated upstream: whole answers pass, and each fault shows as what it is.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use gateway_bench::load::{self, Failures, HangUp, Options, Report};
use gateway_bench::upstream::{self, Behaviour, Server, Stats};

fn server() -> Server {
    Server::start(upstream::Options::default()).expect("a server starts on a free port")
}

fn options(server: &Server, model: &str) -> Options {
    Options {
        url: format!("{}/v1/chat/completions", server.url()),
        model: model.to_owned(),
        requests: Some(4),
        connections: 2,
        timeout: Duration::from_secs(20),
        ..Options::default()
    }
}

fn run(options: &Options) -> Report {
    load::run(options).expect("the options are valid")
}

/// Waits until the counters are as wanted: a peer's close is seen a moment after it happened.
fn eventually(server: &Server, wanted: impl Fn(&Stats) -> bool) -> Stats {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let stats = server.stats();
        if wanted(&stats) {
            return stats;
        }
        assert!(Instant::now() < deadline, "{stats:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_thousand_streams_at_once_lose_nothing() {
    let server = server();
    let report = run(&Options {
        connections: 1000,
        requests: Some(1000),
        expect_tokens: Some(30),
        include_usage: true,
        ..options(&server, "sim:tokens=30,pace=20ms,first=1s")
    });
    assert!(report.is_sound(), "{report}");
    assert_eq!((report.ok, report.tokens), (1000, 30_000));
    // Role, tokens, finish reason, usage, end.
    assert_eq!(report.events, 1000 * 34);
    let stats = eventually(&server, |stats| stats.connections_open == 0);
    assert_eq!((stats.streams_completed, stats.tokens_sent), (1000, 30_000));
    assert_eq!((stats.streams_open, stats.streams_aborted), (0, 0));
}

#[test]
fn every_api_and_shape_is_whole() {
    let server = server();
    let words = [
        "",
        "pace=0,size=100",
        "crlf",
        "split=1",
        "split=7",
        "azure,comment=2",
        "reasoning=3",
        "unframed",
        "close",
    ];
    for path in ["chat/completions", "completions", "responses", "embeddings"] {
        for stream in [true, false] {
            for word in words {
                let model = format!("sim:tokens=5,pace=1ms,first=0,{word}");
                let report = run(&Options {
                    url: format!("{}/v1/{path}", server.url()),
                    stream,
                    expect_tokens: Some(5),
                    ..options(&server, &model)
                });
                assert!(
                    report.is_sound() && report.ok == 4,
                    "{path} {model} {stream}\n{report}"
                );
            }
        }
    }
}

#[test]
fn connections_are_kept() {
    let server = server();
    let report = run(&Options {
        requests: Some(50),
        ..options(&server, "sim:tokens=2,pace=0,first=0")
    });
    assert!(report.is_sound(), "{report}");
    assert_eq!(report.connections_opened, 2);
    let report = run(&Options {
        requests: Some(5),
        ..options(&server, "sim:tokens=2,pace=0,first=0,close")
    });
    assert_eq!((report.ok, report.connections_opened), (5, 5));
    let model = "sim:tokens=2,pace=0,first=0";
    let report = run(&Options {
        requests: Some(5),
        keep_alive: false,
        ..options(&server, model)
    });
    assert!(report.is_sound(), "{report}");
    assert_eq!((report.ok, report.connections_opened), (5, 5));
}

#[test]
fn each_fault_shows_as_itself() {
    let server = server();
    let four = |set: fn(&mut Failures)| {
        let mut failures = Failures::default();
        set(&mut failures);
        failures
    };
    let cases = [
        ("die=rst", four(|failures| failures.cut = 4)),
        ("die=rst,after=3", four(|failures| failures.cut = 4)),
        ("die=fin,after=0", four(|failures| failures.cut = 4)),
        ("die=fin,after=3", four(|failures| failures.cut = 4)),
        (
            "unframed,die=fin,after=3",
            four(|failures| failures.no_finish = 4),
        ),
        ("garbage", four(|failures| failures.malformed = 4)),
        ("badchunk,after=2", four(|failures| failures.malformed = 4)),
        ("error=0", four(|failures| failures.error_event = 4)),
        ("error=3", four(|failures| failures.error_event = 4)),
        ("done=off", four(|failures| failures.no_done = 4)),
        ("tokens=4", four(|failures| failures.mismatch = 4)),
    ];
    for (words, expected) in cases {
        let model = format!("sim:tokens=5,pace=1ms,first=1ms,{words}");
        let report = run(&Options {
            expect_tokens: Some(5),
            ..options(&server, &model)
        });
        assert_eq!(report.failures, expected, "{words}\n{report}");
        assert_eq!(report.requests, 4, "{words}");
    }
    eventually(&server, |stats| {
        stats.streams_open == 0 && stats.connections_open == 0
    });
}

#[test]
fn stalls_end_at_the_timeout() {
    let server = server();
    for words in ["die=stall", "die=stall,after=2", "slowhead=60s", "pace=60s"] {
        let model = format!("sim:tokens=5,pace=0,first=0,{words}");
        let report = run(&Options {
            timeout: Duration::from_millis(200),
            ..options(&server, &model)
        });
        assert_eq!(
            report.failures,
            Failures {
                timeout: 4,
                ..Failures::default()
            },
            "{words}"
        );
        // Who never answers is in the latencies, with the time that was waited.
        assert_eq!(report.total.count, 4, "{words}");
        assert!(report.total.p50_us >= 199_000, "{words}\n{report}");
    }
    // A stalled answer that the peer leaves is an aborted one.
    let stats = eventually(&server, |stats| stats.connections_open == 0);
    assert_eq!((stats.streams_aborted, stats.streams_open), (16, 0));
}

#[test]
fn statuses_are_counted_and_not_failures() {
    let server = server();
    for status in [429, 500, 503] {
        let report = run(&options(&server, &format!("sim:status={status}")));
        assert!(report.is_sound());
        assert_eq!(report.status.get(&status), Some(&4));
        assert_eq!((report.ok, report.connections_opened), (0, 2));
    }
    let report = run(&options(&server, "sim:colour=red"));
    assert_eq!(report.status.get(&400), Some(&4));
}

#[test]
fn refusals_are_failures_where_200_is_wanted() {
    let server = server();
    let wanting = |words: &str, expect_status| Options {
        requests: Some(20),
        parts: vec![load::Part {
            expect_status,
            expect_tokens: None,
            ..part("/v1/chat/completions", words, "", true)
        }],
        ..options(&server, words)
    };
    let report = run(&wanting("sim:status=401", Some(200)));
    assert_eq!((report.ok, report.failures.status), (0, 20), "{report}");
    let told = report.to_string();
    assert!(told.contains("nothing was answered with 200"), "{told}");
    assert!(
        told.contains("first answer not wanted: 401 {") && told.contains("error"),
        "{told}"
    );
    // Where 401 is wanted it is timed, and nothing is said of it.
    let report = run(&wanting("sim:status=401", Some(401)));
    assert!(report.is_sound(), "{report}");
    assert_eq!((report.total.count, report.first_refusal), (20, None));
    // Who refuses does not look fast.
    let report = run(&wanting("sim:tokens=1,pace=0,first=50ms,rpm=5", None));
    assert_eq!(
        (report.ok, report.total.count, report.not_timed),
        (5, 5, 15),
        "{report}"
    );
    assert!(report.total.p50_us >= 45_000, "{report}");
}

#[test]
fn what_the_open_loop_could_not_start_is_told() {
    let server = server();
    let report = run(&Options {
        rate: Some(100.0),
        requests: None,
        duration: Some(Duration::from_secs(1)),
        connections: 2,
        stream: false,
        ..options(&server, "sim:first=500ms")
    });
    assert_eq!(report.due, 100, "{report}");
    assert_eq!(report.due, report.requests + report.not_started, "{report}");
    assert!(report.not_started > 80 && !report.is_sound(), "{report}");
    assert!(report.to_string().contains("NEVER STARTED"), "{report}");
    // With connections enough all that was due is sent, the last one too.
    let report = run(&Options {
        rate: Some(200.0),
        requests: None,
        duration: Some(Duration::from_millis(500)),
        connections: 100,
        stream: false,
        ..options(&server, "sim:first=1ms")
    });
    assert!(report.is_sound(), "{report}");
    assert_eq!(
        (report.due, report.ok, report.not_started),
        (100, 100, 0),
        "{report}"
    );
}

#[test]
fn the_default_behaviour_can_change() {
    let server = server();
    let mut behaviour = Behaviour::default();
    behaviour.apply("status=503").unwrap();
    server.set_behaviour(behaviour);
    assert_eq!(run(&options(&server, "gpt-5")).status.get(&503), Some(&4));
}

#[test]
fn upstream_sees_hang_ups() {
    let server = server();
    let report = run(&Options {
        hang_up: Some(HangUp {
            after_tokens: 3,
            share_percent: 50,
        }),
        requests: Some(100),
        connections: 20,
        ..options(&server, "sim:tokens=10,pace=5ms,first=0")
    });
    assert!(report.is_sound(), "{report}");
    assert_eq!((report.hung_up, report.ok), (50, 50));
    let stats = eventually(&server, |stats| stats.streams_open == 0);
    assert_eq!((stats.streams_aborted, stats.streams_completed), (50, 50));
    assert!(stats.tokens_sent < 100 * 10);
}

#[test]
fn a_slow_reader_holds_the_upstream_back() {
    let server = server();
    let reader = Options {
        slow_reader: Some(20_000),
        requests: Some(1),
        connections: 1,
        timeout: Duration::from_millis(500),
        ..options(&server, "sim:tokens=1000000,pace=0,first=0,size=1000")
    };
    let report = run(&reader);
    assert_eq!(report.failures.timeout, 1, "{report}");
    let stats = eventually(&server, |stats| stats.streams_open == 0);
    assert_eq!(stats.streams_aborted, 1);
    // What was not read lies in socket buffers, which are bounded; without back-pressure it would be gigabytes.
    assert!(stats.tokens_sent < 30_000, "{stats:?}");
    assert!(report.bytes < 20_000, "{report}");
}

#[test]
fn stale_connections_are_closed_without_an_answer() {
    let server = server();
    for (words, connections) in [("stale=now", 4), ("stale", 2)] {
        let model = format!("sim:tokens=1,pace=0,first=0,{words}");
        let mut socket = TcpStream::connect(server.addr()).unwrap();
        let body = format!("{{\"model\":\"{model}\"}}");
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        socket.write_all(request.as_bytes()).unwrap();
        if connections == 2 {
            // The first answer leaves the connection open; the next request closes it.
            let mut answer = [0; 4096];
            assert!(socket.read(&mut answer).unwrap() > 0);
            socket.write_all(request.as_bytes()).unwrap();
        }
        let mut rest = Vec::new();
        // Unread input turns the close into a reset.
        let ended = socket.read_to_end(&mut rest);
        let text = String::from_utf8_lossy(&rest);
        assert!(!text.contains("connection: close"));
        assert_eq!(
            text.matches("200 OK").count(),
            usize::from(connections == 4),
            "{ended:?}"
        );
    }
}

#[test]
fn the_open_loop_counts_from_when_a_request_was_due() {
    let server = server();
    let report = run(&Options {
        rate: Some(200.0),
        requests: Some(20),
        connections: 1,
        stream: false,
        ..options(&server, "sim:first=20ms")
    });
    assert!(report.is_sound(), "{report}");
    assert_eq!(report.ok, 20);
    // One connection serves 50 a second where 200 are due: the last one is due at 95 ms and ends at 400 ms at the
    // earliest, though its own round trip takes 20 ms.
    assert!(report.total.max_us >= 280_000, "{report}");
    assert!(report.total.p50_us >= 100_000, "{report}");
    assert!(report.late_starts >= 18, "{report}");
}

#[test]
fn idle_streams_are_held_and_left() {
    let server = server();
    let report = run(&Options {
        connections: 200,
        idle: true,
        duration: Some(Duration::from_millis(50)),
        pids: vec![std::process::id()],
        ..options(&server, "sim:tokens=100,pace=1h,first=0")
    });
    assert!(report.is_sound(), "{report}");
    assert_eq!((report.open_streams, report.requests), (200, 0));
    assert!(report.processes[0].bytes_per_open_stream.is_some());
    let stats = eventually(&server, |stats| stats.streams_open == 0);
    assert_eq!(stats.streams_aborted, 200);
}

#[test]
fn nobody_listening_is_a_failure_to_connect() {
    let server = server();
    let options = options(&server, "sim");
    drop(server);
    let report = run(&options);
    assert_eq!(
        report.failures,
        Failures {
            connect: 4,
            ..Failures::default()
        }
    );
}

#[test]
fn many_endpoints_and_threads_share_the_counters() {
    let options = upstream::Options {
        endpoints: 3,
        threads: 2,
        ..upstream::Options::default()
    };
    let server = Server::start(options).unwrap();
    assert_eq!(server.addrs().len(), 3);
    for addr in server.addrs() {
        let report = run(&Options {
            url: format!("http://{addr}/v1/chat/completions"),
            connections: 8,
            requests: Some(16),
            ..options_of("sim:tokens=2,pace=1ms,first=0")
        });
        assert!(report.is_sound(), "{report}");
    }
    assert_eq!(server.stats().requests_by_endpoint, [16, 16, 16]);
}

fn options_of(model: &str) -> Options {
    Options {
        model: model.to_owned(),
        timeout: Duration::from_secs(20),
        ..Options::default()
    }
}

#[test]
fn the_last_request_can_be_read() {
    let server = server();
    let report = run(&Options {
        key: Some("sk-test".to_owned()),
        ..options(&server, "sim:tokens=1,first=0")
    });
    assert!(report.is_sound());
    let last = server.last();
    assert_eq!(
        last.target(),
        ("POST".to_owned(), "/v1/chat/completions".to_owned())
    );
    assert_eq!(last.header("Authorization").as_deref(), Some("Bearer sk-test"));
    let body: serde_json::Value = serde_json::from_slice(&last.body).unwrap();
    assert_eq!(body["model"], "sim:tokens=1,first=0");

    let mut socket = TcpStream::connect(server.addr()).unwrap();
    socket
        .write_all(b"GET /sim/last HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        .unwrap();
    // The connection ends as the request asked, or this would wait for ever.
    let mut text = String::new();
    socket.read_to_string(&mut text).unwrap();
    assert!(text.contains(&last.body_sha256()), "{text}");
}

#[test]
fn bodies_may_be_chunked_large_and_pipelined() {
    let server = server();
    let mut socket = TcpStream::connect(server.addr()).unwrap();
    let body = format!(
        "{{\"model\":\"sim:tokens=1,first=0\",\"prompt\":\"{}\"}}",
        "x".repeat(8 * 1024 * 1024)
    );
    let (left, right) = body.split_at(1000);
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{left}\r\n{:x}\r\n{right}\r\n0\r\n\r\n\
         GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
        left.len(),
        right.len()
    );
    socket.write_all(request.as_bytes()).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut answer = String::new();
    let mut piece = [0; 4096];
    while !answer.contains("\"owned_by\"") {
        let length = socket.read(&mut piece).unwrap();
        assert!(length > 0, "{answer}");
        answer.push_str(&String::from_utf8_lossy(&piece[..length]));
    }
    assert!(answer.contains("\"prompt_tokens\":2097152"), "{answer}");
    assert_eq!(server.last().body.len(), body.len());
}

#[test]
fn sources_are_used_in_turn() {
    let server = server();
    let report = run(&Options {
        sources: load::Sources::parse("127.0.0.0/8"),
        connections: 10,
        requests: Some(10),
        ..options(&server, "sim:tokens=1,pace=0,first=10ms")
    });
    assert!(report.is_sound(), "{report}");
}

const GEMINI: &str = "/v1beta/models/{model}:streamGenerateContent";

/// One part with its own path, as a mix has it.
fn part(path: &str, model: &str, words: &str, stream: bool) -> load::Part {
    load::Part {
        path: Some(path.replace("{model}", model)),
        model: model.to_owned(),
        stream,
        expect_tokens: Behaviour::default()
            .with_words(words)
            .unwrap()
            .tokens_fixed()
            .map(u64::from),
        ..load::Part::default()
    }
}

#[test]
fn every_dialect_is_whole_with_thinking_and_tools() {
    let server = server();
    let cases = [
        ("/v1/messages", true),
        ("/v1/messages", false),
        ("/v1beta/models/{model}:generateContent", false),
        (GEMINI, true),
        (&format!("{GEMINI}?alt=sse"), true),
    ];
    for (path, stream) in cases {
        for words in [
            "",
            "reasoning=3",
            "tools=2",
            "split=1",
            "crlf,comment=2",
            "unframed",
            "cached=2",
            "stamp",
        ] {
            let words = format!("tokens=5,pace=1ms,first=0,{words}");
            server.set_model("m", &words).unwrap();
            let report = run(&Options {
                parts: vec![part(path, "m", &words, stream)],
                ..options(&server, "m")
            });
            assert!(
                report.is_sound() && report.ok == 4,
                "{path} {words} {stream}\n{report}"
            );
            assert_eq!(
                report.tokens,
                if stream { 20 } else { report.tokens },
                "{path} {words}"
            );
        }
    }
}

#[test]
fn each_dialect_shows_its_faults() {
    let server = server();
    for path in ["/v1/messages", GEMINI, "/v1/chat/completions"] {
        for (words, expected) in [
            ("die=fin,after=3", |failures: &Failures| failures.cut),
            ("error=2", |failures: &Failures| failures.error_event),
            ("badchunk,after=2", |failures: &Failures| failures.malformed),
        ] as [(&str, fn(&Failures) -> u64); 3]
        {
            let words = format!("tokens=5,pace=1ms,first=0,{words}");
            server.set_model("m", &words).unwrap();
            let report = run(&Options {
                parts: vec![part(path, "m", &words, true)],
                ..options(&server, "m")
            });
            assert_eq!(
                (expected(&report.failures), report.failures.total()),
                (4, 4),
                "{path} {words}\n{report}"
            );
        }
    }
}

#[test]
fn faults_come_at_their_rate() {
    let server = server();
    let report = run(&Options {
        requests: Some(1000),
        connections: 20,
        ..options(&server, "sim:tokens=3,pace=0,first=0,fault=503@0.2,fault=rst@0.1")
    });
    let refused = report.status.get(&503).copied().unwrap_or(0);
    assert!((140..260).contains(&refused), "{report}");
    assert!((60..145).contains(&report.failures.cut), "{report}");
    assert_eq!(report.failures.total(), report.failures.cut, "{report}");
}

#[test]
fn a_provider_keeps_its_limits() {
    let server = server();
    let report = run(&Options {
        requests: Some(20),
        ..options(&server, "sim:tokens=1,pace=0,first=0,rpm=5")
    });
    assert_eq!((report.ok, report.status.get(&429)), (5, Some(&15)), "{report}");
}

/// The answer to one request, whole.
fn answer(server: &Server, line: &str, body: &str) -> String {
    let mut socket = TcpStream::connect(server.addr()).unwrap();
    let request = format!(
        "{line} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    socket.write_all(request.as_bytes()).unwrap();
    let mut text = String::new();
    socket.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn providers_tell_their_limits_and_models_in_their_own_ways() {
    let server = server();
    server.set_model("m", "tokens=1,pace=0,first=0,rpm=1").unwrap();
    server.set_model("g", "tokens=1,pace=0,first=0,rpm=1").unwrap();
    let messages = || {
        let body = "{\"model\":\"m\",\"max_tokens\":9,\"messages\":[]}";
        answer(&server, "POST /v1/messages", body)
    };
    messages();
    let refused = messages();
    assert!(
        refused.starts_with("HTTP/1.1 429") && refused.contains("rate_limit_error"),
        "{refused}"
    );
    let reset = refused
        .lines()
        .find_map(|line| line.strip_prefix("anthropic-ratelimit-requests-reset: "))
        .expect("it tells when");
    assert!(reset.len() == 20 && reset.ends_with('Z'), "{reset}");
    let gemini = || {
        answer(
            &server,
            "POST /v1beta/models/g:generateContent",
            "{\"contents\":[]}",
        )
    };
    gemini();
    let refused = gemini();
    assert!(
        refused.starts_with("HTTP/1.1 429") && refused.contains("google.rpc.RetryInfo"),
        "{refused}"
    );
    let models = answer(&server, "GET /v1/models", "");
    let listed: Vec<usize> = ["\"sim\"", "\"g\"", "\"m\""]
        .iter()
        .map(|name| models.find(name).expect("it is listed"))
        .collect();
    assert!(listed.is_sorted(), "{models}");
}

#[test]
fn a_cached_prefix_answers_sooner() {
    let server = server();
    let words = "tokens=1,pace=0,first=0,kv=10000,prefill=200ms";
    server.set_model("m", words).unwrap();
    let mut cold = part("/v1/chat/completions", "m", words, true);
    (cold.prompt_bytes, cold.shared_bytes) = (4000, 4000);
    let options = Options {
        requests: Some(1),
        connections: 1,
        parts: vec![cold],
        ..options(&server, "m")
    };
    // 1,000 tokens at 200 ms for each thousand; then none but the last block's.
    let (first, second) = (run(&options), run(&options));
    assert!(first.ttft.p50_us > 150_000, "{first}");
    assert!(second.ttft.p50_us < first.ttft.p50_us, "{second}");
}

#[test]
fn a_mix_keeps_weights_keys_and_statuses_apart() {
    let server = server();
    server.set_model("a", "tokens=2,pace=0,first=0").unwrap();
    server.set_model("b", "status=401").unwrap();
    let parts = vec![
        load::Part {
            name: "a".to_owned(),
            weight: 3,
            expect_status: Some(200),
            ..part("/v1/chat/completions", "a", "tokens=2", true)
        },
        load::Part {
            name: "b".to_owned(),
            expect_status: Some(401),
            key: Some("wrong".to_owned()),
            ..part("/v1/chat/completions", "b", "", false)
        },
    ];
    let mut options = Options {
        requests: Some(400),
        connections: 8,
        threads: 2,
        parts,
        ..options(&server, "a")
    };
    let report = run(&options);
    assert!(report.is_sound() && report.requests == 400, "{report}");
    assert!((230..370).contains(&report.parts[0].ok), "{report}");
    assert_eq!(report.parts[1].requests, report.status[&401], "{report}");
    options.parts[1].expect_status = Some(200);
    let report = run(&options);
    assert_eq!(report.failures.status, report.status[&401], "{report}");
}

#[test]
fn held_streams_stay_while_others_run() {
    let server = server();
    server.set_model("idle", "tokens=10,pace=1h,first=0").unwrap();
    server
        .set_model("busy", "tokens=5,pace=1ms,first=0,stamp")
        .unwrap();
    let held = load::Part {
        hold: true,
        connections: Some(50),
        ..part("/v1/chat/completions", "idle", "tokens=10", true)
    };
    let report = run(&Options {
        requests: None,
        duration: Some(Duration::from_millis(300)),
        connections: 4,
        parts: vec![held, part("/v1/chat/completions", "busy", "tokens=5", true)],
        ..options(&server, "idle")
    });
    assert!(report.is_sound(), "{report}");
    assert_eq!(report.open_streams, 50, "{report}");
    assert!(report.parts[1].ok > 0 && report.delay.count > 0, "{report}");
    assert!(report.series.len() >= 2 && !report.curves.delay.is_empty());
}

#[test]
fn a_trace_is_sent_as_it_was_recorded() {
    let server = server();
    server.set_model("m", "tokens=1000,pace=0,first=0").unwrap();
    let rows: String = (0..10)
        .map(|row| {
            format!(
                "{{\"at_ms\":{},\"prompt_tokens\":50,\"output_tokens\":{}}}\n",
                row * 40,
                row + 1
            )
        })
        .collect();
    let report = run(&Options {
        requests: None,
        duration: Some(Duration::from_secs(30)),
        connections: 10,
        trace: Some(load::Trace::parse(&rows).unwrap().at_speed(2.0)),
        ..options(&server, "m")
    });
    assert!(report.is_sound(), "{report}");
    assert_eq!((report.ok, report.tokens), (10, 55), "{report}");
    assert!(server.last().body.len() > 200);
}

#[test]
fn a_fleet_behind_tls_is_whole() {
    let server = Server::start(upstream::Options {
        tls: Some(upstream::Tls::self_signed().unwrap()),
        ..upstream::Options::default()
    })
    .unwrap();
    for (words, stream) in [
        ("tokens=50,pace=0,first=0,size=2000", true),
        ("tokens=9,first=0", false),
    ] {
        for keep_alive in [true, false] {
            let report = run(&Options {
                stream,
                keep_alive,
                requests: Some(20),
                ..options(&server, &format!("sim:{words}"))
            });
            assert!(
                report.is_sound() && report.ok == 20,
                "{words} {keep_alive}\n{report}"
            );
        }
    }
}

#[test]
fn real_answers_are_checked_for_their_shape() {
    let server = server();
    // Tokens that are not the simulator's: what a token says is not looked at, an end that is missing is.
    let shaped = |model: &str| {
        run(&Options {
            parts: vec![load::Part {
                model: model.to_owned(),
                check: load::Check::Shape,
                expect_tokens: Some(99),
                ..load::Part::default()
            }],
            ..options(&server, model)
        })
    };
    let report = shaped("sim:tokens=5,pace=0,first=0");
    assert!(report.is_sound() && report.tokens == 20, "{report}");
    assert_eq!(shaped("sim:tokens=5,pace=0,first=0,done=off").failures.no_done, 4);
}
