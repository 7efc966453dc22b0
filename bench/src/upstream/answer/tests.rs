use super::*;
use crate::http::Dechunker;

fn stream(api: Api, words: &str, include_usage: bool, tokens_max: Option<u32>) -> (String, Step) {
    let call = Call {
        model: "m\"x".into(),
        stream: true,
        include_usage,
        tokens_max,
        prompt_tokens: 10,
    };
    let mut behaviour = Behaviour::default();
    behaviour.apply(words).unwrap();
    let mut answer = Answer::new(api, &call, behaviour, 1, 1_700_000_000);
    let (mut event, mut out) = (Vec::new(), Vec::new());
    let last = loop {
        match answer.step(&mut event, &mut out) {
            Step::Token { .. } => {}
            last => break last,
        }
    };
    let (mut decoder, mut body, mut at) = (Dechunker::default(), Vec::new(), 0);
    while at < out.len() {
        let Ok((eaten, data)) = decoder.step(&out[at..]) else {
            break;
        };
        body.extend_from_slice(data.unwrap_or_default());
        at += eaten;
    }
    assert_eq!(decoder.is_done(), last == Step::End);
    (String::from_utf8(body).unwrap(), last)
}

fn events(body: &str) -> Vec<serde_json::Value> {
    body.lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .filter(|data| *data != "[DONE]")
        .map(|data| serde_json::from_str(data).unwrap_or_else(|error| panic!("{error}: {data}")))
        .collect()
}

#[test]
fn a_chat_stream_has_openais_shape() {
    let (body, last) = stream(Api::Chat, "tokens=3,size=6,cached=4,reasoning=2", true, None);
    assert_eq!(last, Step::End);
    assert!(body.ends_with("data: [DONE]\n\n"));
    let events = events(&body);
    assert_eq!(events.len(), 1 + 2 + 3 + 1 + 1);
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(events[1]["choices"][0]["delta"]["reasoning_content"], "r0 ");
    assert_eq!(events[3]["choices"][0]["delta"]["content"], "t0... ");
    assert_eq!(events[6]["choices"][0]["finish_reason"], "stop");
    assert!(
        events[..7]
            .iter()
            .all(|event| event["usage"].is_null() && event.get("usage").is_some())
    );
    assert_eq!(events[7]["choices"], serde_json::json!([]));
    assert_eq!(events[7]["usage"]["completion_tokens"], 5);
    assert_eq!(events[7]["usage"]["prompt_tokens_details"]["cached_tokens"], 4);
    assert_eq!(
        events[7]["usage"]["completion_tokens_details"]["reasoning_tokens"],
        2
    );
    assert_eq!(events[7]["model"], "m\"x");
}

#[test]
fn usage_is_sent_only_when_asked() {
    let (body, _) = stream(Api::Chat, "tokens=2", false, None);
    assert!(!body.contains("usage"));
    let (body, _) = stream(Api::Chat, "tokens=2,usage=off", true, None);
    assert!(!body.contains("usage"));
    let (body, _) = stream(Api::Completions, "tokens=2,usage=always", false, None);
    assert_eq!(events(&body).last().unwrap()["usage"]["completion_tokens"], 2);
}

#[test]
fn a_limit_cuts_the_answer() {
    let (body, _) = stream(Api::Chat, "tokens=5", false, Some(2));
    let events = events(&body);
    assert_eq!(events.len(), 4);
    assert_eq!(events[3]["choices"][0]["finish_reason"], "length");
    let (body, _) = stream(Api::Responses, "tokens=5", false, Some(2));
    assert!(body.contains("event: response.incomplete\n"));
}

#[test]
fn a_responses_stream_has_openais_shape() {
    let (body, _) = stream(Api::Responses, "tokens=2,crlf", false, None);
    assert!(body.contains("event: response.output_text.delta\r\ndata: {"));
    let events = events(&body);
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number);
    }
    let last = events.last().unwrap();
    assert_eq!(last["type"], "response.completed");
    assert_eq!(last["response"]["usage"]["output_tokens"], 2);
    assert_eq!(last["response"]["output"][0]["content"][0]["text"], "t0 t1 ");
}

#[test]
fn faults_come_where_they_were_ordered() {
    let (body, last) = stream(Api::Chat, "tokens=5,after=2,die=rst", false, None);
    assert_eq!((last, events(&body).len()), (Step::Broken(Death::Reset), 3));
    let (body, last) = stream(Api::Chat, "tokens=5,error=2", false, None);
    assert_eq!(last, Step::End);
    assert_eq!(events(&body)[3]["error"]["type"], "server_error");
    assert!(!body.contains("[DONE]"));
    let (body, _) = stream(Api::Chat, "tokens=5,error=0", false, None);
    assert_eq!(events(&body).len(), 1);
    let (_, last) = stream(Api::Chat, "tokens=5,badchunk,after=1", false, None);
    assert_eq!(last, Step::Broken(Death::Close));
    let (body, _) = stream(
        Api::Chat,
        "tokens=2,done=off,azure,comment=1,huge=1000",
        false,
        None,
    );
    assert!(!body.contains("[DONE]") && body.contains(": keep-alive\n\n"));
    let events = events(&body);
    assert_eq!(events[0]["choices"], serde_json::json!([]));
    assert_eq!(
        events[2]["choices"][0]["delta"]["content"]
            .as_str()
            .unwrap()
            .len(),
        1000
    );
}

#[test]
fn plain_answers_are_json() {
    for api in [Api::Chat, Api::Completions, Api::Embeddings, Api::Responses] {
        let call = Call {
            model: "sim".into(),
            stream: false,
            include_usage: false,
            tokens_max: Some(4),
            prompt_tokens: 3,
        };
        let body = Answer::new(api, &call, Behaviour::default(), 1, 2).plain_body();
        let json: serde_json::Value = serde_json::from_slice(&body).unwrap();
        let completion = match api {
            Api::Embeddings => continue,
            Api::Responses => &json["usage"]["output_tokens"],
            _ => &json["usage"]["completion_tokens"],
        };
        assert_eq!(*completion, 4, "{api:?}");
    }
}
