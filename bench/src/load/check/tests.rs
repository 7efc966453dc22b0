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
