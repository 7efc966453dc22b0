//! Streams arrive whole, in order, as they come, with their usage counted. Everything runs on both engines.

mod support;

use std::{
    io::Write,
    sync::{Mutex, mpsc},
    time::Duration,
};

use gateway::{
    bounds::{ANSWER_BYTES_MAX, EVENT_BYTES_MAX},
    dialect::Api,
    ledger::record::{Flags, Outcome},
};
use gateway_bench::load;
use support::{
    Gateway, KEY, Setup,
    client::{Answer, Client, chat, expected_content},
    eventually, fleet,
    scripted::{STREAM_HEAD, Scripted, Then, chunk, token},
};

const CHAT: &str = "/v1/chat/completions";

/// Each test once on the engine that the host's kernel gives (io_uring where it can), once on epoll.
macro_rules! on_both_engines {
    ($($test:ident),* $(,)?) => {
        mod best_engine { $(#[test] fn $test() { super::$test("auto") })* }
        mod epoll { $(#[test] fn $test() { super::$test("epoll") })* }
    };
}

on_both_engines!(
    a_stream_arrives_whole_and_its_usage_is_counted_and_hidden,
    a_thousand_streams_at_once_lose_not_one_token,
    a_stream_may_be_cut_at_every_byte,
    every_event_leaves_before_the_next_is_there,
    usage_is_shown_to_those_who_asked_and_counted_for_all,
    whatever_is_no_usage_event_is_passed_on,
    a_huge_event_is_passed_on,
    an_old_client_gets_a_stream_that_ends_with_the_connection,
    the_other_apis_stream_too,
    plain_answers_come_in_any_framing,
    an_answer_too_long_to_keep_is_relayed_whole,
    a_slow_reader_holds_back_its_own_upstream_and_nobody_else,
    one_connection_serves_many_requests,
);

fn gateway(upstream: &str, driver: &str, models: &[(&str, &str)]) -> Gateway {
    let mut setup = Setup::new(upstream).workers(2, driver);
    for (name, words) in models {
        setup = setup.model(name, words);
    }
    setup.start()
}

fn ask(gateway: &Gateway, path: &str, body: &str) -> Answer {
    let mut client = Client::connect(gateway.addr());
    client.post(path, body);
    client.answer()
}

fn a_stream_arrives_whole_and_its_usage_is_counted_and_hidden(driver: &str) {
    let fleet = fleet("tokens=20,pace=1ms,first=1ms,cached=1,reasoning=2");
    let gateway = gateway(&fleet.url(), driver, &[]);
    let answer = ask(&gateway, CHAT, &chat("fast", true));
    assert_eq!(answer.status, 200);
    assert!(
        answer
            .field("content-type")
            .is_some_and(|t| t.starts_with("text/event-stream"))
    );
    assert_eq!(answer.content(), expected_content(20));
    assert_eq!(answer.events().last().map(String::as_str), Some("[DONE]"));
    assert!(!answer.text().contains("\"usage\":{"), "{}", answer.text());
    let records = gateway.await_records(1);
    let usage = records[0].usage;
    assert_eq!((usage.completion, usage.reasoning, usage.cached), (22, 2, 1));
    assert_eq!((records[0].outcome, records[0].status), (Outcome::Complete, 200));
    assert!(records[0].flags.has(Flags::STREAM) && !records[0].flags.has(Flags::ESTIMATED));
    assert!(records[0].ttft_us > 0 && records[0].duration_us >= records[0].ttft_us);
    assert_eq!(records[0].bytes_out, answer.body.len() as u64);
    assert_eq!(
        answer.field("x-request-id"),
        Some(records[0].id.to_string().as_str())
    );
}

fn a_thousand_streams_at_once_lose_not_one_token(driver: &str) {
    let fleet = fleet("tokens=12,pace=50ms,first=300ms");
    let gateway = gateway(&fleet.url(), driver, &[]);
    let report = load::run(&load::Options {
        url: format!("http://{}{CHAT}", gateway.addr()),
        key: Some(KEY.into()),
        model: "fast".into(),
        connections: 1_000,
        requests: Some(1_000),
        expect_tokens: Some(12),
        ..load::Options::default()
    })
    .expect("a run");
    assert!(report.is_sound(), "{report}\n{:?}", report.first_error);
    assert_eq!((report.ok, report.tokens), (1_000, 12_000), "{report}");
    let records = gateway.await_records(1_000);
    assert_eq!(records.len(), 1_000);
    assert!(
        records
            .iter()
            .all(|r| r.outcome == Outcome::Complete && r.usage.completion == 12)
    );
    assert_eq!(fleet.stats().streams_completed, 1_000);
}

fn a_stream_may_be_cut_at_every_byte(driver: &str) {
    let fleet = fleet("tokens=15,pace=0,first=0,comment=4,azure");
    let words = [
        "split=1",
        "split=1,crlf",
        "split=2,crlf",
        "split=7",
        "split=1,unframed",
        "split=3,crlf,unframed",
    ];
    let models: Vec<(&str, String)> = words
        .iter()
        .map(|words| (*words, format!("sim:{words}")))
        .collect();
    let models: Vec<(&str, &str)> = models
        .iter()
        .map(|(name, model)| (*name, model.as_str()))
        .collect();
    let gateway = gateway(&fleet.url(), driver, &models);
    let shown =
        |model: &str| chat(model, true).replace("}]}", "}],\"stream_options\":{\"include_usage\":true}}");
    for (count, words) in words.into_iter().enumerate() {
        let hidden = ask(&gateway, CHAT, &chat(words, true));
        assert_eq!(hidden.content(), expected_content(15), "{words}");
        assert_eq!(hidden.events().last().map(String::as_str), Some("[DONE]"));
        assert!(
            !hidden.text().contains("\"usage\":{"),
            "{words}: {}",
            hidden.text()
        );
        assert!(hidden.text().contains(": keep-alive"));
        let shown = ask(&gateway, CHAT, &shown(words));
        assert_eq!(shown.content(), expected_content(15), "{words}");
        assert_eq!(shown.events().len(), hidden.events().len() + 1, "{words}");
        let records = gateway.await_records(2 * count + 2);
        assert!(
            records
                .iter()
                .all(|r| r.usage.completion == 15 && !r.flags.has(Flags::ESTIMATED)),
            "{words}"
        );
    }
}

/// The upstream sends an event only when the client has got the one before.
fn every_event_leaves_before_the_next_is_there(driver: &str) {
    let (go, permits) = mpsc::channel::<&str>();
    let permits = Mutex::new(permits);
    let upstream = Scripted::start(move |socket, _| {
        let _ = socket.write_all(STREAM_HEAD.as_bytes());
        for piece in permits.lock().expect("no panic while locked").iter() {
            let _ = socket.write_all(piece.as_bytes());
        }
        Then::Close
    });
    let gateway = gateway(&upstream.url(), driver, &[]);
    let mut client = Client::connect(gateway.addr());
    client.post(CHAT, &chat("fast", true));
    // The head does not wait for the first event either.
    let head = client.receive_until(b"\r\n\r\n");
    assert!(head.starts_with(b"HTTP/1.1 200 OK\r\n"));
    for event in [
        token("a"),
        ": ping\n\n".into(),
        token("b"),
        "data: {\"choices\":[]}\n\n".into(),
    ] {
        go.send(chunk(&event).leak()).expect("the upstream");
        client.receive_until(chunk(&event).as_bytes());
        assert!(client.pending().is_empty());
    }
    // Where the usage is hidden, an event is sent when it is whole, and together with what makes it whole.
    let event = token("cut");
    let (first, last) = event.split_at(20);
    go.send(chunk(first).leak()).expect("the upstream");
    go.send(chunk(last).leak()).expect("the upstream");
    client.receive_until(chunk(&event).as_bytes());
    go.send("0\r\n\r\n").expect("the upstream");
    client.receive_until(b"0\r\n\r\n");
    drop(go);
}

fn usage_is_shown_to_those_who_asked_and_counted_for_all(driver: &str) {
    let fleet = fleet("tokens=5,pace=0,first=0");
    let gateway = gateway(
        &fleet.url(),
        driver,
        &[("never", "sim:usage=off"), ("always", "sim:usage=always")],
    );
    let body = |model: &str, options: &str| {
        format!(
            r#"{{"model":"{model}",{options}"stream":true,"messages":[{{"role":"user","content":"hello there"}}]}}"#
        )
    };
    let table = [
        ("", false),
        (r#""stream_options":null,"#, false),
        (r#""stream_options":{},"#, false),
        (r#""stream_options": { "include_usage" : false } ,"#, false),
        (r#""stream_options":{"include_usage":null},"#, false),
        (r#""stream_options":{"other":[1],"include_usage":false},"#, false),
        (r#""stream_options":{"other":{"include_usage":true}},"#, false),
        (r#""stream_options":{"include_usage":true},"#, true),
        (r#""stream_options":{"include_usage":true,"other":1},"#, true),
    ];
    for (count, (options, shown)) in table.into_iter().enumerate() {
        let answer = ask(&gateway, CHAT, &body("fast", options));
        assert_eq!(
            answer.content(),
            expected_content(5),
            "{options}: {}",
            answer.text()
        );
        assert_eq!(
            answer.text().contains("\"usage\":{"),
            shown,
            "{options}: {}",
            answer.text()
        );
        let sent: serde_json::Value = serde_json::from_slice(&fleet.last().body).expect("JSON");
        assert_eq!(sent["stream_options"]["include_usage"], true, "{options}: {sent}");
        assert_eq!(
            sent["stream_options"]["other"].is_null(),
            !options.contains("other"),
            "{sent}"
        );
        let records = gateway.await_records(count + 1);
        assert!(
            records
                .iter()
                .all(|r| r.usage.completion == 5 && !r.flags.has(Flags::ESTIMATED))
        );
    }
    // A server that tells nothing is estimated; one that tells unasked is heard.
    let estimated = ask(&gateway, CHAT, &body("never", ""));
    assert_eq!(estimated.content(), expected_content(5));
    let records = gateway.await_records(table.len() + 1);
    let record = records
        .iter()
        .find(|record| &*record.model == "never")
        .expect("a record");
    assert!(record.flags.has(Flags::ESTIMATED) && record.outcome == Outcome::Complete);
    // The opening and the closing event, and what their envelopes have more than a token's, are in it.
    assert!(
        (5..=5 + 2 * 16).contains(&record.usage.completion),
        "{:?}",
        record.usage
    );
    ask(&gateway, CHAT, &body("always", ""));
    let records = gateway.await_records(table.len() + 2);
    let record = records
        .iter()
        .find(|record| &*record.model == "always")
        .expect("a record");
    assert_eq!(record.usage.completion, 5);
}

fn whatever_is_no_usage_event_is_passed_on(driver: &str) {
    let text = [
        ": a comment first\n\n",
        "data: {\"choices\":[],\"prompt_filter_results\":[{\"prompt_index\":0}]}\n\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"\\\"usage\\\":{\"}}],\"usage\":null}\n\n",
        "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":1}}\n\n",
        "event: custom\nid: 7\nretry: 10\ndata: {\"choices\":[{\"x\":1}]}\n\n",
        "data: not json at all\n\n",
        "\n\n",
        "data:{\"choices\":[{\"delta\":{\"content\":\"\u{e9}\u{1f600}\"}}]}\n\n",
    ]
    .concat();
    let usage = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":4}}\n\n";
    let done = "data: [DONE]\n\n";
    let upstream = Scripted::saying(
        format!("{STREAM_HEAD}{}0\r\n\r\n", chunk(&format!("{text}{usage}{done}"))),
        Then::Keep,
    );
    let gateway = gateway(&upstream.url(), driver, &[]);
    let answer = ask(&gateway, CHAT, &chat("fast", true));
    assert_eq!(answer.text(), format!("{text}{done}"));
    let records = gateway.await_records(1);
    assert_eq!((records[0].usage.prompt, records[0].usage.completion), (3, 4));
}

fn a_huge_event_is_passed_on(driver: &str) {
    let fleet = fleet("tokens=4,pace=0,first=0");
    let huge = 3 * EVENT_BYTES_MAX;
    let models = [
        ("huge", format!("sim:huge={huge}")),
        ("split", format!("sim:huge={huge},split=50000,unframed")),
    ];
    let models = models.each_ref().map(|(name, words)| (*name, words.as_str()));
    let gateway = gateway(&fleet.url(), driver, &models);
    for (name, _) in models {
        for options in ["", r#""stream_options":{"include_usage":true},"#] {
            let body = chat(name, true).replace("\"stream\"", &format!("{options}\"stream\""));
            let answer = ask(&gateway, CHAT, &body);
            let content = answer.content();
            assert!(content.len() > huge && content.starts_with("t0...") && content.ends_with(". t1 t2 t3 "));
            assert_eq!(answer.text().contains("\"usage\":{"), !options.is_empty());
            assert_eq!(answer.events().last().map(String::as_str), Some("[DONE]"));
        }
    }
    let records = gateway.await_records(4);
    assert!(
        records
            .iter()
            .all(|record| record.usage.completion == 4 && record.outcome == Outcome::Complete)
    );
}

fn an_old_client_gets_a_stream_that_ends_with_the_connection(driver: &str) {
    let fleet = fleet("tokens=5,pace=1ms,first=0");
    let gateway = gateway(&fleet.url(), driver, &[]);
    let body = chat("fast", true);
    for connection in ["", "connection: keep-alive\r\n"] {
        let mut client = Client::connect(gateway.addr());
        client.send(format!(
            "POST {CHAT} HTTP/1.0\r\nauthorization: Bearer {KEY}\r\n{connection}content-length: {}\r\n\r\n{body}",
            body.len()
        ));
        let answer = client.answer();
        assert_eq!((answer.status, answer.content()), (200, expected_content(5)));
        assert_eq!(answer.field("transfer-encoding"), None);
        assert_eq!(answer.field("connection"), Some("close"));
        assert!(answer.text().ends_with("data: [DONE]\n\n"), "{}", answer.text());
    }
    assert!(
        gateway
            .await_records(2)
            .iter()
            .all(|record| record.usage.completion == 5)
    );
}

fn the_other_apis_stream_too(driver: &str) {
    let fleet = fleet("tokens=6,pace=0,first=0");
    let gateway = gateway(
        &fleet.url(),
        driver,
        &[("split", "sim:split=1,crlf"), ("cut", "sim:die=fin,after=3")],
    );
    let responses = |model: &str| format!(r#"{{"model":"{model}","stream":true,"input":"hello there"}}"#);
    for model in ["fast", "split"] {
        let answer = ask(&gateway, "/v1/responses", &responses(model));
        let text = answer.text().replace("\r\n", "\n");
        assert_eq!(
            text.matches("event: response.output_text.delta\n").count(),
            6,
            "{text}"
        );
        assert!(text.contains("event: response.completed\n") && text.contains("\"output_tokens\":6"));
        assert!(!String::from_utf8_lossy(&fleet.last().body).contains("stream_options"));
        let answer = ask(
            &gateway,
            "/v1/completions",
            &format!(r#"{{"model":"{model}","stream":true,"prompt":"hello there"}}"#),
        );
        assert!(answer.text().contains("\"text\":\"t5 \"") && answer.text().contains("[DONE]"));
        assert!(!answer.text().contains("\"usage\":{"));
    }
    let records = gateway.await_records(4);
    assert!(
        records
            .iter()
            .all(|r| r.usage.completion == 6 && r.outcome == Outcome::Complete),
        "{records:?}"
    );
    assert_eq!(
        records
            .iter()
            .filter(|record| record.api == Api::Responses)
            .count(),
        2
    );
    // Its errors are events of its own kind.
    let answer = ask(&gateway, "/v1/responses", &responses("cut"));
    let events = answer.events();
    let last: serde_json::Value = serde_json::from_str(&events[events.len() - 1]).expect("JSON");
    assert_eq!(
        (&last["type"], &last["code"]),
        (&"error".into(), &"upstream_cut".into())
    );
    assert!(answer.text().contains("\n\nevent: error\ndata: "));
}

fn plain_answers_come_in_any_framing(driver: &str) {
    let fleet = fleet("tokens=5,first=0");
    let gateway = gateway(
        &fleet.url(),
        driver,
        &[("unframed", "sim:unframed"), ("close", "sim:close")],
    );
    for model in ["fast", "unframed", "close"] {
        let answer = ask(&gateway, CHAT, &chat(model, false));
        assert_eq!(answer.status, 200);
        assert_eq!(
            answer.json()["choices"][0]["message"]["content"],
            expected_content(5)
        );
        assert!(answer.keep_alive, "the upstream's connection is not the client's");
    }
    let answer = ask(
        &gateway,
        "/v1/embeddings",
        r#"{"model":"fast","input":["hello there"]}"#,
    );
    assert_eq!(
        answer.json()["data"][0]["embedding"].as_array().map(Vec::len),
        Some(8)
    );
    let records = gateway.await_records(4);
    let embedding = records
        .iter()
        .find(|record| record.api == Api::Embeddings)
        .expect("a record");
    assert!(
        embedding.usage.prompt > 0
            && embedding.usage.completion == 0
            && !embedding.flags.has(Flags::ESTIMATED)
    );
    assert_eq!(
        records
            .iter()
            .filter(|record| record.usage.completion == 5)
            .count(),
        3
    );

    let json = r#"{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":8}}"#;
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n";
    let chunks: String = json
        .as_bytes()
        .chunks(5)
        .map(|part| chunk(&String::from_utf8_lossy(part)))
        .collect();
    for bytes in [
        format!("{head}transfer-encoding: chunked\r\n\r\n{chunks}0\r\nx-trailer: 1\r\n\r\n"),
        format!("{head}content-length: {}\r\n\r\n{json}", json.len()),
        format!("HTTP/1.1 102 Processing\r\n\r\n{head}\r\n{json}"),
    ] {
        let upstream = Scripted::saying(bytes, Then::Close);
        let gateway = gateway_of(&upstream, driver);
        assert_eq!(ask(&gateway, CHAT, &chat("fast", false)).text(), json);
        let records = gateway.await_records(1);
        assert_eq!((records[0].usage.prompt, records[0].usage.completion), (7, 8));
    }
    let upstream = Scripted::saying("HTTP/1.1 204 No Content\r\n\r\n", Then::Close);
    let answer = ask(&gateway_of(&upstream, driver), CHAT, &chat("fast", false));
    assert_eq!((answer.status, answer.body.len()), (204, 0));
}

fn gateway_of(upstream: &Scripted, driver: &str) -> Gateway {
    gateway(&upstream.url(), driver, &[])
}

fn an_answer_too_long_to_keep_is_relayed_whole(driver: &str) {
    let fleet = fleet("first=0");
    let size = 64 << 10;
    let tokens = 3 * ANSWER_BYTES_MAX / size;
    let words = format!("sim:tokens={tokens},size={size}");
    let models = [
        ("long", words.clone()),
        ("unframed", format!("{words},unframed")),
        ("cut", format!("{words},die=fin,after=1")),
    ];
    let models = models.each_ref().map(|(name, words)| (*name, words.as_str()));
    let gateway = gateway(&fleet.url(), driver, &models);
    for name in ["long", "unframed"] {
        let answer = ask(&gateway, CHAT, &chat(name, false));
        let json = answer.json();
        let content = json["choices"][0]["message"]["content"]
            .as_str()
            .expect("content");
        assert_eq!(content.len(), tokens * size);
        for (index, token) in content.as_bytes().chunks(size).enumerate() {
            assert!(
                token.starts_with(format!("t{index}.").as_bytes()) && token.ends_with(b". "),
                "{index}"
            );
        }
    }
    for record in gateway.await_records(2) {
        assert_eq!(
            (record.usage.completion, record.outcome),
            (tokens as u64, Outcome::Complete)
        );
        assert!(!record.flags.has(Flags::ESTIMATED));
    }
    // What is cut must not look whole.
    let mut client = Client::connect(gateway.addr());
    client.post(CHAT, &chat("cut", false));
    assert!(client.try_answer().is_err());
    let records = gateway.await_records(3);
    assert!(
        records
            .iter()
            .any(|record| record.outcome == Outcome::UpstreamFailed && record.usage.completion > 0)
    );
}

fn a_slow_reader_holds_back_its_own_upstream_and_nobody_else(driver: &str) {
    const TOKENS: u64 = 60_000;
    let fleet = fleet("tokens=20,pace=1ms,first=0");
    let gateway = Setup::new(fleet.url())
        .workers(1, driver)
        .model("flood", &format!("sim:tokens={TOKENS},pace=0,size=1000"))
        .start();
    ask(&gateway, CHAT, &chat("fast", true));
    let (before, sent_before) = (resident_bytes(&gateway), fleet.stats().tokens_sent);
    let mut slow = Client::connect(gateway.addr());
    socket2::SockRef::from(&slow.socket)
        .set_recv_buffer_size(64 << 10)
        .expect("an option");
    slow.post(CHAT, &chat("flood", true));
    slow.receive_until(b"\"t0");
    // It stands still when a whole series of looks sees the same figure.
    let (mut last, mut same) = (0, 0);
    eventually("the upstream held back", || {
        let sent = fleet.stats().tokens_sent;
        same = if sent == last { same + 1 } else { 0 };
        last = sent;
        (same > 40).then_some(())
    });
    let stopped_at = fleet.stats().tokens_sent - sent_before;
    assert!(
        stopped_at < TOKENS / 2,
        "{stopped_at} tokens of a thousand bytes lie between"
    );
    // Meanwhile, on the same core: others stream as ever.
    for _ in 0..3 {
        assert_eq!(
            ask(&gateway, CHAT, &chat("fast", true)).content(),
            expected_content(20)
        );
    }
    let grown = resident_bytes(&gateway).saturating_sub(before);
    // Some tens of KiB of its own; the rest are buffers that all connections of the core share, 8 MiB at most.
    assert!(grown < 12 << 20, "{grown} bytes for one slow reader");
    // When it reads on, nothing is missing.
    let rest = slow.receive_until(b"[DONE]\n\n");
    let finder = memchr::memmem::Finder::new(b"\"content\":\"t");
    let mut expected = 1;
    for at in finder.find_iter(&rest) {
        let digits = &rest[at + 12..];
        let end = digits.iter().position(|b| !b.is_ascii_digit()).expect("dots");
        assert_eq!(digits[..end], *expected.to_string().as_bytes());
        expected += 1;
    }
    assert_eq!(expected, TOKENS);
    gateway.await_records(5);
    // One that never reads on and goes is noticed all the same.
    let mut gone = Client::connect(gateway.addr());
    gone.post(CHAT, &chat("flood", true));
    gone.receive_until(b"\"t0");
    drop(gone);
    eventually("the upstream cancelled", || {
        (fleet.stats().streams_aborted == 1).then_some(())
    });
    let records = gateway.await_records(6);
    assert_eq!(
        records
            .iter()
            .filter(|record| record.outcome == Outcome::ClientGone)
            .count(),
        1
    );
}

/// What the process occupies in memory (proc_pid_status(5), `VmRSS`).
/// Anonymous memory alone: a journal segment that is mapped meanwhile is none of a stream's.
fn resident_bytes(gateway: &Gateway) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", gateway.pid())).expect("a process");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .expect("a size");
    line.trim()
        .trim_end_matches(" kB")
        .parse::<u64>()
        .expect("a number")
        * 1024
}

fn one_connection_serves_many_requests(driver: &str) {
    let fleet = fleet("tokens=5,pace=0,first=0");
    let gateway = Setup::new(fleet.url()).workers(1, driver).start();
    let mut client = Client::connect(gateway.addr());
    for round in 0..30 {
        client.post(CHAT, &chat("fast", round % 2 == 0));
        let answer = client.answer();
        assert_eq!((answer.status, answer.keep_alive), (200, true));
        assert!(answer.text().contains("t4 "));
    }
    client
        .socket
        .set_read_timeout(Some(Duration::from_millis(50)))
        .expect("an option");
    assert!(!client.is_closed());
    assert_eq!(gateway.await_records(30).len(), 30);
    assert_eq!(fleet.stats().connections_total, 1);
}
