use super::*;

fn check(body: &str, cut: usize) -> Checker {
    let needles = Needles::new(Api::Chat);
    let mut checker = Checker::new(Api::Chat);
    body.as_bytes()
        .chunks(cut)
        .for_each(|piece| checker.feed_stream(&needles, piece));
    checker
}

fn token(text: &str) -> String {
    format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{text}\"}},\"finish_reason\":null}}]}}\n\n")
}

const FINISH: &str = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";
const DONE: &str = "data: [DONE]\n\n";

#[test]
fn a_whole_stream_passes_at_every_cut() {
    let role = "data: {\"choices\": [{\"delta\": {\"role\": \"assistant\", \"content\": \"\"}}]}\r\n\r\n";
    let usage = "data: {\"choices\":[],\"usage\":{\"completion_tokens\":5,\
                 \"completion_tokens_details\":{\"reasoning_tokens\":2}}}\n\n";
    let body = [
        role,
        &token("t0 "),
        ": ping\n\n",
        &token("t1.. t"),
        &token("2 "),
        FINISH,
        usage,
        DONE,
    ]
    .concat();
    for cut in 1..=body.len() {
        let checker = check(&body, cut);
        assert_eq!(checker.stream_flaw(Some(3)), None, "cut at {cut}");
        assert_eq!((checker.tokens, checker.events), (3, 7));
    }
    assert_eq!(check(&body, 9).stream_flaw(Some(4)), Some(Flaw::Mismatch));
}

#[test]
fn every_flaw_is_seen() {
    let (t0, t1, t2) = (token("t0 "), token("t1 "), token("t2 "));
    let error = "data: {\"error\":{\"message\":\"x\"}}\n\n";
    let cases: [(Vec<&str>, Flaw); 9] = [
        (vec![&t0, &t2, FINISH, DONE], Flaw::Mismatch),
        (vec![&t0, &t0, FINISH, DONE], Flaw::Mismatch),
        (vec![&t1, &t0, FINISH, DONE], Flaw::Mismatch),
        (vec![&t0, "data: {\n\n", FINISH, DONE], Flaw::Mismatch),
        (vec![&t0, FINISH, DONE, &t1], Flaw::Mismatch),
        (vec![&t0, DONE], Flaw::NoFinish),
        (vec![&t0, FINISH], Flaw::NoDone),
        (vec![&t0, error, DONE], Flaw::ErrorEvent),
        (
            vec![
                &t0,
                "data: {\"choices\":[],\"usage\":{\"completion_tokens\":2}}\n\n",
                FINISH,
                DONE,
            ],
            Flaw::Mismatch,
        ),
    ];
    for (pieces, flaw) in cases {
        let body = pieces.concat();
        assert_eq!(check(&body, body.len()).stream_flaw(None), Some(flaw), "{body}");
    }
}

#[test]
fn plain_answers_are_checked() {
    let flaw = |body: &str| {
        let mut checker = Checker::new(Api::Chat);
        checker.feed_plain(body.as_bytes());
        checker.plain_flaw(Some(2))
    };
    assert_eq!(
        flaw(r#"{"choices":[{"message":{"content":"t0 t1 "},"finish_reason":"stop"}]}"#),
        None
    );
    let short = r#"{"choices":[{"message":{"content":"t0 "},"finish_reason":"stop"}]}"#;
    assert_eq!(flaw(short), Some(Flaw::Mismatch));
    assert_eq!(flaw(r#"{"error":{"message":"no"}}"#), Some(Flaw::ErrorEvent));
    assert_eq!(flaw("{\"choices\""), Some(Flaw::Mismatch));
}

/// A whole answer of the other APIs, and its tokens.
fn dialect(api: Api) -> String {
    let named = |name: &str, json: &str| format!("event: {name}\ndata: {{\"type\":\"{name}\",{json}}}\n\n");
    match api {
        Api::Messages => [
            named("message_start", "\"message\":{}"),
            named(
                "content_block_delta",
                "\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"t0 \"}",
            ),
            named("ping", "\"x\":1"),
            named(
                "content_block_delta",
                "\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"t1~77.. t2 \"}",
            ),
            named(
                "content_block_delta",
                "\"index\":1,\"delta\":{\"type\":\"input_json_delta\",\"partial_json\":\"{\\\"a\"}",
            ),
            named(
                "content_block_delta",
                "\"index\":1,\"delta\":{\"type\":\"input_json_delta\",\"partial_json\":\"\\\":1}\"}",
            ),
            named(
                "message_delta",
                "\"delta\":{\"stop_reason\":\"tool_use\"},\"usage\":{\"output_tokens\":3}",
            ),
            named("message_stop", "\"x\":1"),
        ]
        .concat(),
        _ => {
            let piece = |text: &str, more: &str| {
                format!("{{\"candidates\":[{{\"content\":{{\"parts\":[{{\"text\":\"{text}\"}}]}}{more}}}]}}")
            };
            let pieces = [
                piece("t0 t1~77 ", ""),
                piece("t2 ", ""),
                piece("", ",\"finishReason\":\"STOP\""),
            ];
            match api {
                Api::Gemini => pieces
                    .iter()
                    .map(|piece| format!("data: {piece}\r\n\r\n"))
                    .collect(),
                _ => format!("[{}\n]", pieces.join(",\r\n")),
            }
        }
    }
}

fn check_dialect(api: Api, body: &[u8], cut: usize) -> Checker {
    let needles = Needles::new(api);
    let mut checker = Checker::new(api);
    body.chunks(cut)
        .for_each(|piece| checker.feed_stream(&needles, piece));
    checker
}

#[test]
fn every_dialect_passes_at_every_cut() {
    for api in [Api::Messages, Api::Gemini, Api::GeminiArray] {
        let body = dialect(api);
        for cut in 1..=body.len() {
            let checker = check_dialect(api, body.as_bytes(), cut);
            assert_eq!(checker.stream_flaw(Some(3)), None, "{api:?} cut at {cut}\n{body}");
            assert_eq!(checker.stamps, [77]);
        }
    }
}

#[test]
fn borders_and_names_of_events_are_checked() {
    let (t0, t1) = (token("t0 "), token("t1 "));
    let merged = format!(
        "{}{t1}{FINISH}{DONE}",
        t0.trim_end_matches('\n').to_owned() + "\n"
    );
    assert_eq!(check(&merged, 5).stream_flaw(None), Some(Flaw::Border));
    let unended = format!("{t0}{FINISH}{}", DONE.trim_end_matches('\n'));
    for end in ["", "\n"] {
        let flaw = check(&format!("{unended}{end}"), 7).stream_flaw(None);
        assert!(flaw.is_some(), "{end:?}");
    }
    let renamed = dialect(Api::Messages).replacen("event: content_block_delta", "event: delta", 1);
    let checker = check_dialect(Api::Messages, renamed.as_bytes(), 9);
    assert_eq!(checker.stream_flaw(Some(3)), Some(Flaw::Border));
    let broken_call = dialect(Api::Messages).replace("\\\":1}", "\\\":1");
    let checker = check_dialect(Api::Messages, broken_call.as_bytes(), 9);
    assert_eq!(checker.stream_flaw(Some(3)), Some(Flaw::Mismatch));
}

proptest::proptest! {
    #[test]
    fn no_bytes_break_the_checker(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400), cut in 1_usize..50, place in 0_usize..1000) {
        for api in [Api::Chat, Api::Responses, Api::Messages, Api::Gemini, Api::GeminiArray] {
            let mut body = if matches!(api, Api::Chat | Api::Responses) { format!("{}{FINISH}{DONE}", token("t0 ")) } else { dialect(api) }.into_bytes();
            let place = place % body.len();
            body.splice(place..place, bytes.iter().copied());
            let mut checker = check_dialect(api, &body, cut);
            let _ = checker.stream_flaw(Some(1));
            let _ = checker.plain_flaw(Some(1));
        }
    }
}
