//! Who may do what, and how much of it: keys, models, requests and tokens per window.

mod support;

use std::{
    fs,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use gateway_bench::upstream::Server;
use support::{
    Gateway, KEY, Setup,
    client::{Answer, Client, chat},
    eventually, fleet,
};

const CHAT: &str = "/v1/chat/completions";

fn quick() -> Server {
    fleet("tokens=10,pace=0,first=0")
}

/// A plain request with this output limit.
fn ask(gateway: &Gateway, model: &str, max_tokens: u64) -> Answer {
    let mut client = Client::connect(gateway.addr());
    client.post(CHAT, &bounded(model, max_tokens));
    client.answer()
}

fn bounded(model: &str, max_tokens: u64) -> String {
    chat(model, false).replace("\"stream\"", &format!("\"max_tokens\":{max_tokens},\"stream\""))
}

fn number(answer: &Answer, field: &str) -> u64 {
    let value = answer
        .field(field)
        .unwrap_or_else(|| panic!("{field} in {answer:?}"));
    value.trim_end_matches("ms").parse().expect("a number")
}

fn assert_refused(answer: &Answer, status: u16, code: &str) {
    assert_eq!(answer.status, status, "{}", answer.text());
    let error = &answer.json()["error"];
    assert_eq!(error["code"], code, "{error}");
    assert!(error["message"].is_string());
}

/// Replaces a part of the configuration and waits until it is in force.
fn reload(gateway: &Gateway, old: &str, new: &str) {
    let path = gateway.config_path();
    let text = fs::read_to_string(&path).expect("the configuration");
    assert!(text.contains(old), "{text}");
    fs::write(&path, text.replace(old, new)).expect("the configuration");
    let reloads = |gateway: &Gateway| gateway.log().matches("configuration reloaded").count();
    let before = reloads(gateway);
    gateway.signal(libc::SIGHUP);
    eventually("the reload", || (reloads(gateway) > before).then_some(()));
}

#[test]
fn requests_of_a_window_are_counted_exactly_and_the_next_is_told_when_to_come_back() {
    let fleet = quick();
    let gateway = Setup::new(fleet.url())
        .limits("  - { requests: 3, every: 1h }")
        .start();
    for left in [2, 1, 0] {
        let answer = ask(&gateway, "fast", 10);
        assert_eq!(answer.status, 200);
        assert_eq!(number(&answer, "x-ratelimit-limit-requests"), 3);
        assert_eq!(number(&answer, "x-ratelimit-remaining-requests"), left);
        let reset_ms = number(&answer, "x-ratelimit-reset-requests");
        assert!((1..=(3 - left) * 1_200_000).contains(&reset_ms), "{reset_ms}");
    }
    let answer = ask(&gateway, "fast", 10);
    assert_refused(&answer, 429, "rate_limit_exceeded");
    assert_eq!(answer.json()["error"]["type"], "rate_limit_error");
    assert_eq!(number(&answer, "x-ratelimit-remaining-requests"), 0);
    // A third of the window earns one request.
    let retry_after_s = number(&answer, "retry-after");
    assert!((1_100..=1_200).contains(&retry_after_s), "{retry_after_s}");
    assert!(answer.keep_alive);
    assert_eq!(fleet.stats().requests, 3);
    assert_eq!(gateway.await_records(3).len(), 3);
}

#[test]
fn time_earns_requests_back() {
    let fleet = quick();
    let gateway = Setup::new(fleet.url())
        .limits("  - { requests: 2, every: 1s }")
        .start();
    let mut accepted = 0;
    let mut refused = 0;
    eventually("ten accepted and some refused", || {
        match ask(&gateway, "fast", 10).status {
            200 => accepted += 1,
            429 => refused += 1,
            status => panic!("{status}"),
        }
        (accepted >= 6 && refused > 0).then_some(())
    });
}

#[test]
fn many_connections_get_exactly_what_there_is() {
    let fleet = quick();
    let gateway = Setup::new(fleet.url())
        .workers(2, "auto")
        .limits("  - { requests: 37, every: 1mo }\n  - { requests: 1000, tokens: 1000000000, every: 1mo }")
        .start();
    let accepted = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                let mut client = Client::connect(gateway.addr());
                for _ in 0..10 {
                    client.post(CHAT, &bounded("fast", 10));
                    match client.answer().status {
                        200 => drop(accepted.fetch_add(1, Ordering::Relaxed)),
                        status => assert_eq!(status, 429),
                    }
                }
            });
        }
    });
    assert_eq!(accepted.into_inner(), 37);
    assert_eq!(gateway.await_records(37).len(), 37);
    assert_eq!(fleet.stats().requests, 37);
}

#[test]
fn many_connections_never_reserve_more_tokens_than_there_are() {
    // All streams stay open, so nothing comes back: 10 fit.
    let fleet = fleet("tokens=100000,pace=1s,first=0");
    let gateway = Setup::new(fleet.url())
        .workers(2, "auto")
        .limits("  - { tokens: 10300, every: 1mo }")
        .start();
    let body = chat("fast", true).replace("\"stream\"", "\"max_tokens\":1000,\"stream\"");
    let open: Vec<(Client, u16)> = thread::scope(|scope| {
        let ask = || {
            let mut client = Client::connect(gateway.addr());
            client.post(CHAT, &body);
            let head = client.receive_until(b"\r\n\r\n");
            let status = String::from_utf8_lossy(&head)[9..12].parse().expect("a status");
            (client, status)
        };
        let threads: Vec<_> = (0..30).map(|_| scope.spawn(ask)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("no panic"))
            .collect()
    });
    assert_eq!(open.iter().filter(|(_, status)| *status == 200).count(), 10);
    assert_eq!(open.iter().filter(|(_, status)| *status == 429).count(), 20);
    assert_eq!(fleet.stats().requests, 10);
}

#[test]
fn tokens_are_reserved_and_settled_with_what_was_used() {
    let fleet = quick();
    let gateway = Setup::new(fleet.url())
        .model("over", "sim:tokens=30000")
        .limits("  - { tokens: 10000, every: 1mo }")
        .start();
    let first = ask(&gateway, "fast", 9_000);
    assert_eq!(number(&first, "x-ratelimit-limit-tokens"), 10_000);
    // The head left before the answer was settled: it tells of the reservation.
    assert!(number(&first, "x-ratelimit-remaining-tokens") < 1_000);
    let used = first.json()["usage"]["total_tokens"].as_u64().expect("usage");
    assert!(used < 100);
    let body_tokens = bounded("fast", 9_000).len() as u64 / 4;
    let second = ask(&gateway, "fast", 9_000);
    assert_eq!(second.status, 200, "what was not used is there again");
    let left = number(&second, "x-ratelimit-remaining-tokens");
    let expected = 10_000 - used - 9_000 - body_tokens;
    assert!(
        (expected..=expected + 2).contains(&left),
        "{left}, not {expected}"
    );
    // Without an output limit of its own a request reserves no more than a limit can grant; what it then uses
    // beyond it is debt.
    let before = ask(&gateway, "fast", 10);
    assert!(number(&before, "x-ratelimit-remaining-tokens") > 9_800);
    let body = chat("over", false);
    let mut client = Client::connect(gateway.addr());
    client.post(CHAT, &body);
    let answer = client.answer();
    assert_eq!(answer.status, 200, "{}", answer.text());
    let refused = ask(&gateway, "fast", 10);
    assert_refused(&refused, 429, "rate_limit_exceeded");
    assert_eq!(number(&refused, "x-ratelimit-remaining-tokens"), 0);
    // 20,000 in debt: two windows and a bit, of 30 days.
    let days = number(&refused, "retry-after") as f64 / 86_400.0;
    assert!((60.0..=62.0).contains(&days), "{days}");
}

#[test]
fn a_request_that_can_never_fit_is_told_so() {
    let fleet = quick();
    let gateway = Setup::new(fleet.url())
        .limits("  - { tokens: 1000, every: 1m }")
        .start();
    let answer = ask(&gateway, "fast", 5_000);
    assert_refused(&answer, 429, "request_over_limit");
    assert_eq!(answer.field("retry-after"), None, "trying again makes no sense");
    assert!(answer.text().contains("max_tokens"));
    // Several choices are as many outputs.
    let mut client = Client::connect(gateway.addr());
    client.post(
        CHAT,
        &bounded("fast", 400).replace("\"stream\"", "\"n\":10,\"stream\""),
    );
    assert_refused(&client.answer(), 429, "request_over_limit");
    assert_eq!(fleet.stats().requests, 0);
    assert_eq!(ask(&gateway, "fast", 900).status, 200);
}

#[test]
fn all_limits_must_grant_and_a_refused_request_takes_from_none() {
    let fleet = quick();
    let gateway = Setup::new(fleet.url())
        .model("slow", "sim")
        .limits("  - { requests: 5, every: 1mo }\n  - { match: { model: slow }, requests: 1, every: 1mo }")
        .start();
    assert_eq!(ask(&gateway, "slow", 10).status, 200);
    for _ in 0..10 {
        assert_eq!(ask(&gateway, "slow", 10).status, 429);
    }
    for left in [3, 2, 1, 0] {
        let answer = ask(&gateway, "fast", 10);
        assert_eq!(
            (answer.status, number(&answer, "x-ratelimit-remaining-requests")),
            (200, left)
        );
    }
    assert_eq!(ask(&gateway, "fast", 10).status, 429);
}

#[test]
fn keys_have_counts_of_their_own() {
    let fleet = quick();
    let gateway = Setup::new(fleet.url())
        .key("bob", "sk-test-bob", "")
        .limits("  - { requests: 1, every: 1mo }")
        .start();
    let ask_as = |key: &str| {
        let mut client = Client::connect(gateway.addr());
        client.post_with(
            CHAT,
            &bounded("fast", 10),
            &format!("authorization: Bearer {key}\r\n"),
        );
        client.answer().status
    };
    assert_eq!(
        [
            ask_as(KEY),
            ask_as(KEY),
            ask_as("sk-test-bob"),
            ask_as("sk-test-bob")
        ],
        [200, 429, 200, 429]
    );
    let records = gateway.await_records(2);
    let mut names: Vec<&str> = records.iter().map(|record| &*record.key).collect();
    names.sort_unstable();
    assert_eq!(names, ["alice", "bob"]);
}

#[test]
fn a_reload_forgets_nothing_of_what_was_used() {
    let fleet = quick();
    let gateway = Setup::new(fleet.url())
        .limits("  - { requests: 2, every: 1mo }")
        .start();
    assert_eq!(
        [ask(&gateway, "fast", 10).status, ask(&gateway, "fast", 10).status],
        [200, 200]
    );
    reload(&gateway, "name: alice", "name: alice");
    assert_eq!(ask(&gateway, "fast", 10).status, 429);
    // More for all: the share that is used stays used.
    reload(&gateway, "requests: 2,", "requests: 4,");
    assert_eq!(ask(&gateway, "fast", 10).status, 429);
    // Another limit is another count.
    reload(&gateway, "requests: 4, every: 1mo", "requests: 3, every: 1d");
    assert_eq!(ask(&gateway, "fast", 10).status, 200);
    // A file that is wrong changes nothing.
    let path = gateway.config_path();
    let text = fs::read_to_string(&path).expect("the configuration");
    fs::write(&path, text.replace("requests: 3", "requests: none")).expect("the configuration");
    gateway.signal(libc::SIGHUP);
    eventually("a refusal of the file", || {
        gateway.log().contains("the old one stays").then_some(())
    });
    let answer = ask(&gateway, "fast", 10);
    assert_eq!(
        (answer.status, number(&answer, "x-ratelimit-remaining-requests")),
        (200, 1)
    );
}

#[test]
fn a_key_may_come_in_any_of_three_fields() {
    let fleet = quick();
    let gateway = Setup::new(fleet.url()).start();
    let status = |fields: &str| {
        let mut client = Client::connect(gateway.addr());
        client.post_with(CHAT, &bounded("fast", 10), fields);
        client.answer()
    };
    for good in [
        format!("Authorization: Bearer {KEY}\r\n"),
        format!("authorization: bearer {KEY}\r\n"),
        format!("AUTHORIZATION: BEARER   {KEY}  \r\n"),
        format!("x-api-key: {KEY}\r\n"),
        format!("X-Goog-Api-Key:{KEY}\r\n"),
        format!("authorization: Basic abc\r\nx-api-key: {KEY}\r\n"),
    ] {
        assert_eq!(status(&good).status, 200, "{good}");
    }
    for bad in [
        "",
        "authorization: Basic abc\r\n",
        "cookie: key=1\r\n",
        "authorization: Bearer \r\n",
        &format!("authorization: {KEY}\r\n"),
    ] {
        let answer = status(bad);
        assert_refused(&answer, 401, "missing_api_key");
        assert!(answer.field("www-authenticate").is_some());
    }
    let upper = KEY.to_uppercase();
    for bad in ["sk-wrong", &KEY[..KEY.len() - 1], &format!("{KEY}x"), &upper] {
        let answer = status(&format!("authorization: Bearer {bad}\r\n"));
        assert_refused(&answer, 401, "invalid_api_key");
        assert!(!answer.text().contains(bad), "an answer never repeats a secret");
    }
    assert_eq!(gateway.await_records(6).len(), 6);
    let log = gateway.log();
    assert!(!log.contains(KEY) && !log.contains("sk-wrong"));
}

#[test]
fn a_key_uses_and_sees_its_own_models_only() {
    let fleet = quick();
    let gateway = Setup::new(fleet.url())
        .model("secret", "sim")
        .key("bob", "sk-test-bob", ", models: [fast]")
        .key("eve", "sk-test-eve", ", models: []")
        .start();
    let models = |key: &str| {
        let mut client = Client::connect(gateway.addr());
        client.send(format!(
            "GET /v1/models HTTP/1.1\r\nhost: t\r\nx-api-key: {key}\r\n\r\n"
        ));
        let answer = client.answer();
        assert_eq!(answer.status, 200);
        let list = answer.json();
        assert_eq!(list["object"], "list");
        let data = list["data"].as_array().expect("a list").clone();
        assert!(data.iter().all(|model| model["object"] == "model"));
        data.iter()
            .map(|model| model["id"].as_str().expect("an id").to_string())
            .collect::<Vec<_>>()
    };
    assert_eq!(models(KEY), ["fast", "secret"]);
    assert_eq!(models("sk-test-bob"), ["fast"]);
    assert!(models("sk-test-eve").is_empty());
    let ask_as = |key: &str, model: &str| {
        let mut client = Client::connect(gateway.addr());
        client.post_with(CHAT, &bounded(model, 10), &format!("x-api-key: {key}\r\n"));
        client.answer()
    };
    assert_eq!(ask_as(KEY, "secret").status, 200);
    assert_eq!(ask_as("sk-test-bob", "fast").status, 200);
    // A bound key cannot tell what exists from what does not.
    let (hidden, absent) = (ask_as("sk-test-bob", "secret"), ask_as("sk-test-bob", "absent"));
    assert_refused(&hidden, 403, "model_not_allowed");
    assert_eq!((absent.status, absent.text()), (403, hidden.text()));
    assert_refused(&ask_as("sk-test-eve", "fast"), 403, "model_not_allowed");
    let missing = ask_as(KEY, "absent");
    assert_refused(&missing, 404, "model_not_found");
    assert_eq!(missing.json()["error"]["param"], "model");
    // The upstream's own name is not a name here.
    assert_eq!(ask_as(KEY, "sim").status, 404);
    let mut client = Client::connect(gateway.addr());
    client.send("GET /v1/models HTTP/1.1\r\nhost: t\r\n\r\n");
    assert_refused(&client.answer(), 401, "missing_api_key");
    assert_eq!(gateway.await_records(2).len(), 2);
}

#[test]
fn paths_and_methods_that_are_not_served_say_so() {
    let fleet = quick();
    let gateway = Setup::new(fleet.url()).start();
    let mut client = Client::connect(gateway.addr());
    for (line, status) in [
        ("GET /healthz", 200),
        ("GET /readyz", 200),
        ("GET /", 404),
        ("GET /v1/chat/completions", 405),
        ("GET /v1/files", 404),
        ("DELETE /v1/models", 405),
        ("GET /v1/models/../../etc/passwd", 404),
        ("GET //v1/models", 404),
        ("GET /v1/models?x=1", 200),
    ] {
        client.send(format!(
            "{line} HTTP/1.1\r\nhost: t\r\nauthorization: Bearer {KEY}\r\n\r\n"
        ));
        let answer = client.answer();
        assert_eq!(answer.status, status, "{line}: {}", answer.text());
        assert!(answer.field("x-request-id").is_some(), "{line}");
    }
}

#[test]
fn the_access_log_names_who_was_refused() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let gateway = Setup::new(fleet.url())
        .limits("  - { requests: 1, every: 1h }")
        .start();
    let mut client = Client::connect(gateway.addr());
    for status in [200, 429] {
        client.post("/v1/chat/completions", &chat("fast", false));
        assert_eq!(client.answer().status, status);
    }
    let line = support::eventually("a line of the access log", || {
        gateway
            .log()
            .lines()
            .find(|line| line.contains("\"status\":429"))
            .map(str::to_string)
    });
    for part in [
        "\"key\":\"alice\"",
        "\"model\":\"fast\"",
        "\"path\":\"/v1/chat/completions\"",
        "\"error\":\"rate_limit_exceeded\"",
    ] {
        assert!(line.contains(part), "{part} in {line}");
    }
}
