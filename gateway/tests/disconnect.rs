//! What becomes of an answer whose client hangs up: cancelled and estimated, or read on for its true usage.

mod support;

use std::time::Duration;

use gateway::ledger::record::{Flags, Outcome};
use support::{
    Gateway, Setup,
    client::{Client, chat},
    eventually, fleet,
};

const CHAT: &str = "/v1/chat/completions";

fn draining(setup: &Setup) -> Gateway {
    let config = setup.config().replace(
        "key: upstream-secret,",
        "key: upstream-secret, on_disconnect: drain,",
    );
    assert!(config.contains("on_disconnect: drain"));
    Gateway::start(&config)
}

/// Begins a stream and hangs up after its first token.
fn hang_up(gateway: &Gateway, model: &str) {
    let mut client = Client::connect(gateway.addr());
    client.post(CHAT, &chat(model, true));
    client.receive_until(b"\"t0 \"");
}

#[test]
fn a_stream_is_read_on_and_the_books_have_the_providers_figures() {
    let fleet = fleet("tokens=40,pace=5ms,first=0,cached=1");
    let prices = "prices: [{ model: \"*\", input: 1, output: 2, cached_input: 0.5 }]\n";
    let gateway = draining(&Setup::new(fleet.url()).workers(1, "auto").more(prices));
    hang_up(&gateway, "fast");
    // The client's slot is free long before the record is there.
    let record = &gateway.await_records(1)[0];
    assert_eq!(record.outcome, Outcome::ClientGone);
    assert!(
        record.flags.has(Flags::DRAINED) && !record.flags.has(Flags::ESTIMATED),
        "{record:?}"
    );
    assert_eq!((record.usage.completion, record.usage.cached), (40, 1));
    let cost = (record.usage.prompt - 1) * 1000 + 500 + 40 * 2000;
    assert_eq!(record.cost, Some(cost));
    assert_eq!(fleet.stats().streams_aborted, 0);
    // The upstream's connection is kept for the next request.
    let mut client = Client::connect(gateway.addr());
    client.post(CHAT, &chat("fast", true));
    assert_eq!(client.answer().status, 200);
    let text = gateway.admin("GET /metrics", "").text();
    assert!(text.contains("\ngateway_answers_drained_total 1\n"), "{text}");
    assert!(
        text.contains("\ngateway_upstream_connections_total 1\n"),
        "{text}"
    );
}

#[test]
fn without_it_the_upstream_is_cancelled_and_the_use_estimated() {
    let fleet = fleet("tokens=4000,pace=5ms,first=0");
    let gateway = Setup::new(fleet.url()).start();
    hang_up(&gateway, "fast");
    eventually("the upstream's work cancelled", || {
        (fleet.stats().streams_aborted == 1).then_some(())
    });
    let record = &gateway.await_records(1)[0];
    assert_eq!(record.outcome, Outcome::ClientGone);
    assert!(
        record.flags.has(Flags::ESTIMATED) && !record.flags.has(Flags::DRAINED),
        "{record:?}"
    );
    assert!(record.usage.completion < 4000, "{record:?}");
}

#[test]
fn an_answer_that_is_not_streamed_is_read_on_too() {
    let fleet = fleet("tokens=6,pace=0,first=0");
    let setup = Setup::new(fleet.url())
        .model("head", "sim:tokens=6,slowhead=400ms")
        .model("body", "sim:tokens=6,first=400ms");
    let gateway = draining(&setup);
    for (place, model) in ["head", "body"].into_iter().enumerate() {
        let mut client = Client::connect(gateway.addr());
        client.post(CHAT, &chat(model, false));
        eventually("the request upstream", || {
            (fleet.stats().requests > place as u64).then_some(())
        });
        drop(client);
    }
    for record in gateway.await_records(2) {
        assert_eq!(record.outcome, Outcome::ClientGone);
        assert!(
            record.flags.has(Flags::DRAINED) && !record.flags.has(Flags::ESTIMATED),
            "{record:?}"
        );
        assert_eq!((record.usage.completion, record.status), (6, 0), "{record:?}");
    }
    assert_eq!(fleet.stats().plain_aborted, 0);
}

/// Nobody can know what an upstream had generated that tells it with its last byte: the books have the input, and say so.
#[test]
fn an_answer_that_is_not_streamed_is_cancelled_and_its_input_charged() {
    let fleet = fleet("tokens=6,pace=0,first=1h");
    let setup = Setup::new(fleet.url()).model("head", "sim:tokens=6,slowhead=1h");
    let gateway = setup.start();
    for (place, model) in ["fast", "head"].into_iter().enumerate() {
        let mut client = Client::connect(gateway.addr());
        client.post(CHAT, &chat(model, false));
        eventually("the request upstream", || {
            (fleet.stats().requests > place as u64).then_some(())
        });
        drop(client);
        eventually("the upstream's work cancelled", || {
            (fleet.stats().plain_aborted > place as u64).then_some(())
        });
    }
    for record in gateway.await_records(2) {
        assert_eq!(record.outcome, Outcome::ClientGone);
        assert!(
            record.flags.has(Flags::ESTIMATED) && !record.flags.has(Flags::DRAINED),
            "{record:?}"
        );
        assert!(record.usage.prompt > 0, "{record:?}");
        assert_eq!(record.usage.completion, 0, "{record:?}");
    }
}

#[test]
fn what_is_read_on_of_a_provider_that_tells_nothing_is_estimated_by_its_text() {
    let fleet = fleet("tokens=60,pace=0,first=400ms,usage=off");
    let gateway = draining(&Setup::new(fleet.url()));
    let mut client = Client::connect(gateway.addr());
    client.post(CHAT, &chat("fast", false));
    eventually("the request upstream", || {
        (fleet.stats().requests > 0).then_some(())
    });
    drop(client);
    let record = &gateway.await_records(1)[0];
    assert!(
        record.flags.has(Flags::DRAINED) && record.flags.has(Flags::ESTIMATED),
        "{record:?}"
    );
    // Words of three or four bytes, by the rule of four bytes a token.
    assert!((30..=120).contains(&record.usage.completion), "{record:?}");
}

#[test]
fn reading_on_is_bounded_and_what_is_not_told_by_then_is_estimated() {
    let fleet = fleet("tokens=100000000,pace=0,first=0,size=4096");
    let gateway = draining(&Setup::new(fleet.url()));
    let mut client = Client::connect(gateway.addr());
    client.post(CHAT, &chat("fast", true));
    client.receive_until(b"data: ");
    drop(client);
    let record = &gateway.await_records(1)[0];
    assert_eq!(record.outcome, Outcome::ClientGone);
    assert!(
        record.flags.has(Flags::DRAINED) && record.flags.has(Flags::ESTIMATED),
        "{record:?}"
    );
    // 16 MiB of text by the rule of thumb, give or take what the client took.
    assert!(
        (3 << 20..8 << 20).contains(&record.usage.completion),
        "{record:?}"
    );
    eventually("the upstream's work cancelled", || {
        (fleet.stats().streams_aborted == 1).then_some(())
    });
}

#[test]
fn a_gateway_that_is_stopped_waits_for_it_as_for_any_request_and_then_writes_the_record() {
    let fleet = fleet("tokens=60,pace=20ms,first=0");
    let mut gateway = draining(&Setup::new(fleet.url()));
    hang_up(&gateway, "fast");
    eventually("reading on", || {
        let text = gateway.admin("GET /metrics", "").text();
        text.contains("\ngateway_answers_drained_total 1\n").then_some(())
    });
    gateway.signal(libc::SIGTERM);
    assert!(gateway.wait().success());
    let record = &gateway.records()[0];
    assert_eq!(
        (record.usage.completion, record.outcome),
        (60, Outcome::ClientGone),
        "{record:?}"
    );
    // Told to end at once, it ends at once, and there is a record all the same.
    let setup = Setup::new(fleet.url())
        .model("long", "sim:tokens=100000,pace=20ms,first=0")
        .more("drain: 0s\n");
    let mut gateway = draining(&setup);
    hang_up(&gateway, "long");
    eventually("reading on", || {
        let text = gateway.admin("GET /metrics", "").text();
        text.contains("\ngateway_answers_drained_total 1\n").then_some(())
    });
    let began = std::time::Instant::now();
    gateway.signal(libc::SIGTERM);
    assert!(gateway.wait().success());
    assert!(began.elapsed() < Duration::from_secs(20));
    let records = gateway.records();
    assert_eq!(records.len(), 1);
    assert!(records[0].flags.has(Flags::ESTIMATED), "{:?}", records[0]);
}

#[test]
fn limits_bind_what_is_read_on() {
    // Half a minute of tokens, which nobody gets.
    let fleet = fleet("tokens=3000,pace=10ms,first=0");
    let gateway =
        draining(&Setup::new(fleet.url()).limits("  - { name: tight, output_tokens: 40, every: 1mo }"));
    hang_up(&gateway, "fast");
    let record = &gateway.await_records(1)[0];
    assert!(
        record.flags.has(Flags::DRAINED) && record.flags.has(Flags::CUT),
        "{record:?}"
    );
    assert!((39..=42).contains(&record.usage.completion), "{record:?}");
    eventually("the upstream to be let go", || {
        (fleet.stats().streams_open == 0).then_some(())
    });
}

#[test]
fn what_is_read_on_takes_more_of_a_limit_that_has_it() {
    let fleet = fleet("tokens=200,pace=2ms,first=0");
    let setup = Setup::new(fleet.url()).limits("  - { output_tokens: 10000, every: 1mo }");
    // A request without a limit of its own reserves little, and its answer is longer.
    let config = setup.config().replace(
        "key: upstream-secret,",
        "key: upstream-secret, on_disconnect: drain,",
    );
    let config = config.replace("name: \"fast\",", "name: \"fast\", max_output_tokens: 20,");
    assert!(config.contains("max_output_tokens"));
    let gateway = Gateway::start(&config);
    hang_up(&gateway, "fast");
    let record = &gateway.await_records(1)[0];
    assert!(
        !record.flags.has(Flags::CUT) && !record.flags.has(Flags::ESTIMATED),
        "{record:?}"
    );
    assert_eq!(record.usage.completion, 200);
}
