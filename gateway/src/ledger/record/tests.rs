use proptest::prelude::*;

pub use super::v1::tests::frame as v1_frame;
use super::*;

/// Any record whose names are within their bound.
pub fn any_record() -> impl Strategy<Value = Record> {
    let name = || {
        "[a-z\u{e4}\u{4e2d}/.:-]{0,128}".prop_map(|name| -> Arc<str> {
            let end = name.floor_char_boundary(NAME_BYTES_MAX);
            Arc::from(&name[..end])
        })
    };
    let names = prop::collection::vec(name(), 8);
    let tags = "[a-z=,]{0,255}".prop_map(Arc::from);
    let facts = (1..=4_u8, 0..=4_u8, any::<u32>(), any::<u16>(), any::<[u8; 16]>());
    let small = (0..=3_u8, 0..=6_u8, any::<[u8; 2]>());
    (names, tags, facts, small, any::<[u64; 12]>()).prop_map(|(names, tags, facts, small, numbers)| Record {
        time_unix_ms: numbers[0],
        id: RequestId(facts.4),
        key: names[0].clone(),
        team: names[1].clone(),
        user: names[2].clone(),
        organization: names[3].clone(),
        model: names[4].clone(),
        provider: names[5].clone(),
        upstream_model: names[6].clone(),
        endpoint: names[7].clone(),
        tags,
        api: Api::from_u8(facts.0).unwrap(),
        outcome: Outcome::from_u8(facts.1).unwrap(),
        finish: Finish::from_u8(small.1).unwrap(),
        flags: Flags(facts.2),
        status: facts.3,
        attempts: small.2[0],
        fallback: small.2[1],
        usage: Usage {
            prompt: numbers[1],
            cached: numbers[2],
            completion: numbers[3],
            reasoning: numbers[4],
            cache_write_5m: numbers[9],
            cache_write_1h: numbers[10],
            tier: Tier::from_u8(small.0).unwrap(),
            clamped: Flags(facts.2).has(Flags::CLAMPED),
        },
        cost: Some(numbers[11]).filter(|cost| cost % 3 != 0),
        ttft_us: numbers[5],
        duration_us: numbers[6],
        bytes_in: numbers[7],
        bytes_out: numbers[8],
    })
}

/// A small record that `number` tells from others.
pub fn numbered(number: u64) -> Record {
    let mut random = [0; 10];
    random[2..].copy_from_slice(&number.to_be_bytes());
    Record {
        time_unix_ms: 1_760_000_000_000,
        id: RequestId::new(1_760_000_000_000, random),
        key: "alice".into(),
        team: "".into(),
        user: "".into(),
        organization: "".into(),
        model: "fast".into(),
        provider: "fleet".into(),
        upstream_model: "llama-3.3-70b".into(),
        endpoint: "http://10.0.0.11:8000".into(),
        tags: "".into(),
        api: Api::ChatCompletions,
        outcome: Outcome::Complete,
        finish: Finish::Stop,
        flags: Flags::STREAM,
        status: 200,
        attempts: 1,
        fallback: 0,
        cost: Some(number),
        usage: Usage {
            prompt: number,
            cached: 0,
            completion: 1,
            reasoning: 0,
            ..Usage::default()
        },
        ttft_us: 1,
        duration_us: 2,
        bytes_in: 3,
        bytes_out: 4,
    }
}

proptest! {
    #[test]
    fn a_record_reads_back_as_it_was_written(record in any_record()) {
        // What stood in the buffer before does not matter.
        let mut frame = [0xa5; RECORD_BYTES_MAX];
        let bytes = record.encode(&mut frame);
        let view = RecordView::decode(&frame[..bytes], VERSION).unwrap();
        prop_assert_eq!(view, record.view());
        prop_assert_eq!(view.to_record(), record);
    }

    #[test]
    fn foreign_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..RECORD_BYTES_MAX)) {
        for version in 0..4 {
            let _ = RecordView::decode(&bytes, version);
        }
    }

    #[test]
    fn ids_read_back(bytes in any::<[u8; 16]>()) {
        let id = RequestId(bytes);
        prop_assert_eq!(id.to_string().parse(), Ok(id));
        prop_assert_eq!(id.to_string().to_uppercase().parse(), Ok(id));
    }
}

#[test]
fn an_unknown_cost_is_none_and_never_zero() {
    let mut frame = [0; RECORD_BYTES_MAX];
    for (cost, read) in [
        (None, None),
        (Some(0), Some(0)),
        (Some(u64::MAX), Some(u64::MAX - 1)),
    ] {
        let record = Record { cost, ..numbered(1) };
        let bytes = record.encode(&mut frame);
        assert_eq!(RecordView::decode(&frame[..bytes], VERSION).unwrap().cost, read);
    }
}

#[test]
fn names_that_are_too_long_are_cut_between_characters() {
    let mut record = numbered(1);
    record.model = "\u{4e2d}".repeat(100).into();
    let mut frame = [0; RECORD_BYTES_MAX];
    let bytes = record.encode(&mut frame);
    assert_eq!(
        RecordView::decode(&frame[..bytes], VERSION).unwrap().model,
        "\u{4e2d}".repeat(42)
    );
}

#[test]
fn ids_are_uuids_of_version_7_and_sort_by_time() {
    let id = RequestId::new(0x0123_4567_89ab, [0xff; 10]);
    assert_eq!(id.to_string(), "0123456789ab7fffbfffffffffffffff");
    assert!(id < RequestId::new(0x0123_4567_89ac, [0; 10]));
    for wrong in [
        "",
        "0123",
        "0123456789ab7fffbfffffffffffffffff",
        "+123456789ab7fffbfffffffffffffff",
        "é",
    ] {
        assert_eq!(wrong.parse::<RequestId>(), Err(NotARequestId), "{wrong}");
    }
}
