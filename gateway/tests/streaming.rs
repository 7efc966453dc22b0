//! Streams arrive whole, in order, as they come, with their usage counted.

mod support;

use support::{
    Setup,
    client::{Client, chat, expected_content},
    fleet,
};

#[test]
fn a_stream_arrives_whole_and_its_usage_is_counted_and_hidden() {
    let fleet = fleet("tokens=20,pace=1ms,first=1ms");
    let gateway = Setup::new(fleet.url()).start();
    let mut client = Client::connect(gateway.addr());
    client.post("/v1/chat/completions", &chat("fast", true));
    let answer = client.answer();
    assert_eq!(answer.status, 200);
    assert_eq!(answer.content(), expected_content(20));
    assert_eq!(answer.events().last().map(String::as_str), Some("[DONE]"));
    assert!(!answer.text().contains("\"usage\":{"), "{}", answer.text());
    let records = gateway.await_records(1);
    assert_eq!(records[0].usage.completion, 20);
    assert_eq!(
        answer.field("x-request-id"),
        Some(records[0].id.to_string().as_str())
    );
}
