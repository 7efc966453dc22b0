//! The search for the end of a head, line by line.

use super::HeadError;
use crate::bounds::HEAD_BYTES_MAX;

/// Where the search for the end of a head stands, between two calls with ever more bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LineScan {
    /// Bytes looked at.
    pub(super) scanned: u32,
    /// Start of the line that is not complete yet.
    line_start: u32,
    /// Start of the head: 2 where an empty line was skipped, else 0.
    pub(super) head_start: u32,
}

impl LineScan {
    /// Goes on to the end of the head and returns the bytes up to and including its empty line.
    ///
    /// Every line end is seen here, which is what refuses bare LF and folded lines: the grammar
    /// behind it (httparse) would take a bare LF.
    pub(super) fn advance(
        &mut self,
        buf: &[u8],
        leading_line_allowed: bool,
    ) -> Result<Option<usize>, HeadError> {
        let from = self.scanned as usize;
        let window = &buf[from..buf.len().min(HEAD_BYTES_MAX)];
        for offset in memchr::memchr_iter(b'\n', window) {
            let line_feed = from + offset;
            let line_start = self.line_start as usize;
            if line_feed == 0 || buf[line_feed - 1] != b'\r' {
                return Err(HeadError::BareLineFeed);
            }
            let is_first_line = self.line_start == self.head_start;
            let is_empty = line_feed - 1 == line_start;
            self.line_start = (line_feed + 1) as u32;
            if is_empty && !is_first_line {
                return Ok(Some(line_feed + 1));
            }
            if is_empty {
                if !leading_line_allowed || self.head_start > 0 {
                    return Err(HeadError::LeadingLine);
                }
                self.head_start = self.line_start;
            } else if !is_first_line && matches!(buf[line_start], b' ' | b'\t') {
                return Err(HeadError::FoldedLine);
            }
        }
        if buf.len() >= HEAD_BYTES_MAX {
            let is_first_line = self.line_start == self.head_start;
            return Err(if is_first_line {
                HeadError::TargetTooLong
            } else {
                HeadError::TooLarge
            });
        }
        self.scanned = buf.len() as u32;
        Ok(None)
    }
}
