use super::*;
use crate::bounds::JSON_DEPTH_MAX;

fn walk(body: &str) -> Result<Vec<Member<'_>>, JsonError> {
    members(body.as_bytes()).collect()
}

fn only(body: &str) -> Member<'_> {
    let mut found = walk(body).unwrap();
    assert_eq!(found.len(), 1);
    found.remove(0)
}

#[test]
fn gives_spans_of_members() {
    let body = " { \"model\" : \"fast\" ,\"n\":-1.5e+3,\"messages\":[{\"a\":[]},{}] , \"s\":true,\"x\\u006e\":null}\n";
    let found = walk(body).unwrap();
    let seen: Vec<_> = found
        .iter()
        .map(|member| {
            (
                &*member.key,
                &body[member.key_span.clone()],
                member.kind,
                &body[member.value.clone()],
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            ("model", "\"model\"", Kind::String, "\"fast\""),
            ("n", "\"n\"", Kind::Number, "-1.5e+3"),
            ("messages", "\"messages\"", Kind::Array, "[{\"a\":[]},{}]"),
            ("s", "\"s\"", Kind::Bool, "true"),
            ("xn", "\"x\\u006e\"", Kind::Null, "null"),
        ]
    );
    assert!(matches!(found[0].key, Cow::Borrowed(_)));
    assert!(walk("{}").unwrap().is_empty());
    assert!(walk("\t{ \r\n}  ").unwrap().is_empty());
}

#[test]
fn splices() {
    let body = r#"{"stream":true,"stream_options":{"include_usage" : false, "x":1}}"#;
    let options = walk(body).unwrap().remove(1);
    let usage = options.members().unwrap().next().unwrap().unwrap();
    let at = options.value.start + usage.value.start;
    let spliced = format!("{}true{}", &body[..at], &body[at + usage.value.len()..]);
    assert_eq!(
        spliced,
        r#"{"stream":true,"stream_options":{"include_usage" : true, "x":1}}"#
    );
}

#[test]
fn reads_scalars() {
    let number = |text: &str| only(&format!("{{\"a\":{text}}}")).as_u64();
    for (text, value) in [
        ("0", Some(0)),
        ("4096", Some(4096)),
        ("18446744073709551615", Some(u64::MAX)),
        ("18446744073709551616", None),
        ("1e3", Some(1000)),
        ("100.0", Some(100)),
        ("-0", Some(0)),
        ("-1", None),
        ("1.5", None),
        ("1e30", None),
        ("1e999", None),
        ("\"1\"", None),
    ] {
        assert_eq!(number(text), value, "{text}");
    }
    assert_eq!(only(r#"{"a":false}"#).as_bool(), Some(false));
    assert_eq!(only(r#"{"a":null}"#).as_bool(), None);
    assert!(only(r#"{"a":null}"#).is_null());
    assert!(only(r#"{"a":[]}"#).members().is_none());
    let text = |text: &'static str| only(text).as_str().map(Cow::into_owned);
    assert_eq!(text(r#"{"a":"b é\""}"#), Some("b é\"".to_owned()));
    assert_eq!(
        text(r#"{"a":"\b\f\n\r\t\/\\\u0041\ud83d\ude00z"}"#),
        Some("\u{8}\u{c}\n\r\t/\\A😀z".to_owned())
    );
    assert_eq!(text(r#"{"a":"\ud800"}"#), None);
    assert_eq!(text(r#"{"a":"\ud800\u0041"}"#), None);
    assert_eq!(text(r#"{"a":"\udc00\ud800"}"#), None);
    assert_eq!(text(r#"{"a":1}"#), None);
    assert_eq!(only(r#"{"\ud800x":1}"#).key, "\u{fffd}x");
}

#[test]
fn tells_where_and_what_is_wrong() {
    for (body, offset, what) in [
        ("", 0, "expected an object"),
        ("[]", 0, "expected an object"),
        ("{} x", 3, "trailing characters"),
        ("{}{}", 2, "trailing characters"),
        ("{,}", 1, "expected a key"),
        ("{a:1}", 1, "expected a key"),
        (r#"{"a" 1}"#, 5, "expected `:`"),
        (r#"{"a":1,}"#, 7, "expected a key"),
        (r#"{"a":1 "b":2}"#, 7, "expected `,` or `}`"),
        (r#"{"a":}"#, 5, "expected a value"),
        (r#"{"a":[1,]}"#, 8, "expected a value"),
        (r#"{"a":[,1]}"#, 6, "expected a value"),
        (
            r#"{"a":[1 2]}"#,
            8,
            "expected `,` or the end of the array or object",
        ),
        (
            r#"{"a":[1}}"#,
            7,
            "expected `,` or the end of the array or object",
        ),
        (
            r#"{"a":{"b":1]}"#,
            11,
            "expected `,` or the end of the array or object",
        ),
        (r#"{"a":{]}"#, 6, "expected a key"),
        (r#"{"a":[}}"#, 6, "expected a value"),
        (r#"{"a":True}"#, 5, "expected a value"),
        (r#"{"a":nul}"#, 5, "expected a value"),
        (r#"{"a":nullx}"#, 9, "expected `,` or `}`"),
        (r#"{"a":01}"#, 6, "number with a leading zero"),
        (r#"{"a":-}"#, 6, "expected a digit"),
        (r#"{"a":+1}"#, 5, "expected a value"),
        (r#"{"a":.5}"#, 5, "expected a value"),
        (r#"{"a":1.}"#, 7, "expected a digit"),
        (r#"{"a":1e}"#, 7, "expected a digit"),
        (r#"{"a":1e+}"#, 8, "expected a digit"),
        (r#"{"a":"\x"}"#, 7, "invalid escape"),
        (r#"{"a":"\u12g4"}"#, 10, "invalid unicode escape"),
        ("{\"a\":\"b\nc\"}", 7, "control character in a string"),
        ("{\"a\":\"b", 7, "unexpected end of document"),
        ("{\"a\":\"b\\", 8, "unexpected end of document"),
        ("{\"a\":[", 6, "unexpected end of document"),
        ("\u{feff}{}", 0, "expected an object"),
    ] {
        assert_eq!(walk(body).unwrap_err(), JsonError { offset, what }, "{body}");
    }
    let error = members(b"{\"a\":\"\xff\"}").next().unwrap().unwrap_err();
    assert_eq!(
        error,
        JsonError {
            offset: 6,
            what: "not utf-8"
        }
    );
}

#[test]
fn stops_at_the_first_error() {
    let mut walk = members(br#"{"a":1,"b":x,"c":2}"#);
    assert!(walk.next().unwrap().is_ok());
    assert!(walk.next().unwrap().is_err());
    assert!(walk.next().is_none() && walk.next().is_none());
}

#[test]
fn bounds_nesting() {
    let nested = |depth: usize| {
        let arrays = depth - 1;
        format!("{{\"a\":{}{}}}", "[".repeat(arrays), "]".repeat(arrays))
    };
    assert!(walk(&nested(JSON_DEPTH_MAX)).is_ok());
    assert_eq!(
        walk(&nested(JSON_DEPTH_MAX + 1)).unwrap_err().what,
        "nested too deeply"
    );
    assert_eq!(walk(&nested(100_000)).unwrap_err().what, "nested too deeply");
    let mixed = "{\"a\":[".repeat(JSON_DEPTH_MAX / 2) + &"]}".repeat(JSON_DEPTH_MAX / 2);
    assert!(walk(&mixed).is_ok());
}

#[test]
fn writes_strings() {
    let mut out = Vec::new();
    write_string("a\"b\\c\u{0}\u{1f}\u{8}\u{c}\n\r\t\u{7f}é😀/", &mut out);
    let text = "\"a\\\"b\\\\c\\u0000\\u001f\\b\\f\\n\\r\\t\u{7f}é😀/\"";
    assert_eq!(String::from_utf8(out).unwrap(), text);
}
