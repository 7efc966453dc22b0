//! What a request cost, from the provider's figures to the books, exact to the nano-dollar.

mod support;

use std::io::Write;

use gateway::{
    dialect::{Finish, Tier},
    ledger::record::Flags,
};
use serde_json::Value;
use support::{
    Gateway, Setup,
    client::{Client, chat},
    eventually, fleet,
    scripted::{Scripted, Then},
};

const CHAT: &str = "/v1/chat/completions";

const PRICES: &str = "prices:\n  - { provider: sim, model: \"sim*\", input: 2.5, output: 10, cached_input: 1.25, \
                      flex: { input: 1.25, output: 5 } }\n";

/// An answer of a provider with this usage object, and what else stands beside it.
fn answer(usage: &str, more: &str) -> String {
    let body = format!(
        r#"{{"choices":[{{"index":0,"message":{{"content":"hi"}},"finish_reason":"stop"}}]{more},"usage":{usage}}}"#
    );
    let length = body.len();
    format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}")
}

fn ask(gateway: &Gateway, model: &str, stream: bool) {
    let mut client = Client::connect(gateway.addr());
    client.post(CHAT, &chat(model, stream));
    assert_eq!(client.answer().status, 200);
}

fn metric(gateway: &Gateway, name: &str) -> String {
    let text = gateway.admin("GET /metrics", "").text();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(&format!("{name} ")));
    line.unwrap_or_else(|| panic!("{name} in {text}")).to_owned()
}

fn total(gateway: &Gateway) -> Value {
    let output = gateway.command(&["usage", "--json"]);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let document: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    document["total"].clone()
}

#[test]
fn records_sums_and_metrics_agree_to_the_nano_dollar() {
    let fleet = fleet("tokens=7,pace=0,first=0,cached=1");
    let gateway = Setup::new(fleet.url())
        .model("more", "sim:tokens=3,reasoning=2,cached=2")
        .more(PRICES)
        .start();
    for _ in 0..5 {
        for model in ["fast", "more"] {
            ask(&gateway, model, false);
            ask(&gateway, model, true);
        }
    }
    let records = gateway.await_records(20);
    let mut sum = 0;
    for record in &records {
        let usage = record.usage;
        let plain = usage.prompt - usage.cached;
        let cost = plain * 2500 + usage.cached * 1250 + usage.completion * 10_000;
        assert_eq!(record.cost, Some(cost), "{record:?}");
        assert_eq!(record.finish, Finish::Stop, "{record:?}");
        assert_eq!(&*record.endpoint, fleet.url(), "{record:?}");
        assert_eq!((record.attempts, record.fallback), (1, 0));
        assert!(
            usage.cached > 0 && !record.flags.has(Flags::UNPRICED),
            "{record:?}"
        );
        sum += cost;
    }
    let total = total(&gateway);
    assert_eq!(total["cost_nano_usd"], sum);
    assert_eq!(total["unpriced"], 0);
    let dollars = gateway::config::units::Dollars(sum).to_string();
    assert_eq!(total["cost_usd"], dollars.as_str());
    assert_eq!(metric(&gateway, "gateway_cost_usd_total"), dollars);
    assert_eq!(metric(&gateway, "gateway_unpriced_total"), "0");
}

#[test]
fn records_and_sums_name_the_keys_team_and_organization() {
    let fleet = fleet("tokens=2,pace=0,first=0");
    let gateway = Setup::new(fleet.url())
        .more("organizations: [{ name: acme }]\nteams: [{ name: search, organization: acme }]\n")
        .key("bob", "sk-test-bob", ", team: search")
        .start();
    let mut client = Client::connect(gateway.addr());
    let bob = "authorization: Bearer sk-test-bob\r\n";
    client.post_with(CHAT, &chat("fast", false), bob);
    assert_eq!(client.answer().status, 200);
    let record = &gateway.await_records(1)[0];
    let names = (&*record.key, &*record.team, &*record.organization);
    assert_eq!(names, ("bob", "search", "acme"));
    let output = gateway.command(&["usage", "--by", "organization", "--format", "csv"]);
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(text.contains("acme"), "{text}");
}

#[test]
fn a_cost_that_nobody_knows_is_null_and_counted() {
    let fleet = fleet("tokens=2,pace=0,first=0");
    let gateway = Setup::new(fleet.url()).model("dear", "dear").more(PRICES).start();
    ask(&gateway, "dear", false);
    ask(&gateway, "fast", false);
    let records = gateway.await_records(2);
    let dear = records
        .iter()
        .find(|record| &*record.model == "dear")
        .expect("dear");
    assert_eq!(dear.cost, None);
    assert!(dear.flags.has(Flags::UNPRICED));
    assert_eq!(metric(&gateway, "gateway_unpriced_total"), "1");
    eventually("the sums", || (total(&gateway)["unpriced"] == 1).then_some(()));
    let output = gateway.command(&["usage", "--records"]);
    let lines = String::from_utf8(output.stdout).expect("text");
    let unknown = lines
        .lines()
        .filter(|line| line.contains(r#""cost_nano_usd":null,"cost_usd":null"#));
    assert_eq!(unknown.count(), 1, "{lines}");
    let check = gateway.command(&["check"]);
    let warnings = String::from_utf8_lossy(&check.stderr).into_owned();
    assert!(
        warnings.contains("no price of `dear` at `sim` is known"),
        "{warnings}"
    );
    assert!(!warnings.contains("`sim` at"), "{warnings}");
}

#[test]
fn figures_that_contradict_themselves_are_clamped_flagged_and_counted() {
    let odd = r#"{"prompt_tokens":10,"completion_tokens":4,"prompt_tokens_details":{"cached_tokens":99},
        "completion_tokens_details":{"reasoning_tokens":5}}"#;
    let upstream = Scripted::saying(answer(odd, ""), Then::Keep);
    let gateway = Setup::new(upstream.url()).more(PRICES).start();
    ask(&gateway, "fast", false);
    let record = &gateway.await_records(1)[0];
    assert_eq!((record.usage.cached, record.usage.reasoning), (10, 4));
    assert!(record.flags.has(Flags::CLAMPED), "{record:?}");
    assert_eq!(record.cost, Some(10 * 1250 + 4 * 10_000));
    assert_eq!(metric(&gateway, "gateway_usage_clamped_total"), "1");
}

#[test]
fn the_tier_that_the_provider_tells_has_its_price() {
    let usage = r#"{"prompt_tokens":10,"completion_tokens":4}"#;
    let upstream = Scripted::start(move |socket, number| {
        let more = [r#","service_tier":"flex""#, r#","service_tier":"default""#][number % 2];
        let _ = socket.write_all(answer(usage, more).as_bytes());
        Then::Keep
    });
    let gateway = Setup::new(upstream.url()).more(PRICES).start();
    ask(&gateway, "fast", false);
    ask(&gateway, "fast", false);
    let mut records = gateway.await_records(2);
    records.sort_by_key(|record| record.id);
    assert_eq!(records[0].usage.tier, Tier::Flex);
    assert_eq!(records[0].cost, Some(10 * 1250 + 4 * 5000));
    assert_eq!(records[1].usage.tier, Tier::Default);
    assert_eq!(records[1].cost, Some(10 * 2500 + 4 * 10_000));
}

#[test]
fn users_and_tags_are_in_the_books_and_tags_do_not_go_on() {
    let upstream = Scripted::saying(
        answer(r#"{"prompt_tokens":1,"completion_tokens":1}"#, ""),
        Then::Keep,
    );
    let gateway = Setup::new(upstream.url()).more(PRICES).start();
    let mut client = Client::connect(gateway.addr());
    let body = r#"{"model":"fast","user":"u-17","messages":[{"role":"user","content":"hello"}]}"#;
    let key = format!("authorization: Bearer {}\r\n", support::KEY);
    client.post_with(
        CHAT,
        body,
        &format!("{key}x-gateway-tags: project=apollo,stage=test\r\n"),
    );
    assert_eq!(client.answer().status, 200);
    client.post_with(CHAT, body, &format!("{key}x-gateway-tags: no tags\r\n"));
    let refused = client.answer();
    assert_eq!(refused.status, 400);
    assert_eq!(refused.json()["error"]["code"], "invalid_tags");
    let record = &gateway.await_records(1)[0];
    assert_eq!(
        (&*record.user, &*record.tags),
        ("u-17", "project=apollo,stage=test")
    );
    let sent = String::from_utf8_lossy(&upstream.requests()[0]).to_lowercase();
    assert!(
        !sent.contains("x-gateway-tags") && sent.contains("u-17"),
        "{sent}"
    );
    let output = gateway.command(&["usage", "--by", "user", "--format", "csv"]);
    let csv = String::from_utf8(output.stdout).expect("text");
    assert!(csv.contains("\r\nu-17,1,1,"), "{csv}");
}

/// Where usage is told it teaches how many bytes make a token, and where it is not, that is what is believed.
#[test]
fn estimates_learn_from_what_providers_tell() {
    const TAUGHT: usize = 150;
    let upstream = Scripted::start(move |socket, number| {
        // Two bytes a token, where the rule of thumb says four.
        let content = "ab".repeat(200);
        let usage = if number < TAUGHT {
            r#","usage":{"prompt_tokens":64,"completion_tokens":200}"#
        } else {
            ""
        };
        let body = format!(r#"{{"choices":[{{"index":0,"message":{{"content":"{content}"}}}}]{usage}}}"#);
        let length = body.len();
        let _ = write!(
            socket,
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        Then::Keep
    });
    let gateway = Setup::new(upstream.url()).workers(1, "auto").more(PRICES).start();
    let mut client = Client::connect(gateway.addr());
    let words = "word ".repeat(100);
    let body = format!(r#"{{"model":"fast","messages":[{{"role":"user","content":"{words}"}}]}}"#);
    for _ in 0..=TAUGHT {
        client.post(CHAT, &body);
        assert_eq!(client.answer().status, 200);
    }
    let records = gateway.await_records(TAUGHT + 1);
    let estimated: Vec<_> = records
        .iter()
        .filter(|record| record.flags.has(Flags::ESTIMATED))
        .collect();
    assert_eq!(estimated.len(), 1);
    let usage = estimated[0].usage;
    assert!((60..=70).contains(&usage.prompt), "{usage:?}");
    assert!((180..=240).contains(&usage.completion), "{usage:?}");
    assert_eq!(
        estimated[0].cost,
        Some(usage.prompt * 2500 + usage.completion * 10_000)
    );
}

/// A model of a known family is counted with its vocabulary where its provider tells nothing, streamed or not.
#[test]
fn a_known_family_is_counted_with_its_vocabulary() {
    const TEXT: &str =
        "Les sanglots longs des violons de l'automne blessent mon coeur d'une langueur monotone.";
    let upstream = Scripted::start(move |socket, number| {
        let (kind, body) = if number.is_multiple_of(2) {
            let answer = serde_json::json!({ "choices": [{ "index": 0, "message": { "content": TEXT } }] });
            ("application/json", answer.to_string())
        } else {
            let mut events: String = TEXT
                .split_inclusive(' ')
                .map(|word| serde_json::json!({ "choices": [{ "index": 0, "delta": { "content": word } }] }))
                .map(|chunk| format!("data: {chunk}\n\n"))
                .collect();
            events.push_str("data: [DONE]\n\n");
            ("text/event-stream", events)
        };
        let length = body.len();
        let _ = write!(
            socket,
            "HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        Then::Keep
    });
    let setup = Setup::new(upstream.url()).workers(1, "auto");
    let gateway = setup.model("known", "openai/gpt-4o-mini").start();
    let completion = bpe_openai::o200k_base().count(TEXT) as u64;
    // 2 tokens of text, 4 that frame the message, 3 that begin the answer.
    let prompt = 9;
    let mut client = Client::connect(gateway.addr());
    eventually("the vocabulary is loaded and counts both", || {
        let before = gateway.records().len();
        for stream in [false, true] {
            let body = format!(
                r#"{{"model":"known","stream":{stream},"messages":[{{"role":"user","content":"hello world"}}]}}"#
            );
            client.post(CHAT, &body);
            assert_eq!(client.answer().status, 200);
        }
        let records = gateway.await_records(before + 2);
        let last = &records[before..];
        assert!(last.iter().all(|record| record.flags.has(Flags::ESTIMATED)));
        let counted = |record: &gateway::ledger::record::Record| {
            (record.usage.prompt, record.usage.completion) == (prompt, completion)
        };
        last.iter().all(counted).then_some(())
    });
}

#[test]
fn sums_by_organization_have_the_team_of_the_key() {
    let fleet = support::fleet("tokens=3,pace=0,first=0");
    let gateway = Setup::new(fleet.url())
        .more("organizations: [{ name: acme }]\nteams: [{ name: search, organization: acme }]\n")
        .key("bob", "sk-of-bob-in-search-team", ", team: search")
        .start();
    let mut client = Client::connect(gateway.addr());
    let body = r#"{"model":"fast","messages":[{"role":"user","content":"hello"}]}"#;
    client.post_with(CHAT, body, "authorization: Bearer sk-of-bob-in-search-team\r\n");
    assert_eq!(client.answer().status, 200);
    assert_eq!(&*gateway.await_records(1)[0].organization, "acme");
    let output = gateway.command(&["usage", "--by", "organization", "--format", "csv"]);
    let csv = String::from_utf8(output.stdout).expect("text");
    assert!(csv.contains("\r\nacme,1,1,"), "{csv}");
}
