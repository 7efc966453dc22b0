//! What a request in OpenAI's dialect asks for, and the pieces in which it is sent on.
//!
//! The body is never parsed into a tree and never written anew: the values that concern the gateway are
//! found where they stand, and the few that must change are spliced. All else reaches the upstream byte for byte,
//! fields that nobody here knows included.

use std::{borrow::Cow, ops::Range};

use super::{Api, Tier, json};
use crate::error::{Error, Kind};

/// What `stream_options` must become so that the upstream tells the usage of a stream.
const INCLUDE_USAGE: &[u8] = br#"{"include_usage":true}"#;

/// Bytes of JSON that make a token, by rule of thumb: OpenAI's tokenizers average four characters of English
/// (platform.openai.com/tokenizer). Only for what is reserved before the provider's figures are there.
const BYTES_PER_TOKEN: u64 = 4;

/// A request, understood as far as the gateway must.
#[derive(Debug)]
pub struct Call<'b> {
    /// The virtual model.
    pub model: Cow<'b, str>,
    /// The answer is to be streamed.
    pub stream: bool,
    /// The usage event that the gateway asks for was not asked for by the client.
    pub hide_usage: bool,
    /// Output tokens that the client permits, for all choices together.
    pub output_max: Option<u64>,
    /// How many answers are to be generated, each of which may be as long as the limit permits; at least 1.
    pub choices: u64,
    /// The end user, as the client names them.
    pub user: Option<Cow<'b, str>>,
    /// The service tier that is asked for.
    pub tier: Tier,
    model_value: Range<usize>,
    edit: Option<Edit>,
}

/// A change besides the model's name.
#[derive(Debug, Clone)]
struct Edit {
    place: Range<usize>,
    text: Cow<'static, [u8]>,
}

/// The fields of the body that concern the gateway, as they were found.
#[derive(Default)]
struct Found<'b> {
    model: Option<json::Member<'b>>,
    stream: Option<json::Member<'b>>,
    stream_options: Option<json::Member<'b>>,
    output_max: Option<u64>,
    choices: Option<u64>,
    user: Option<json::Member<'b>>,
    tier: Option<json::Member<'b>>,
}

impl<'b> Call<'b> {
    /// Reads a body. Errors are the client's: malformed JSON, no model, a field of a wrong kind, or a
    /// field that stands there twice, which the upstream might read otherwise than we do.
    pub fn parse(api: Api, body: &'b [u8]) -> Result<Call<'b>, Error> {
        let found = Found::read(body)?;
        let Some(model) = found.model else {
            return Err(Error::bad_field("model", "you must provide a model parameter"));
        };
        let model_value = model.value.clone();
        let Some(name) = model.as_str() else {
            return Err(Error::bad_field("model", "`model` must be a string"));
        };
        let stream = match &found.stream {
            None => false,
            Some(member) if member.kind == json::Kind::Null => false,
            Some(member) => member
                .as_bool()
                .ok_or_else(|| Error::bad_field("stream", "`stream` must be true or false"))?,
        };
        let choices = found.choices.unwrap_or(1).max(1);
        let mut call = Call {
            model: name,
            stream,
            hide_usage: false,
            output_max: found.output_max.map(|max| max.saturating_mul(choices)),
            choices,
            user: found.user.as_ref().and_then(json::Member::as_str),
            tier: found
                .tier
                .as_ref()
                .and_then(json::Member::as_str)
                .map_or(Tier::Default, |word| Tier::of(&word)),
            model_value,
            edit: None,
        };
        if stream && matches!(api, Api::ChatCompletions | Api::Completions) {
            call.ask_for_usage(body, found.stream_options)?;
        }
        Ok(call)
    }

    /// Makes sure that the stream will tell its usage, whatever the client asked for.
    fn ask_for_usage(&mut self, body: &'b [u8], options: Option<json::Member<'b>>) -> Result<(), Error> {
        let wrong = || Error::bad_field("stream_options", "`stream_options` must be an object");
        let edit = match options {
            None => {
                // The document is an object with at least a model, so a comma is right.
                let end = body.iter().rposition(|&b| b == b'}').ok_or_else(wrong)?;
                let mut text = br#","stream_options":"#.to_vec();
                text.extend_from_slice(INCLUDE_USAGE);
                Edit {
                    place: end..end,
                    text: text.into(),
                }
            }
            Some(member) if member.kind == json::Kind::Null => Edit {
                place: member.value,
                text: INCLUDE_USAGE.into(),
            },
            Some(member) if member.kind == json::Kind::Object => match include_usage(body, &member.value)? {
                Some((true, _)) => return Ok(()),
                Some((false, place)) => Edit {
                    place,
                    text: Cow::Borrowed(b"true"),
                },
                None => include_usage_edit(body, &member.value),
            },
            Some(_) => return Err(wrong()),
        };
        self.edit = Some(edit);
        self.hide_usage = true;
        Ok(())
    }

    /// The request for an upstream that calls the model `model_json` (a JSON string with its quotes): pieces that
    /// put together are the body.
    pub fn pieces<'a>(&'a self, body: &'a [u8], model_json: &'a [u8]) -> [&'a [u8]; 5] {
        let model = (self.model_value.clone(), model_json);
        match &self.edit {
            None => [&body[..model.0.start], model.1, &body[model.0.end..], &[], &[]],
            Some(edit) => {
                let edit = (edit.place.clone(), edit.text.as_ref());
                let (first, second) = if edit.0.start < model.0.start {
                    (edit, model)
                } else {
                    (model, edit)
                };
                [
                    &body[..first.0.start],
                    first.1,
                    &body[first.0.end..second.0.start],
                    second.1,
                    &body[second.0.end..],
                ]
            }
        }
    }
}

/// Input tokens of a body, estimated before anything better is known.
pub fn estimate_input(body: &[u8]) -> u64 {
    (body.len() as u64 / BYTES_PER_TOKEN).max(1)
}

impl<'b> Found<'b> {
    fn read(body: &'b [u8]) -> Result<Found<'b>, Error> {
        let mut found = Found::default();
        let mut seen_output = false;
        for member in json::members(body) {
            let member = member.map_err(|error| {
                let at = error.offset;
                Error::new(
                    Kind::BadRequest,
                    format!("the body is not valid JSON: {} at byte {at}", error.what),
                )
            })?;
            match member.key.as_ref() {
                "model" => once(&mut found.model, member, "model")?,
                "stream" => once(&mut found.stream, member, "stream")?,
                "stream_options" => once(&mut found.stream_options, member, "stream_options")?,
                "max_tokens" | "max_completion_tokens" | "max_output_tokens" => {
                    if member.kind == json::Kind::Null {
                        continue;
                    }
                    let wrong =
                        || Error::bad_field("max_tokens", "the output limit must be a positive integer");
                    let max = member.as_u64().ok_or_else(wrong)?;
                    // Which of two the upstream honours is its business: reserve for the larger.
                    found.output_max = Some(if seen_output {
                        found.output_max.unwrap_or(0).max(max)
                    } else {
                        max
                    });
                    seen_output = true;
                }
                // `best_of` of Completions: all of them are generated, and counted.
                "n" | "best_of" => found.choices = found.choices.max(member.as_u64()),
                // Not refused when they stand twice: nothing hangs on them but what the books say.
                "user" => found.user = Some(member),
                "service_tier" => found.tier = Some(member),
                other => refuse_variant(other, &CONCERNING)?,
            }
        }
        Ok(found)
    }
}

/// The fields of a body that concern the gateway.
const CONCERNING: [&str; 8] = [
    "model",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "n",
    "best_of",
];

/// Refuses a key that differs from one of `names` in case only: servers written in Go (Ollama) take it for the same
/// (encoding/json, `Unmarshal`), and the later one counts. It would choose a model, or a limit, past the gateway.
fn refuse_variant(key: &str, names: &[&'static str]) -> Result<(), Error> {
    // Unicode's simple folding knows two letters beyond ASCII that fold into it: the long s and the kelvin sign.
    let fold = |c: char| match c {
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        _ => c.to_ascii_lowercase(),
    };
    let is_variant = |name: &&&str| key.chars().map(fold).eq(name.chars());
    match names.iter().find(is_variant) {
        Some(name) => Err(Error::bad_field(name, format!("write `{name}` in lower case"))),
        None => Ok(()),
    }
}

fn once<'b>(
    place: &mut Option<json::Member<'b>>,
    member: json::Member<'b>,
    name: &'static str,
) -> Result<(), Error> {
    if place.is_some() {
        return Err(Error::bad_field(
            name,
            format!("`{name}` stands twice in the body"),
        ));
    }
    *place = Some(member);
    Ok(())
}

/// Finds `include_usage` among the stream options: its value and its place in the body.
fn include_usage(body: &[u8], options: &Range<usize>) -> Result<Option<(bool, Range<usize>)>, Error> {
    let slice = &body[options.clone()];
    let mut found = None;
    for member in json::members(slice) {
        let wrong = || Error::bad_field("stream_options", "`include_usage` must be true or false, once");
        let member = member.map_err(|_| wrong())?;
        if member.key != "include_usage" {
            refuse_variant(&member.key, &["include_usage"])?;
            continue;
        }
        let value = match member.kind {
            json::Kind::Null => false,
            _ => member.as_bool().ok_or_else(wrong)?,
        };
        let place = options.start + member.value.start..options.start + member.value.end;
        if found.replace((value, place)).is_some() {
            return Err(wrong());
        }
    }
    Ok(found)
}

/// Puts `include_usage` into stream options that lack it.
fn include_usage_edit(body: &[u8], options: &Range<usize>) -> Edit {
    let inside = &body[options.start + 1..options.end - 1];
    let is_empty = inside.iter().all(u8::is_ascii_whitespace);
    let text: &[u8] = if is_empty {
        br#""include_usage":true"#
    } else {
        br#""include_usage":true,"#
    };
    Edit {
        place: options.start + 1..options.start + 1,
        text: text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(api: Api, body: &str) -> (String, bool) {
        let call = Call::parse(api, body.as_bytes()).expect("a valid request");
        let bytes = call.pieces(body.as_bytes(), br#""up""#).concat();
        let text = String::from_utf8(bytes).expect("text");
        serde_json::from_str::<serde_json::Value>(&text).expect("still JSON");
        (text, call.hide_usage)
    }

    fn refused(body: &str) -> Error {
        Call::parse(Api::ChatCompletions, body.as_bytes()).expect_err("must be refused")
    }

    #[test]
    fn only_the_model_changes_where_nothing_is_streamed() {
        let body = r#"{ "x": [1,{"model":"no"}], "model" : "m", "stream":false, "max_tokens": 5, "n": 3 }"#;
        let (text, hide) = sent(Api::ChatCompletions, body);
        assert_eq!(text, body.replace(r#""m""#, r#""up""#));
        assert!(!hide);
        assert_eq!(
            Call::parse(Api::ChatCompletions, body.as_bytes())
                .expect("valid")
                .output_max,
            Some(15)
        );
    }

    #[test]
    fn streams_always_tell_their_usage() {
        let cases = [
            (
                r#"{"model":"m","stream":true}"#,
                r#"{"model":"up","stream":true,"stream_options":{"include_usage":true}}"#,
                true,
            ),
            (
                r#"{"stream":true,"stream_options":{},"model":"m"}"#,
                r#"{"stream":true,"stream_options":{"include_usage":true},"model":"up"}"#,
                true,
            ),
            (
                r#"{"stream_options":{"a":1},"model":"m","stream":true}"#,
                r#"{"stream_options":{"include_usage":true,"a":1},"model":"up","stream":true}"#,
                true,
            ),
            (
                r#"{"model":"m","stream":true,"stream_options":{"include_usage":false}}"#,
                r#"{"model":"up","stream":true,"stream_options":{"include_usage":true}}"#,
                true,
            ),
            (
                r#"{"model":"m","stream":true,"stream_options":null}"#,
                r#"{"model":"up","stream":true,"stream_options":{"include_usage":true}}"#,
                true,
            ),
            (
                r#"{"model":"m","stream":true,"stream_options":{"include_usage":true}}"#,
                r#"{"model":"up","stream":true,"stream_options":{"include_usage":true}}"#,
                false,
            ),
            (
                r#"{"stream_options":{"include_us\u0061ge":false},"model":"m","stream":true}"#,
                r#"{"stream_options":{"include_us\u0061ge":true},"model":"up","stream":true}"#,
                true,
            ),
        ];
        for (body, expected, hide) in cases {
            assert_eq!(
                sent(Api::ChatCompletions, body),
                (expected.to_string(), hide),
                "{body}"
            );
        }
        let body = r#"{"model":"m","stream":true}"#;
        assert_eq!(
            sent(Api::Responses, body),
            (r#"{"model":"up","stream":true}"#.to_string(), false)
        );
    }

    #[test]
    fn refuses_what_the_upstream_may_read_otherwise() {
        assert_eq!(refused(r#"{"model":"a","mod\u0065l":"b"}"#).param, Some("model"));
        assert_eq!(
            refused(r#"{"model":"a","stream":true,"stream":false}"#).param,
            Some("stream")
        );
        assert_eq!(refused(r#"{"model":"a","Model":"b"}"#).param, Some("model"));
        assert_eq!(
            refused(r#"{"model":"a","max_to\u212aens":9}"#).param,
            Some("max_tokens")
        );
        assert_eq!(
            refused(r#"{"model":"m","stream":true,"stream_options":{"Include_Usage":false}}"#).param,
            Some("include_usage")
        );
        assert_eq!(refused(r#"{"model":7}"#).param, Some("model"));
        assert_eq!(refused(r#"{"messages":[]}"#).param, Some("model"));
        assert_eq!(refused(r#"{"model":"m","stream":"yes"}"#).param, Some("stream"));
        assert_eq!(
            refused(r#"{"model":"m","stream":true,"stream_options":[]}"#).param,
            Some("stream_options")
        );
        assert_eq!(
            refused(r#"{"model":"m","max_tokens":-1}"#).param,
            Some("max_tokens")
        );
        assert_eq!(refused(r#"{"model":"m""#).kind, Kind::BadRequest);
        assert_eq!(refused("[]").kind, Kind::BadRequest);
        assert_eq!(refused(r#"{"model":"m"} x"#).kind, Kind::BadRequest);
    }
}
