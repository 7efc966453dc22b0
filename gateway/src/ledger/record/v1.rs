//! Records of version 1: without cost, user, endpoint and what else came with version 2.
//!
//! | at  | bytes | field                                                             |
//! |-----|-------|-------------------------------------------------------------------|
//! | 8   | 16    | request id                                                        |
//! | 24  | 8     | time, Unix milliseconds                                           |
//! | 32  | 32    | tokens: prompt, cached, completion, reasoning                     |
//! | 64  | 16    | time to first token, duration, microseconds                       |
//! | 80  | 16    | bytes in, bytes out                                               |
//! | 96  | 4     | status, flags                                                     |
//! | 100 | 2     | api, outcome                                                      |
//! | 102 | 5     | lengths of the names: key, team, model, provider, upstream model  |
//! | 107 | 1     | zero                                                              |
//! | 108 |       | the names, one after the other                                    |

use super::{Flags, Outcome, RecordView, RequestId, names, word};
use crate::{
    dialect::{Api, Finish, Usage},
    net::mapped::WORD_BYTES,
};

pub const VERSION: u8 = 1;

const NAMES_AT: usize = 108;

/// Reads a frame. What it does not tell is unknown: the cost is none.
pub fn decode(frame: &[u8]) -> Option<RecordView<'_>> {
    let fixed: &[u8; NAMES_AT] = frame.first_chunk()?;
    let [key, team, model, provider, upstream_model] = names(&frame[NAMES_AT..], &fixed[102..107])?;
    let u16_at = |at: usize| u16::from_le_bytes([fixed[at], fixed[at + 1]]);
    Some(RecordView {
        time_unix_ms: word(fixed, 24),
        id: RequestId(*fixed[WORD_BYTES..].first_chunk()?),
        key,
        team,
        user: "",
        organization: "",
        model,
        provider,
        upstream_model,
        endpoint: "",
        tags: "",
        api: Api::from_u8(fixed[100])?,
        outcome: Outcome::from_u8(fixed[101])?,
        finish: Finish::Unknown,
        flags: Flags(u16_at(98).into()),
        status: u16_at(96),
        attempts: 0,
        fallback: 0,
        usage: Usage {
            prompt: word(fixed, 32),
            cached: word(fixed, 40),
            completion: word(fixed, 48),
            reasoning: word(fixed, 56),
            ..Usage::default()
        },
        cost: None,
        ttft_us: word(fixed, 64),
        duration_us: word(fixed, 72),
        bytes_in: word(fixed, 80),
        bytes_out: word(fixed, 88),
    })
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A frame without its word, as the gateway that wrote version 1 made it.
    pub fn frame(prompt: u64) -> Vec<u8> {
        let mut frame = vec![0; NAMES_AT];
        frame[8..24].copy_from_slice(&[7; 16]);
        let words = [1_760_000_000_000, prompt, 4, 20, 5, 1000, 2000, 100, 1000_u64];
        for (field, word) in frame[24..96].chunks_exact_mut(8).zip(words) {
            field.copy_from_slice(&word.to_le_bytes());
        }
        frame[96..98].copy_from_slice(&200_u16.to_le_bytes());
        frame[98..100].copy_from_slice(&2_u16.to_le_bytes());
        frame[100] = 1;
        for (place, name) in ["alice", "search", "fast", "fleet", "llama"].iter().enumerate() {
            frame[102 + place] = name.len() as u8;
            frame.extend_from_slice(name.as_bytes());
        }
        frame.resize(frame.len().next_multiple_of(64), 0);
        frame
    }

    #[test]
    fn a_record_of_version_1_is_read() {
        let frame = frame(10);
        let record = decode(&frame).expect("a record");
        assert_eq!(
            (record.key, record.team, record.model),
            ("alice", "search", "fast")
        );
        assert_eq!((record.provider, record.upstream_model), ("fleet", "llama"));
        assert_eq!((record.usage.prompt, record.usage.completion), (10, 20));
        assert_eq!((record.usage.cached, record.usage.reasoning), (4, 5));
        assert_eq!(
            (record.status, record.flags, record.cost),
            (200, Flags::STREAM, None)
        );
        assert_eq!((record.ttft_us, record.duration_us), (1000, 2000));
        assert_eq!((record.bytes_in, record.bytes_out), (100, 1000));
        assert_eq!((record.user, record.endpoint, record.tags), ("", "", ""));
    }
}
