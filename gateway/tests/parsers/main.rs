//! Property tests of the parsers of foreign bytes: heads, chunked bodies, event streams and JSON.

mod checks;
mod seeds;

use gateway::http::chunked::{CHUNK_END, CHUNK_HEAD_BYTES_MAX, LAST_CHUNK, frame_in_place, write_chunk_head};
use gateway::{bounds, dialect, http};
use proptest::collection::vec;
use proptest::prelude::*;

/// Bytes made of a format's own words, with some of any kind in between.
fn words(words: &'static [&'static [u8]]) -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        6 => prop::sample::select(words).prop_map(<[u8]>::to_vec),
        1 => vec(any::<u8>(), 1..4),
        1 => "[a-z0-9]{1,20}".prop_map(String::into_bytes),
    ];
    vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

/// A good input into which some words have been put, or from which some bytes have been taken.
fn mutated(
    seeds: &'static [&'static [u8]],
    with: &'static [&'static [u8]],
) -> impl Strategy<Value = Vec<u8>> {
    let edit = (
        any::<prop::sample::Index>(),
        0..3_usize,
        prop::sample::select(with),
    );
    (prop::sample::select(seeds), vec(edit, 0..5)).prop_map(|(seed, edits)| {
        let mut bytes = seed.to_vec();
        for (index, removed, word) in edits {
            let at = index.index(bytes.len() + 1);
            let end = (at + removed).min(bytes.len());
            bytes.splice(at..end, word.iter().copied());
        }
        bytes
    })
}

/// Any JSON value, written with white space in places.
fn value() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        Just("null".to_owned()),
        any::<bool>().prop_map(|value| value.to_string()),
        any::<i64>().prop_map(|value| value.to_string()),
        any::<f64>()
            .prop_filter("finite", |value| value.is_finite())
            .prop_map(|value| format!("{value:e}")),
        any::<String>().prop_map(|text| serde_json::to_string(&text).expect("a string")),
    ];
    leaf.prop_recursive(6, 48, 6, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..6).prop_map(|items| format!("[{}]", items.join(" , "))),
            vec((any::<String>(), inner), 0..6).prop_map(object),
        ]
    })
}

fn object(members: Vec<(String, String)>) -> String {
    let written = members
        .iter()
        .map(|(key, value)| format!("{} :\n{value}", serde_json::to_string(key).expect("a string")));
    format!("{{{}}}", written.collect::<Vec<_>>().join("\t, "))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn heads_hold(bytes in prop_oneof![words(seeds::HEAD_WORDS), mutated(seeds::HEADS, seeds::HEAD_WORDS)]) {
        checks::head(&bytes);
    }

    #[test]
    fn chunked_bodies_hold(
        bytes in prop_oneof![words(seeds::BODY_WORDS), mutated(seeds::BODIES, seeds::BODY_WORDS)]
    ) {
        checks::chunked(&bytes);
    }

    #[test]
    fn event_streams_hold(
        bytes in prop_oneof![words(seeds::STREAM_WORDS), mutated(seeds::STREAMS, seeds::STREAM_WORDS)]
    ) {
        checks::events(&bytes);
    }

    #[test]
    fn json_documents_hold(
        bytes in prop_oneof![words(seeds::DOCUMENT_WORDS), mutated(seeds::DOCUMENTS, seeds::DOCUMENT_WORDS)]
    ) {
        checks::document(&bytes);
    }

    #[test]
    fn proxy_headers_hold(
        bytes in prop_oneof![words(seeds::PROXY_WORDS), mutated(seeds::PROXIES, seeds::PROXY_WORDS)]
    ) {
        checks::proxy(&bytes);
    }

    #[test]
    fn forwarded_fields_hold(
        bytes in prop_oneof![words(seeds::FORWARDED_WORDS), mutated(seeds::FORWARDED, seeds::FORWARDED_WORDS)]
    ) {
        checks::forwarded(&bytes);
    }

    /// What is encoded is decoded, however it is cut, and the next message is left alone.
    #[test]
    fn chunks_come_back(
        pieces in vec(vec(any::<u8>(), 1..300), 0..8),
        next in vec(any::<u8>(), 0..20),
        step in 1..400_usize,
    ) {
        let mut body = Vec::new();
        for piece in &pieces {
            let mut buf = vec![0; CHUNK_HEAD_BYTES_MAX];
            buf.extend_from_slice(piece);
            buf.extend_from_slice(b"??");
            let chunk = frame_in_place(&mut buf, CHUNK_HEAD_BYTES_MAX..CHUNK_HEAD_BYTES_MAX + piece.len());
            let mut line = [0; CHUNK_HEAD_BYTES_MAX];
            let expected = [write_chunk_head(piece.len(), &mut line), piece, CHUNK_END].concat();
            prop_assert_eq!(&buf[chunk], &expected);
            body.extend_from_slice(&expected);
        }
        body.extend_from_slice(LAST_CHUNK);
        let end = body.len();
        body.extend_from_slice(&next);
        prop_assert_eq!(checks::decode(&body, step), Ok((pieces.concat(), Some(end))));
    }

    /// Valid documents of any shape are taken, and no proper prefix of one is.
    #[test]
    fn documents_are_taken_whole_or_not_at_all(members in vec((any::<String>(), value()), 0..6)) {
        let text = object(members.clone());
        checks::document(text.as_bytes());
        let found: Vec<_> = dialect::json::members(text.as_bytes()).map(|member| member.expect("valid")).collect();
        prop_assert_eq!(found.len(), members.len());
        for (found, (key, value)) in found.iter().zip(&members) {
            prop_assert_eq!(&*found.key, key);
            prop_assert_eq!(&text[found.value.clone()], value);
        }
        for end in (0..text.len()).step_by(1 + text.len() / 200) {
            prop_assert!(dialect::json::members(&text.as_bytes()[..end]).any(|member| member.is_err()));
        }
    }

    /// Replacing a value by its span changes that value and nothing else.
    #[test]
    fn spans_splice(members in vec((any::<String>(), value()), 1..6), pick in any::<prop::sample::Index>()) {
        let text = object(members.clone());
        let pick = pick.index(members.len());
        let member = dialect::json::members(text.as_bytes()).nth(pick).expect("picked").expect("valid");
        let spliced = [&text[..member.value.start], "\"new\"", &text[member.value.end..]].concat();
        let mut expected = members;
        expected[pick].1 = "\"new\"".to_owned();
        prop_assert_eq!(spliced, object(expected));
    }
}

/// The seeds are what they claim to be: good inputs, so that mutation starts from deep inside.
#[test]
fn seeds_hold() {
    for seed in seeds::HEADS {
        checks::head(seed);
    }
    for seed in seeds::BODIES {
        checks::chunked(seed);
        assert!(
            matches!(checks::decode(seed, 1), Ok((_, Some(_)))),
            "{}",
            seed.escape_ascii()
        );
    }
    for seed in seeds::STREAMS {
        checks::events(seed);
    }
    for seed in seeds::DOCUMENTS {
        checks::document(seed);
        assert!(
            dialect::json::members(seed).all(|member| member.is_ok()),
            "{}",
            seed.escape_ascii()
        );
    }
}
