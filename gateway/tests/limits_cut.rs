//! Running streams that a limit ends, and what is never leaked by how a request ends.

mod support;

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    sync::mpsc,
    thread,
    time::Duration,
};

use gateway::ledger::record::{Flags, Outcome};
use serde_json::Value;
use support::{
    Gateway, Setup,
    client::{Client, chat},
    eventually, fleet,
};

const CHAT: &str = "/v1/chat/completions";

/// Lines of `prices` that make every token of the simulator a thousandth of a dollar.
const PRICES: &str = "prices:\n  - { provider: \"*\", model: \"*\", input: 1000, output: 1000 }\n";

fn events(body: &str) -> Vec<Value> {
    body.split("\n\n")
        .filter_map(|event| event.lines().find_map(|line| line.strip_prefix("data: ")))
        .filter(|data| *data != "[DONE]")
        .map(|data| serde_json::from_str(data).unwrap_or_else(|_| panic!("{data}")))
        .collect()
}

/// The events of a stream that ended properly.
fn stream(gateway: &Gateway, path: &str, body: &str) -> (String, Vec<Value>) {
    let mut client = Client::connect(gateway.addr());
    client.post(path, body);
    let answer = client.answer();
    assert_eq!(answer.status, 200, "{}", answer.text());
    let text = answer.text();
    let told = events(&text);
    (text, told)
}

fn texts(events: &[Value]) -> usize {
    let text = |event: &&Value| {
        event["choices"][0]["delta"]["content"]
            .as_str()
            .is_some_and(|text| !text.is_empty())
    };
    events.iter().filter(text).count()
}

#[test]
fn a_stream_ends_when_its_limit_is_used_up_and_its_upstream_with_it() {
    // Half a minute of tokens; the gateway ends it long before.
    let fleet = fleet("tokens=3000,pace=10ms,first=0");
    let gateway = Setup::new(fleet.url())
        .limits("  - { name: tight, output_tokens: 40, every: 1mo }")
        .start();
    let (text, told) = stream(&gateway, CHAT, &chat("fast", true));
    assert!(text.trim_end().ends_with("data: [DONE]"), "{text}");
    let last = told.last().expect("events");
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    assert_eq!(last["gateway"]["cut"], "limit");
    assert_eq!(last["gateway"]["policy"], "tight");
    assert_eq!((&last["id"], &last["model"]), (&told[0]["id"], &told[0]["model"]));
    // One event more than there was, at most.
    assert!((35..=41).contains(&texts(&told)), "{}", texts(&told));
    let record = &gateway.await_records(1)[0];
    assert!(record.flags.has(Flags::CUT) && record.flags.has(Flags::STREAM));
    assert_eq!((record.outcome, record.status), (Outcome::Complete, 200));
    assert!((39..=42).contains(&record.usage.completion), "{:?}", record.usage);
    eventually("the upstream to be let go", || {
        (fleet.stats().streams_open == 0).then_some(())
    });
    let mut client = Client::connect(gateway.addr());
    client.post(CHAT, &chat("fast", true));
    assert_eq!(client.answer().status, 429);
    let metrics = gateway.admin("GET /metrics", "").text().to_string();
    assert!(metrics.contains("gateway_limit_cuts_total 1"), "{metrics}");
}

#[test]
fn who_asked_for_usage_gets_it_and_budgets_cut_like_limits() {
    let fleet = fleet("tokens=3000,pace=1ms,first=0");
    let gateway = Setup::new(fleet.url())
        .more(PRICES)
        .more("budget: { credit: 0.2 }\n")
        .start();
    let body = chat("fast", true).replace(
        "\"stream\"",
        "\"stream_options\":{\"include_usage\":true},\"stream\"",
    );
    let (_, told) = stream(&gateway, CHAT, &body);
    let [.., finish, usage] = &told[..] else {
        panic!("{told:?}")
    };
    assert_eq!(finish["gateway"]["policy"], "budget of the gateway");
    let total = usage["usage"]["total_tokens"].as_u64().expect("a usage");
    assert_eq!(usage["choices"], serde_json::json!([]));
    // 200 tokens for 20 cents.
    assert!((195..=202).contains(&total), "{total}");
    let mut client = Client::connect(gateway.addr());
    client.post(CHAT, &chat("fast", false));
    let refused = client.answer();
    assert_eq!(refused.status, 429);
    assert_eq!(refused.json()["error"]["code"], "insufficient_quota");
}

#[test]
fn an_error_event_where_that_is_configured_and_the_connection_goes_on() {
    let fleet = fleet("tokens=3000,pace=1ms,first=0");
    let gateway = Setup::new(fleet.url())
        .limits("  - { tokens: 150, every: 1mo, on_exhausted: error }")
        .start();
    let mut client = Client::connect(gateway.addr());
    client.post(CHAT, &chat("fast", true));
    let answer = client.answer();
    let told = events(&answer.text());
    assert_eq!(told.last().expect("events")["error"]["code"], "limit_exhausted");
    assert!(!answer.text().contains("[DONE]"));
    // The same connection serves on.
    client.post(CHAT, &chat("fast", true));
    assert_eq!(client.answer().status, 429);
}

#[test]
fn a_budget_of_the_run_time_ends_streams_and_takes_the_unpriced_as_it_says() {
    let fleet = fleet("tokens=3000,pace=1ms,first=0");
    let gateway = Setup::new(fleet.url())
        .more("prices:\n  - { provider: \"*\", model: \"sim\", input: 1000, output: 1000 }\n")
        .model("unknown", "unpriced")
        .start();
    let set = |more: &str| {
        let body = format!(r#"{{"usd": "0.2", "every": "1d", "time_zone": "Europe/Berlin"{more}}}"#);
        let answer = gateway.admin("PUT /v1/budgets/gateway/all", &body);
        assert_eq!(answer.status, 200, "{}", answer.text());
    };
    let ask = |model: &str| {
        let mut client = Client::connect(gateway.addr());
        let body = chat(model, false).replace("\"model\"", "\"max_tokens\":1,\"model\"");
        client.post(CHAT, &body);
        client.answer()
    };
    set("");
    assert_eq!(ask("unknown").json()["error"]["code"], "price_unknown");
    set(r#", "unpriced": "allow", "on_exhausted": "error""#);
    assert_eq!(ask("unknown").status, 200);
    let (text, told) = stream(&gateway, CHAT, &chat("fast", true));
    let last = told.last().expect("events");
    assert_eq!(last["error"]["code"], "limit_exhausted", "{text}");
}

#[test]
fn responses_become_incomplete() {
    let fleet = fleet("tokens=3000,pace=1ms,first=0");
    let gateway = Setup::new(fleet.url())
        .limits("  - { output_tokens: 30, every: 1mo }")
        .start();
    let body = r#"{"model":"fast","input":"hello","stream":true}"#;
    let (text, told) = stream(&gateway, "/v1/responses", body);
    let last = told.last().expect("events");
    assert!(text.contains("event: response.incomplete\n"), "{text}");
    assert_eq!(last["type"], "response.incomplete");
    assert_eq!(last["response"]["status"], "incomplete");
    assert_eq!(last["response"]["id"], told[0]["response"]["id"]);
    assert_eq!(last["gateway"]["cut"], "limit");
}

#[test]
fn many_streams_share_what_is_left_to_the_last_token() {
    let fleet = fleet("tokens=3000,pace=1ms,first=0");
    let gateway = Setup::new(fleet.url())
        .workers(2, "auto")
        .limits("  - { output_tokens: 1000, every: 1mo }")
        .start();
    // Each begins with little, so that all begin.
    let body = chat("fast", true).replace("\"stream\"", "\"max_tokens\":50,\"stream\"");
    let delivered: Vec<usize> = thread::scope(|scope| {
        let one = || {
            // The simulator heeds max_tokens; ten requests in a row use up what there is.
            let mut sum = 0;
            for _ in 0..10 {
                let mut client = Client::connect(gateway.addr());
                client.post(CHAT, &body);
                let answer = client.answer();
                sum += if answer.status == 200 {
                    texts(&events(&answer.text()))
                } else {
                    0
                };
            }
            sum
        };
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(one)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("no panic"))
            .collect()
    });
    let sum: usize = delivered.iter().sum();
    assert!((950..=1000).contains(&sum), "{delivered:?}");
}

#[test]
fn parallel_slots_come_back_however_a_request_ends() {
    let fleet = fleet("tokens=2000,pace=20ms,first=0");
    let gateway = Setup::new(fleet.url())
        .workers(2, "auto")
        .model("dies", "sim:tokens=20,die=rst,after=3,pace=1ms")
        .model("fails", "sim:status=500")
        .model("quick", "sim:tokens=2,pace=0")
        .limits("  - { name: three, per: key, parallel: 3 }")
        .start();
    let open = || {
        let mut client = Client::connect(gateway.addr());
        client.post(CHAT, &chat("fast", true));
        let head = client.receive_until(b"\r\n\r\n");
        (client, String::from_utf8_lossy(&head)[9..12].to_string())
    };
    for _ in 0..3 {
        let running: Vec<_> = (0..3).map(|_| open()).collect();
        assert!(running.iter().all(|(_, status)| status == "200"));
        let mut fourth = Client::connect(gateway.addr());
        fourth.post(CHAT, &chat("quick", false));
        let refused = fourth.answer();
        assert_eq!(refused.status, 429);
        assert_eq!(refused.field("x-gateway-limit"), Some("three"));
        assert_eq!(refused.field("retry-after"), Some("1"));
        // Hang up: all slots come back by themselves.
        drop(running);
        eventually("three slots", || {
            let again: Vec<_> = (0..3).map(|_| open()).collect();
            again.iter().all(|(_, status)| status == "200").then_some(())
        });
        eventually("free slots", || (fleet.stats().streams_open == 0).then_some(()));
    }
    for model in ["dies", "fails", "dies", "fails", "dies", "fails", "dies"] {
        for stream in [true, false] {
            let mut client = Client::connect(gateway.addr());
            client.post(CHAT, &chat(model, stream));
            let head = client.receive_until(b"\r\n\r\n");
            assert!(!head.starts_with(b"HTTP/1.1 429"), "{model}");
        }
    }
    eventually("all slots at the end", || {
        let again: Vec<_> = (0..3).map(|_| open()).collect();
        again.iter().all(|(_, status)| status == "200").then_some(())
    });
}

#[test]
fn a_provider_without_allowance_is_passed_over() {
    let (first, second) = (fleet("tokens=5,pace=0,first=0"), fleet("tokens=5,pace=0,first=0"));
    let gateway = Setup::new(first.url())
        .fallback(second.url())
        .limits("  - { name: of-sim, match: { provider: sim }, per: shared, requests: 2, every: 1mo }")
        .start();
    let ask = |model: &str| {
        let mut client = Client::connect(gateway.addr());
        client.post(CHAT, &chat(model, false));
        client.answer()
    };
    for _ in 0..4 {
        assert_eq!(ask("pair").status, 200);
    }
    assert_eq!((first.stats().requests, second.stats().requests), (2, 2));
    // Nobody else serves this one.
    let refused = ask("fast");
    assert_eq!(refused.status, 429);
    assert!(refused.text().contains("of-sim"), "{}", refused.text());
    // Told as a limit's refusal that came before any target was chosen.
    assert_eq!(refused.field("x-gateway-limit"), Some("of-sim"));
    assert!(refused.field("retry-after").is_some());
    assert_eq!(refused.field("x-ratelimit-limit-requests"), Some("2"));
    let records = gateway.await_records(5);
    assert_eq!(records.iter().filter(|record| record.status == 429).count(), 1);
}

#[test]
fn what_was_used_survives_a_kill_and_what_was_held_does_not() {
    let fleet = fleet("tokens=20,pace=0,first=0");
    let setup = Setup::new(fleet.url())
        .model("slow", "sim:tokens=3000,pace=50ms")
        .limits("  - { name: kept, tokens: 1000, every: 1mo, window: calendar }\n  - { requests: 50, every: 1mo }\n  - { parallel: 1 }");
    let gateway = setup.start();
    let ask = |gateway: &Gateway, max: u64| {
        let mut client = Client::connect(gateway.addr());
        client.post(
            CHAT,
            &chat("fast", false).replace("\"stream\"", &format!("\"max_tokens\":{max},\"stream\"")),
        );
        client.answer()
    };
    let left = |answer: &support::client::Answer| -> u64 {
        let field = answer.field("x-ratelimit-remaining-tokens").expect("a limit");
        field.parse().expect("a number")
    };
    let mut used = 0;
    for _ in 0..5 {
        used += ask(&gateway, 20).json()["usage"]["total_tokens"]
            .as_u64()
            .expect("usage");
    }
    // A stream that holds nearly all of the rest, and a parallel slot, when the process dies.
    let mut client = Client::connect(gateway.addr());
    client.post(
        CHAT,
        &chat("slow", true).replace("\"stream\"", "\"max_tokens\":600,\"stream\""),
    );
    client.receive_until(b"\r\n\r\n");
    assert_eq!(ask(&gateway, 20).status, 429);
    let directory = gateway.kill();
    let gateway = Gateway::start_in(directory, &setup.config());
    gateway.await_log("limits go on where they were");
    let answer = ask(&gateway, 20);
    assert_eq!(answer.status, 200, "{}", answer.text());
    let body_tokens = (chat("fast", false).len() + "\"max_tokens\":20,".len()) as u64 / 4;
    let expected = 1000 - used - 20 - body_tokens;
    assert!(
        (expected..=expected + 2).contains(&left(&answer)),
        "{} not {expected}",
        left(&answer)
    );
    let requests: u64 = answer
        .field("x-ratelimit-remaining-requests")
        .expect("a limit")
        .parse()
        .expect("a number");
    assert!((42..=44).contains(&requests), "{requests}");
}

/// Receives one alert after the other, and answers them with the statuses in turn.
fn webhook(statuses: &'static [u16]) -> (String, mpsc::Receiver<Value>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}/alerts", listener.local_addr().expect("an address"));
    let (sender, received) = mpsc::channel();
    thread::spawn(move || {
        for (conn, status) in listener.incoming().zip(statuses.iter().cycle()) {
            let mut conn = BufReader::new(conn.expect("a connection"));
            let (mut length, mut token) = (0, false);
            loop {
                let mut line = String::new();
                if conn.read_line(&mut line).expect("a line") <= 2 {
                    break;
                }
                let line = line.to_ascii_lowercase();
                if let Some(value) = line.strip_prefix("content-length:") {
                    length = value.trim().parse().expect("a length");
                }
                token |= line.trim() == "authorization: bearer hook-secret";
            }
            let mut body = vec![0; length];
            conn.read_exact(&mut body).expect("a body");
            assert!(token, "the token is sent");
            let answer = format!("HTTP/1.1 {status} X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            conn.get_mut().write_all(answer.as_bytes()).expect("an answer");
            if *status == 200 && sender.send(serde_json::from_slice(&body).expect("json")).is_err() {
                return;
            }
        }
    });
    (url, received)
}

#[test]
fn budgets_tell_of_their_alerts_once_also_after_a_restart() {
    let fleet = fleet("tokens=10,pace=0,first=0");
    // The first try of all fails.
    let (url, alerts) = webhook(&[503, 200, 200, 200, 200, 200]);
    let setup = Setup::new(fleet.url())
        .more(PRICES)
        .more(&format!("alerts: {{ webhook: \"{url}\", token: hook-secret }}\n"))
        .more("organizations: [{ name: all }]\n")
        .more("teams: [{ name: search, organization: all, budget: { usd: 0.2, every: 1mo, alerts: [50%, 100%], hard: false } }]\n")
        .key("bob", "sk-test-bob", ", team: search");
    let gateway = setup.start();
    let ask = |gateway: &Gateway| {
        let mut client = Client::connect(gateway.addr());
        client.post_with(
            CHAT,
            &chat("fast", false),
            "authorization: Bearer sk-test-bob\r\n",
        );
        let answer = client.answer();
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()["usage"]["total_tokens"].as_u64().expect("usage")
    };
    let mut used = 0;
    while used < 100 {
        used += ask(&gateway);
    }
    let first = alerts.recv_timeout(support::PATIENCE).expect("an alert");
    assert_eq!(
        (&first["event"], &first["percent"]),
        (&"budget_alert".into(), &50.into())
    );
    assert_eq!(
        first["subject"],
        serde_json::json!({ "kind": "team", "name": "search" })
    );
    assert_eq!(first["budget_usd"], "0.2");
    gateway.await_log("a budget has reached a share");
    let gateway = Gateway::start_in(gateway.kill(), &setup.config());
    while used < 200 {
        used += ask(&gateway);
    }
    let second = alerts.recv_timeout(support::PATIENCE).expect("an alert");
    assert_eq!(second["percent"], 100);
    ask(&gateway);
    assert!(
        alerts.recv_timeout(Duration::from_millis(300)).is_err(),
        "once a period"
    );
    assert!(!gateway.log().contains("hook-secret"));
}

#[test]
fn check_explains_which_limits_apply() {
    let fleet = fleet("tokens=1");
    let gateway = Setup::new(fleet.url())
        .limits("  - { name: a, match: { user: 'x*' }, requests: 1, every: 1m }\n  - { tokens: 7, every: 1h, window: sliding, per: [key, model] }")
        .start();
    let output = gateway.command(&["check", "--explain", "key=alice", "model=fast", "user=xy"]);
    assert!(output.status.success());
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(
        text,
        "a: 1 requests per 1m, per key\nlimits[1]: 7 tokens per any 1h, per key and model\n"
    );
    assert!(
        !gateway
            .command(&["check", "--explain", "key=nobody"])
            .status
            .success()
    );
}

#[test]
fn users_have_counts_of_their_own() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let gateway = Setup::new(fleet.url())
        .limits(
            "  - { per: [key, user], requests: 1, every: 1mo }\n  \
             - { name: gold, match: { header: { name: X-Tier, value: 'g*d' } }, requests: 1, every: 1mo }",
        )
        .more("limit_state: { user_header: x-end-user }\n")
        .start();
    let ask = |user: &str, header: &str| {
        let mut client = Client::connect(gateway.addr());
        let body = chat("fast", false).replace("\"stream\"", &format!("\"user\":\"{user}\",\"stream\""));
        let fields = format!("authorization: Bearer {}\r\n{header}", support::KEY);
        client.post_with(CHAT, &body, &fields);
        client.answer().status
    };
    assert_eq!([ask("u", ""), ask("u", ""), ask("v", "")], [200, 429, 200]);
    assert_eq!(
        [ask("w", "x-end-user: h\r\n"), ask("z", "x-end-user: h\r\n")],
        [200, 429]
    );
    assert_eq!(
        [
            ask("g1", "x-tier: gold\r\n"),
            ask("g2", "X-TIER: gold\r\n"),
            ask("g3", "x-tier: silver\r\n")
        ],
        [200, 429, 200]
    );
}

#[test]
fn a_dearer_tier_that_is_asked_for_costs_a_budget_what_it_costs() {
    let fleet = fleet("tokens=3000,pace=1ms,first=0");
    let prices = PRICES.replace(
        "output: 1000 }",
        "output: 1000, priority: { input: 2000, output: 2000 } }",
    );
    let gateway = Setup::new(fleet.url())
        .more(&prices)
        .more("budget: { credit: 0.2 }\n")
        .start();
    let body = chat("fast", true).replace("\"stream\"", "\"service_tier\":\"priority\",\"stream\"");
    let (_, told) = stream(&gateway, CHAT, &body);
    // 100 tokens for 20 cents, some of them input; at the usual price there would be 100 more.
    assert!((60..=90).contains(&texts(&told)), "{}", texts(&told));
    let record = &gateway.await_records(1)[0];
    let tokens = record.usage.prompt + record.usage.completion;
    assert_eq!(record.cost, Some(tokens * 2_000_000), "{record:?}");
}
