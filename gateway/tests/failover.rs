//! An endpoint or a target that cannot answer costs the client nothing while another one can, and connections upstream are
//! used again.

mod support;

use gateway::ledger::record::{Flags, Outcome, Record};
use support::{
    Gateway, Setup,
    client::{Answer, Client, chat, expected_content},
    fleet,
    scripted::{Scripted, Then, refusing},
};

const CHAT: &str = "/v1/chat/completions";

/// Answers to a stream and to a plain request.
fn ask(gateway: &Gateway, model: &str, stream: bool) -> (Client, Answer) {
    let mut client = Client::connect(gateway.addr());
    client.post(CHAT, &chat(model, stream));
    let answer = client.answer();
    (client, answer)
}

#[test]
fn a_stale_kept_connection_costs_the_client_nothing() {
    for words in ["stale=on", "stale=now"] {
        let fleet = fleet(&format!("tokens=3,pace=0,first=0,{words}"));
        let gateway = Setup::new(fleet.url()).workers(1, "auto").start();
        let mut client = Client::connect(gateway.addr());
        for round in 0..6 {
            client.post(CHAT, &chat("fast", round % 2 == 0));
            let answer = client.answer();
            assert_eq!(answer.status, 200, "{words} round {round}: {}", answer.text());
            assert!(answer.text().contains("t2 "));
        }
        let records = gateway.await_records(6);
        assert_eq!(records.len(), 6);
        assert!(
            records
                .iter()
                .all(|r| r.outcome == Outcome::Complete && r.usage.completion == 3)
        );
        assert_eq!(fleet.stats().streams_completed, 3);
    }
}

#[test]
fn a_kept_connection_is_used_again() {
    let fleet = fleet("tokens=3,pace=0,first=0");
    let gateway = Setup::new(fleet.url()).workers(1, "auto").start();
    for round in 0..10 {
        let (_, answer) = ask(&gateway, "fast", round % 2 == 0);
        assert_eq!(answer.status, 200);
    }
    assert_eq!(fleet.stats().connections_total, 1);
}

#[test]
fn another_target_answers_when_the_first_cannot() {
    let second = fleet("tokens=3,pace=0,first=0");
    let (_held, dead) = refusing();
    let first = fleet("tokens=3,pace=0,first=0");
    for (url, status) in [(dead, None), (first.url(), Some(503)), (first.url(), Some(429))] {
        if let Some(status) = status {
            let mut behaviour = gateway_bench::upstream::Behaviour::default();
            behaviour.apply(&format!("status={status}")).expect("words");
            first.set_behaviour(behaviour);
        }
        let gateway = Setup::new(url).fallback(second.url()).start();
        for stream in [true, false] {
            let (_, answer) = ask(&gateway, "pair", stream);
            assert_eq!(answer.status, 200, "{}", answer.text());
            assert!(answer.text().contains("t2 "));
        }
        assert_eq!(
            second.last().header("authorization").as_deref(),
            Some("Bearer other-secret")
        );
        let records = gateway.await_records(2);
        for record in &records {
            assert_eq!((record.outcome, &*record.provider), (Outcome::Complete, "other"));
            assert!(record.flags.has(Flags::FALLBACK));
        }
        // The second request may know already that the first target is down, and not ask it.
        let retried = |record: &Record| record.flags.has(Flags::RETRIED);
        assert!(records.iter().any(retried) && (status.is_none() || records.iter().all(retried)));
        // Where there is no other target, the answer of the one that there is counts.
        if let Some(status) = status {
            let (_, answer) = ask(&gateway, "fast", true);
            assert_eq!(answer.status, status);
            assert_eq!(
                answer.json()["error"]["message"],
                format!("simulated status {status}")
            );
            assert_eq!(answer.field("retry-after"), Some("1"));
        }
    }
}

#[test]
fn another_endpoint_answers_when_one_is_dead() {
    let (_held, dead) = refusing();
    let live = fleet("tokens=3,pace=0,first=0");
    let gateway = Setup::new(format!("{dead},{}", live.url())).start();
    for _ in 0..10 {
        let (_, answer) = ask(&gateway, "fast", true);
        assert_eq!(answer.content(), expected_content(3));
    }
    assert_eq!(gateway.await_records(10).len(), 10);
}

#[test]
fn another_target_answers_however_many_endpoints_of_the_first_are_dead() {
    let second = fleet("tokens=3,pace=0,first=0");
    let dead: Vec<_> = (0..5).map(|_| refusing()).collect();
    let urls: Vec<&str> = dead.iter().map(|(_, url)| url.as_str()).collect();
    let gateway = Setup::new(urls.join(",")).fallback(second.url()).start();
    for _ in 0..3 {
        let (_, answer) = ask(&gateway, "pair", true);
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
}

#[test]
fn the_record_names_the_target_whose_answer_counted() {
    let busy = Scripted::saying(
        "HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n",
        Then::Keep,
    );
    let (_held, dead) = refusing();
    let gateway = Setup::new(busy.url()).fallback(dead).start();
    let (_, answer) = ask(&gateway, "pair", false);
    assert_eq!(answer.status, 429);
    let records = gateway.await_records(1);
    assert_eq!(records.len(), 1);
    assert_eq!(&*records[0].provider, "sim");
}

#[test]
fn a_busy_endpoint_does_not_speak_for_its_siblings() {
    let (busy, well) = (fleet("status=503"), fleet("tokens=2,pace=0,first=0"));
    let gateway = Setup::new(format!("{},{}", busy.url(), well.url())).start();
    // Whichever of the two is asked first, the answer is the well one's.
    for _ in 0..4 {
        let mut client = Client::connect(gateway.addr());
        client.post(CHAT, &chat("fast", false));
        assert_eq!(client.answer().status, 200);
    }
    assert!(busy.stats().requests > 0);
    assert_eq!(well.stats().requests, 4);
}

#[test]
fn a_target_that_is_known_to_be_down_is_asked_last() {
    let (_held, dead) = refusing();
    let second = fleet("tokens=1,pace=0,first=0");
    // One core: what it has learned by the first request counts for the second.
    let gateway = Setup::new(dead).fallback(second.url()).workers(1, "auto").start();
    let mut client = Client::connect(gateway.addr());
    for _ in 0..2 {
        client.post(CHAT, &chat("pair", false));
        assert_eq!(client.answer().status, 200);
    }
    let records = gateway.await_records(2);
    let retried: Vec<bool> = records
        .iter()
        .map(|record| record.flags.has(Flags::RETRIED))
        .collect();
    assert_eq!(retried, [true, false]);
    assert!(records.iter().all(|record| record.flags.has(Flags::FALLBACK)));
}
