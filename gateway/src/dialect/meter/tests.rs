use super::*;
use proptest::prelude::*;

const CHUNK: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"hello\"}}],\"usage\":null}\n\n";
const USAGE: &str = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2}}\n\n";
const DONE: &str = "data: [DONE]\n\n";
const TOLD: Usage = Usage {
    prompt: 3,
    cached: 0,
    completion: 2,
    reasoning: 0,
    cache_write_5m: 0,
    cache_write_1h: 0,
    tier: crate::dialect::Tier::Default,
    clamped: false,
};

/// What a client receives when the stream comes in the given pieces.
fn relay(meter: &mut Meter, pieces: &[&[u8]]) -> String {
    let mut out = Vec::new();
    for piece in pieces {
        let mut piece = piece.to_vec();
        let range = meter.feed(&mut piece);
        out.extend_from_slice(meter.ready());
        out.extend_from_slice(&piece[range]);
    }
    out.extend_from_slice(&meter.finish());
    String::from_utf8(out).expect("text")
}

fn stream() -> String {
    format!("{CHUNK}: keep-alive\n\n{CHUNK}{USAGE}{DONE}")
}

#[test]
fn passes_everything_where_the_client_asked_for_usage() {
    for size in 1..=stream().len() {
        let mut meter = Meter::new(Api::ChatCompletions, false);
        let bytes = stream();
        let pieces: Vec<&[u8]> = bytes.as_bytes().chunks(size).collect();
        assert_eq!(relay(&mut meter, &pieces), stream());
        assert_eq!(meter.seen.usage, Some(TOLD));
        assert!(meter.seen.done && !meter.seen.failed);
    }
}

#[test]
fn hides_the_usage_event_at_every_cut() {
    for line_end in ["\n", "\r\n", "\r"] {
        let bytes = stream().replace('\n', line_end);
        let expected = bytes.replace(&USAGE.replace('\n', line_end), "");
        for size in 1..=bytes.len() {
            let mut meter = Meter::new(Api::ChatCompletions, true);
            let pieces: Vec<&[u8]> = bytes.as_bytes().chunks(size).collect();
            assert_eq!(relay(&mut meter, &pieces), expected, "pieces of {size}");
            assert_eq!(meter.seen.usage, Some(TOLD));
            assert_eq!(meter.seen.events, 2);
        }
    }
}

#[test]
fn a_usage_event_without_its_empty_line_is_hidden_too() {
    let bytes = format!("{CHUNK}{}", USAGE.trim_end());
    let mut meter = Meter::new(Api::ChatCompletions, true);
    assert_eq!(relay(&mut meter, &[bytes.as_bytes()]), CHUNK);
    assert_eq!(meter.seen.usage, Some(TOLD));
}

#[test]
fn an_event_that_is_too_long_is_passed_on_in_order() {
    let long = format!(
        "data: {{\"x\":\"{}\",\"usage\":{{\"prompt_tokens\":9}}}}\n\n",
        "y".repeat(3 << 20)
    );
    let bytes = format!("{CHUNK}{long}{CHUNK}{USAGE}");
    for hide in [false, true] {
        for size in [1000, 64 << 10, 1 << 20, 2 << 20, 5 << 20] {
            let mut meter = Meter::new(Api::ChatCompletions, hide);
            let pieces: Vec<&[u8]> = bytes.as_bytes().chunks(size).collect();
            let expected = if hide {
                bytes.replace(USAGE, "")
            } else {
                bytes.clone()
            };
            assert!(
                relay(&mut meter, &pieces) == expected,
                "hide {hide}, pieces of {size}"
            );
            assert!(meter.carry.capacity() <= CARRY_KEPT_BYTES);
            assert_eq!(meter.seen.usage, Some(TOLD));
        }
    }
}

#[test]
fn a_bounded_stream_ends_behind_the_event_that_goes_too_far() {
    let bytes = format!("{}{USAGE}{DONE}", CHUNK.repeat(9));
    for hide in [false, true] {
        for size in 1..=bytes.len() {
            let mut meter = Meter::new(Api::ChatCompletions, hide);
            // Each event is a token: 2 at first, 3 more when asked, then no more. The sixth goes too far.
            meter.bound(2, true, Arc::default());
            let (mut asked, mut out) = (Vec::new(), Vec::new());
            for piece in bytes.as_bytes().chunks(size) {
                let mut piece = piece.to_vec();
                let range = meter.feed_within(&mut piece, &mut |delivered| {
                    asked.push(delivered);
                    (asked.len() == 1).then_some(5)
                });
                out.extend_from_slice(meter.ready());
                out.extend_from_slice(&piece[range]);
                if meter.is_exhausted() {
                    break;
                }
            }
            assert_eq!(asked, [3, 6], "hide {hide}, pieces of {size}");
            assert_eq!(String::from_utf8(out).expect("text"), CHUNK.repeat(6));
            assert!(meter.opening().starts_with(b"{\"choices\""));
        }
    }
}

#[test]
fn of_the_first_event_only_what_names_the_stream_is_kept() {
    let chat = Api::ChatCompletions;
    let chunk =
        br#"{"id":"c","created":1, "model" : "m" , "choices" : [{"index":0,"delta":{}}],"usage":null}"#;
    assert_eq!(
        opening_of(chat, chunk),
        br#"{"id":"c","created":1, "model" : "m" }"#
    );
    let whole: [&[u8]; 7] = [
        br#"{"choices":[],"id":"c","model":"m"}"#,
        br#"{"id":"c","choices":[],"model":"m"}"#,
        br#"{"model":"a[b","choices":[]}"#,
        br#"{"model":"m","inner":{"a":1,"choices":[]}}"#,
        br#"{"model":"m","error":[]}"#,
        b"[DONE]",
        b"\"choices\":[",
    ];
    for data in whole {
        assert_eq!(opening_of(chat, data), data);
    }
    assert_eq!(opening_of(Api::Responses, chunk), chunk);
}

#[test]
fn text_is_counted_where_no_usage_is_told() {
    let bytes = |api, event: &str| text_bytes(api, event.as_bytes());
    let chat = r#"data: {"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#;
    assert_eq!(bytes(Api::ChatCompletions, chat), 0);
    let chat = r#"data: {"choices": [{"delta": {"content" : "say \"hi\\"}}]}"#;
    assert_eq!(bytes(Api::ChatCompletions, chat), 10);
    let both = r#"data: {"choices":[{"delta":{"content":null,"reasoning_content":"abc","tool_calls":[{"function":{"arguments":"{}"}}]}}]}"#;
    assert_eq!(bytes(Api::ChatCompletions, both), 5);
    assert_eq!(
        bytes(Api::Completions, r#"data: {"choices":[{"text":"four"}]}"#),
        4
    );
    assert_eq!(bytes(Api::Responses, r#"data: {"type":"x.delta","delta":"ab"#), 2);
    let mut meter = Meter::new(Api::ChatCompletions, true);
    relay(&mut meter, &[stream().as_bytes()]);
    assert_eq!(meter.seen.tokens_estimated(&Calibration::default()), 2);
}

#[test]
fn a_usage_that_came_too_early_is_not_the_whole_truth() {
    let early =
        r#"data: {"choices":[{"delta":{"content":"a"}}],"usage":{"prompt_tokens":9,"completion_tokens":1}}"#;
    let mut meter = Meter::new(Api::ChatCompletions, false);
    relay(&mut meter, &[format!("{early}\n\n").as_bytes()]);
    let used = |meter: &Meter| {
        let (usage, estimated) = meter.seen.used(4, &Calibration::default(), || None);
        (usage.prompt, usage.completion, estimated)
    };
    assert_eq!(used(&meter), (9, 1, false));
    relay(&mut meter, &[CHUNK.repeat(20).as_bytes()]);
    assert_eq!(used(&meter), (9, 25, true), "a hundred bytes and one");
    relay(&mut meter, &[USAGE.as_bytes(), DONE.as_bytes()]);
    assert_eq!(used(&meter), (3, 2, false), "the last word is the provider's");
    assert_eq!(used(&Meter::new(Api::ChatCompletions, false)), (4, 0, true));
}

#[test]
fn a_long_stream_is_counted_by_a_sample() {
    let mut meter = Meter::new(Api::ChatCompletions, true);
    let one = r#"data: {"choices":[{"delta":{"content":"twelve bytes"}}]}"#;
    for _ in 0..1000 {
        relay(&mut meter, &[format!("{one}\n\n").as_bytes()]);
    }
    assert_eq!(meter.seen.events, 1000);
    assert_eq!((meter.seen.texts(), meter.seen.text_bytes()), (1000, 12_000));
    assert_eq!(meter.seen.tokens_estimated(&Calibration::default()), 3000);
}

#[test]
fn the_reason_of_the_end_is_noted() {
    let end = r#"data: {"choices":[{"delta":{},"finish_reason": "tool_calls"}],"usage":null}"#;
    for hide in [false, true] {
        let mut meter = Meter::new(Api::ChatCompletions, hide);
        relay(&mut meter, &[format!("{CHUNK}{end}\n\n{USAGE}{DONE}").as_bytes()]);
        assert_eq!(meter.seen.finish, Finish::ToolCalls);
    }
    for (json, finish) in [
        (r#"{"choices":[{"finish_reason":"stop"}]}"#, Finish::Stop),
        (r#"{"choices":[{"finish_reason":null}]}"#, Finish::Unknown),
        (r#"{"a":"\"finish_reason\":\"stop\""}"#, Finish::Unknown),
        (r#"{"finish_reason":"eos"}"#, Finish::Other),
        (r#"{"finish_reason":"st"#, Finish::Unknown),
    ] {
        assert_eq!(finish_of(json.as_bytes()), finish, "{json}");
    }
    for end in UNFINISHED {
        assert_eq!(finish_of(end), Finish::Unknown);
    }
}

#[test]
fn sees_errors_and_ends() {
    let mut meter = Meter::new(Api::ChatCompletions, true);
    relay(&mut meter, &[b"data: {\"error\":{\"message\":\"no\"}}\n\n"]);
    assert!(meter.seen.failed && !meter.seen.done);
    let mut meter = Meter::new(Api::Responses, false);
    let stream = b"event: response.output_text.delta\ndata: {\"delta\":\"a\"}\n\nevent: response.completed\n\
        data: {\"response\":{\"usage\":{\"input_tokens\":3,\"output_tokens\":2}}}\n\n";
    relay(&mut meter, &[stream]);
    assert_eq!(
        (meter.seen.usage, meter.seen.events, meter.seen.done),
        (Some(TOLD), 1, true)
    );
}

proptest! {
    #[test]
    fn any_bytes_in_any_pieces(bytes in prop::collection::vec(prop::sample::select(
        b"data: {}\"usge\r\n:[]DONE".to_vec()), 0..300), cuts in prop::collection::vec(1usize..40, 1..20), hide: bool) {
        let mut meter = Meter::new(Api::ChatCompletions, hide);
        let mut pieces = Vec::new();
        let mut rest = &bytes[..];
        for cut in cuts.iter().cycle() {
            if rest.is_empty() { break; }
            let (piece, after) = rest.split_at((*cut).min(rest.len()));
            pieces.push(piece);
            rest = after;
        }
        let mut whole = Meter::new(Api::ChatCompletions, hide);
        prop_assert_eq!(relay(&mut meter, &pieces), relay(&mut whole, &[&bytes]));
        prop_assert_eq!(meter.seen, whole.seen);
    }
}
