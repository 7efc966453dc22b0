//! Segment files: what stands in them, and how to find the whole records of a damaged one.
//!
//! `<core>-<seq>.seg` is the header, once more the header, and then frames. A frame starts at a
//! multiple of 64 bytes and is a multiple of 64 long. Its first 8 bytes, which are stored last, are
//! magic `u16`, version `u8`, length in units of 64 bytes `u8`, and the checksum `u32` (CRC-32) of all
//! that follows in the frame. The checksum is seeded with the segment's random id and the frame's
//! place, so that bytes of another file or place never pass for a record.
//!
//! Nothing follows the last frame but zeros. After a power cut a frame may be torn, or missing before
//! a whole one (pages reach the disk in any order): reading goes on at the next whole frame.

use std::{
    fs,
    io::{self},
    path::{Path, PathBuf},
};

use super::record::{self, Record, RecordView};
use crate::{
    bounds::{RECORD_BYTES_MAX, SEGMENT_BYTES},
    net::mapped::{UNIT_BYTES, WORD_BYTES},
};

/// Where the first frame stands: behind the two copies of the header.
pub const FRAMES_AT: usize = 2 * HEADER_BYTES;

const HEADER_BYTES: usize = UNIT_BYTES;
const HEADER_MAGIC: [u8; 8] = *b"gwledger";
const LAYOUT_VERSION: u32 = 1;
const FRAME_MAGIC: u16 = 0x4c67;
const EXTENSION: &str = ".seg";
/// Ending of a segment that is not whole yet.
pub const TEMPORARY: &str = ".new";
/// Ending that a segment without a readable header is given.
pub const DAMAGED: &str = ".damaged";

const _: () = assert!(RECORD_BYTES_MAX.is_multiple_of(UNIT_BYTES) && RECORD_BYTES_MAX / UNIT_BYTES <= 255);
const _: () = assert!(SEGMENT_BYTES.is_multiple_of(4096) && SEGMENT_BYTES < u32::MAX as usize);

/// Which segment: `core` wrote it as its `seq`th. Sequence numbers of a core grow over all runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name {
    pub core: u32,
    pub seq: u64,
}

impl Name {
    /// Reads a file's name.
    pub fn parse(file: &str) -> Option<Name> {
        let (core, seq) = file.strip_suffix(EXTENSION)?.split_once('-')?;
        let name = Name {
            core: core.parse().ok()?,
            seq: seq.parse().ok()?,
        };
        (name.file() == file).then_some(name)
    }

    /// The file's name.
    pub fn file(self) -> String {
        format!("{}-{:010}{EXTENSION}", self.core, self.seq)
    }
}

/// The segments in a journal's directory, in order of core and sequence.
pub fn list(journal: &Path) -> io::Result<Vec<(Name, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(journal)? {
        let entry = entry?;
        if let Some(name) = entry.file_name().to_str().and_then(Name::parse) {
            found.push((name, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

/// The first bytes of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub name: Name,
    /// Random; seeds the checksums.
    pub id: u64,
    /// Random, the same for all segments of one run of the gateway.
    pub run: u64,
    pub created_unix_ms: u64,
}

impl Header {
    /// Both copies.
    pub fn encode(&self) -> [u8; FRAMES_AT] {
        let mut bytes = [0; FRAMES_AT];
        bytes[..8].copy_from_slice(&HEADER_MAGIC);
        bytes[8..12].copy_from_slice(&LAYOUT_VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.name.core.to_le_bytes());
        let words = [self.name.seq, self.id, self.run, self.created_unix_ms];
        for (field, word) in bytes[16..48].chunks_exact_mut(8).zip(words) {
            field.copy_from_slice(&word.to_le_bytes());
        }
        let checksum = crc32fast::hash(&bytes[..60]);
        bytes[60..64].copy_from_slice(&checksum.to_le_bytes());
        bytes.copy_within(..HEADER_BYTES, HEADER_BYTES);
        bytes
    }

    /// Reads the header from the start of a segment; from its second copy where the first is damaged.
    pub fn decode(segment: &[u8]) -> Option<Header> {
        segment
            .chunks_exact(HEADER_BYTES)
            .take(2)
            .find_map(Header::decode_copy)
    }

    fn decode_copy(bytes: &[u8]) -> Option<Header> {
        let u32_at = |at: usize| bytes[at..].first_chunk().map(|field| u32::from_le_bytes(*field));
        let u64_at = |at: usize| bytes[at..].first_chunk().map(|field| u64::from_le_bytes(*field));
        let whole = bytes[..8] == HEADER_MAGIC
            && u32_at(8)? == LAYOUT_VERSION
            && u32_at(60)? == crc32fast::hash(&bytes[..60]);
        if !whole {
            return None;
        }
        Some(Header {
            name: Name {
                core: u32_at(12)?,
                seq: u64_at(16)?,
            },
            id: u64_at(24)?,
            run: u64_at(32)?,
            created_unix_ms: u64_at(40)?,
        })
    }
}

/// The checksum of a frame of the segment `id` that stands at `offset`.
fn checksum(id: u64, offset: usize, frame: &[u8]) -> u32 {
    let place = (offset / UNIT_BYTES) as u32;
    let units = (frame.len() / UNIT_BYTES) as u32;
    let seed = (id ^ (id >> 32)) as u32 ^ place ^ (units << 24);
    let mut hasher = crc32fast::Hasher::new_with_initial(seed);
    hasher.update(&frame[WORD_BYTES..]);
    hasher.finalize()
}

/// Writes `record` as a frame for a place that [`seal`] is told later; returns its length in bytes.
pub fn encode(record: &Record, frame: &mut [u8; RECORD_BYTES_MAX]) -> usize {
    let used = record.encode(frame);
    let bytes = used.next_multiple_of(UNIT_BYTES);
    frame[used..bytes].fill(0);
    bytes
}

/// Most bytes of a frame whose names and tags are `names_bytes` long together.
pub fn frame_bytes_max(names_bytes: usize) -> usize {
    (record::NAMES_AT + names_bytes)
        .next_multiple_of(UNIT_BYTES)
        .min(RECORD_BYTES_MAX)
}

/// Writes the word of a frame that will stand at `offset` of the segment `id`.
pub fn seal(frame: &mut [u8], id: u64, offset: usize) {
    let checksum = checksum(id, offset, frame);
    frame[..2].copy_from_slice(&FRAME_MAGIC.to_le_bytes());
    frame[2] = record::VERSION;
    frame[3] = (frame.len() / UNIT_BYTES) as u8;
    frame[4..8].copy_from_slice(&checksum.to_le_bytes());
}

/// The whole frame at `offset`, if there is one.
fn frame_at(segment: &[u8], id: u64, offset: usize) -> Option<&[u8]> {
    let word: &[u8; WORD_BYTES] = segment.get(offset..)?.first_chunk()?;
    let bytes = usize::from(word[3]) * UNIT_BYTES;
    if u16::from_le_bytes([word[0], word[1]]) != FRAME_MAGIC
        || !(UNIT_BYTES..=RECORD_BYTES_MAX).contains(&bytes)
    {
        return None;
    }
    let frame = segment.get(offset..offset + bytes)?;
    let stored = u32::from_le_bytes([word[4], word[5], word[6], word[7]]);
    (checksum(id, offset, frame) == stored).then_some(frame)
}

/// What [`next`] finds.
#[allow(clippy::large_enum_variant)] // one at a time, on the stack; a box would be an allocation for each record
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found<'a> {
    Record(RecordView<'a>),
    /// Bytes from this offset to the next frame, or to the end, are not a whole record.
    Torn {
        offset: usize,
    },
}

/// Finds what stands at `*at`, a multiple of 64 in the bytes of the segment `id`, and moves `*at`
/// behind it. `None` where no more was appended; `*at` then stays. An append that the process did not
/// live to finish, or has not finished yet, was not made: it has no word and nothing follows it.
pub fn next<'a>(segment: &'a [u8], id: u64, at: &mut usize) -> Option<Found<'a>> {
    let start = *at;
    if let Some(frame) = frame_at(segment, id, start) {
        *at = start + frame.len();
        return Some(match RecordView::decode(frame, frame[2]) {
            Some(record) => Found::Record(record),
            None => Found::Torn { offset: start },
        });
    }
    let mut offset = start;
    // Behind the last unit that is not all zeros.
    let mut written_end = start;
    while let Some(rest) = segment.get(offset..).filter(|rest| !rest.is_empty()) {
        if offset > start && frame_at(segment, id, offset).is_some() {
            *at = offset;
            return Some(Found::Torn { offset: start });
        }
        let unit = &rest[..rest.len().min(UNIT_BYTES)];
        offset += UNIT_BYTES;
        if unit.iter().any(|byte| *byte != 0) {
            written_end = offset;
        }
    }
    let word = segment.get(start..)?.first_chunk::<WORD_BYTES>();
    let unfinished = word == Some(&[0; WORD_BYTES]) && written_end - start <= RECORD_BYTES_MAX;
    if written_end == start || unfinished {
        return None;
    }
    *at = segment.len().next_multiple_of(UNIT_BYTES);
    Some(Found::Torn { offset: start })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        super::record::tests::{any_record, numbered},
        *,
    };

    const ID: u64 = 0x1122_3344_5566_7788;

    fn header() -> Header {
        Header {
            name: Name { core: 3, seq: 7 },
            id: ID,
            run: 5,
            created_unix_ms: 9,
        }
    }

    /// A segment of these records, and where each starts.
    fn segment(records: &[Record]) -> (Vec<u8>, Vec<usize>) {
        let mut bytes = header().encode().to_vec();
        let mut starts = Vec::new();
        let mut frame = [0; RECORD_BYTES_MAX];
        for record in records {
            let length = encode(record, &mut frame);
            seal(&mut frame[..length], ID, bytes.len());
            starts.push(bytes.len());
            bytes.extend_from_slice(&frame[..length]);
        }
        (bytes, starts)
    }

    /// All whole records, and the offsets of what is torn.
    fn read(bytes: &[u8], id: u64) -> (Vec<Record>, Vec<usize>) {
        let (mut records, mut torn) = (Vec::new(), Vec::new());
        let mut at = FRAMES_AT;
        while let Some(found) = next(bytes, id, &mut at) {
            match found {
                Found::Record(record) => records.push(record.to_record()),
                Found::Torn { offset } => torn.push(offset),
            }
            assert!(torn.len() + records.len() <= bytes.len(), "no progress");
        }
        (records, torn)
    }

    fn records() -> Vec<Record> {
        let mut records: Vec<Record> = (0..6).map(numbered).collect();
        records[2].upstream_model = "x".repeat(128).into();
        records[3].team = "y".repeat(100).into();
        records
    }

    proptest! {
        #[test]
        fn records_read_back(records in prop::collection::vec(any_record(), 0..20), zeros in 0..300_usize) {
            let (mut bytes, _) = segment(&records);
            bytes.resize(bytes.len() + zeros, 0);
            prop_assert_eq!(read(&bytes, ID), (records, vec![]));
        }

        #[test]
        fn foreign_bytes_hold_no_record(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            prop_assert_eq!(read(&bytes, ID).0, vec![]);
            prop_assert_eq!(Header::decode(&bytes), None);
        }
    }

    #[test]
    fn a_cut_at_any_byte_keeps_what_is_whole_before_it() {
        let records = records();
        let (bytes, starts) = segment(&records);
        for cut in FRAMES_AT..bytes.len() {
            let ends = starts[1..].iter().copied().chain([bytes.len()]);
            let whole = ends.filter(|end| *end <= cut).count();
            // A file that is shorter, and one whose tail is zeros.
            let mut zeroed = bytes.clone();
            zeroed[cut..].fill(0);
            for damaged in [&bytes[..cut], &zeroed[..]] {
                let (found, torn) = read(damaged, ID);
                // Zeros behind a record's last byte that is not zero change nothing.
                let kept = found.len();
                assert!(
                    kept == whole || (kept == whole + 1 && damaged.len() == bytes.len()),
                    "cut at {cut}"
                );
                assert_eq!(found, records[..kept], "cut at {cut}");
                let inside = !starts.contains(&cut) && kept == whole;
                assert_eq!(
                    torn,
                    if inside { vec![starts[whole]] } else { vec![] },
                    "cut at {cut}"
                );
            }
        }
    }

    #[test]
    fn any_damaged_byte_costs_its_own_record_only() {
        let records = records();
        let (bytes, starts) = segment(&records);
        for at in FRAMES_AT..bytes.len() {
            let hit = starts.iter().rposition(|start| *start <= at).unwrap();
            for damage in [0x01, 0x80, 0xff, bytes[at]] {
                if damage == 0 {
                    continue;
                }
                let mut damaged = bytes.clone();
                damaged[at] ^= damage;
                let (found, torn) = read(&damaged, ID);
                let rest: Vec<&Record> = records
                    .iter()
                    .enumerate()
                    .filter(|(i, _)| *i != hit)
                    .map(|(_, r)| r)
                    .collect();
                assert_eq!(found.iter().collect::<Vec<_>>(), rest, "byte {at} ^ {damage}");
                assert_eq!(torn, [starts[hit]], "byte {at} ^ {damage}");
            }
        }
    }

    #[test]
    fn a_page_that_never_reached_the_disk_is_torn_and_what_follows_is_read() {
        let records = records();
        let (mut bytes, starts) = segment(&records);
        bytes[starts[1]..starts[3]].fill(0);
        let (found, torn) = read(&bytes, ID);
        assert_eq!(found, [&records[..1], &records[3..]].concat());
        assert_eq!(torn, [starts[1]]);
    }

    #[test]
    fn an_append_that_was_not_finished_was_not_made() {
        let records = records();
        let (mut bytes, starts) = segment(&records);
        let last = *starts.last().unwrap();
        bytes[last..last + WORD_BYTES].fill(0);
        bytes.resize(8192, 0);
        assert_eq!(read(&bytes, ID), (records[..records.len() - 1].to_vec(), vec![]));
        // More than one append can have left is damage.
        bytes[last + RECORD_BYTES_MAX] = 1;
        assert_eq!(
            read(&bytes, ID),
            (records[..records.len() - 1].to_vec(), vec![last])
        );
    }

    #[test]
    fn records_of_version_1_are_read_among_others() {
        let (mut bytes, _) = segment(&records()[..1]);
        let mut old = record::tests::v1_frame(77);
        seal(&mut old, ID, bytes.len());
        // The version is not part of what the checksum is made of.
        old[2] = 1;
        bytes.extend_from_slice(&old);
        let (found, torn) = read(&bytes, ID);
        assert!(torn.is_empty());
        assert_eq!(found.len(), 2);
        assert_eq!((found[1].usage.prompt, found[1].cost), (77, None));
        // One of a version to come is skipped, and what is around it is read.
        let at = bytes.len() - old.len();
        bytes[at + 2] = 9;
        assert_eq!(read(&bytes, ID).0.len(), 1);
    }

    #[test]
    fn frames_of_another_segment_or_place_are_no_records() {
        let (bytes, starts) = segment(&records());
        assert_eq!(read(&bytes, ID + 1).0, []);
        let mut moved = header().encode().to_vec();
        moved.extend_from_slice(&bytes[starts[1]..]);
        assert_eq!(read(&moved, ID).0, []);
    }

    #[test]
    fn the_header_survives_damage_to_either_copy() {
        let bytes = header().encode();
        for at in 0..FRAMES_AT {
            let mut damaged = bytes;
            damaged[at] ^= 0x40;
            assert_eq!(Header::decode(&damaged), Some(header()), "byte {at}");
        }
        assert_eq!(Header::decode(&bytes[..64]), Some(header()));
        assert_eq!(Header::decode(&bytes[..63]), None);
    }

    #[test]
    fn file_names_read_back_and_foreign_ones_are_refused() {
        let name = Name { core: 12, seq: 345 };
        assert_eq!(name.file(), "12-0000000345.seg");
        assert_eq!(Name::parse("12-0000000345.seg"), Some(name));
        for foreign in [
            "12-345.seg",
            "12-0000000345.seg.new",
            "a-1.seg",
            "-1.seg",
            "+1-0000000001.seg",
            "1.seg",
        ] {
            assert_eq!(Name::parse(foreign), None, "{foreign}");
        }
    }
}
