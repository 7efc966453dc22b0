//! A walk over the members of a JSON object that gives byte spans, so that a body is rewritten by
//! splicing a few bytes and what the gateway does not know stays as it came.
//!
//! The whole document is validated on the way (RFC 8259), nested values included, in one pass and
//! without allocation. What is taken for JSON is what `serde_json` takes for a `RawValue`, but for
//! nesting deeper than [`JSON_DEPTH_MAX`]: a lone surrogate escape such as `\ud800` is valid
//! grammar, a number may be of any size, and a key may come twice. A caller that acts on a member
//! must settle what a second one of the same name means, since upstreams disagree.

mod scan;
mod text;

use std::borrow::Cow;
use std::iter::FusedIterator;
use std::ops::Range;

use thiserror::Error;

#[cfg(doc)]
use crate::bounds::JSON_DEPTH_MAX;
pub use text::write_string;

/// The kind of a JSON value; told by its first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `{…}`
    Object,
    /// `[…]`
    Array,
    /// `"…"`
    String,
    /// A number of any form.
    Number,
    /// `true` or `false`
    Bool,
    /// `null`
    Null,
}

/// Where and why a document is no JSON object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("invalid json at byte {offset}: {what}")]
pub struct JsonError {
    /// Offset of the offending byte from the start of the document.
    pub offset: usize,
    /// What is wrong, for a person to read.
    pub what: &'static str,
}

/// One member of an object. Its spans are offsets into the slice that was given to [`members`].
#[derive(Clone, Debug)]
pub struct Member<'a> {
    /// The key with its escapes decoded; a lone surrogate becomes U+FFFD.
    pub key: Cow<'a, str>,
    /// The key as it stands, quotes included. A member is put in front of this one at its start.
    pub key_span: Range<usize>,
    /// Kind of the value.
    pub kind: Kind,
    /// The value without white space around it; a string with its quotes.
    pub value: Range<usize>,
    raw: &'a [u8],
}

impl<'a> Member<'a> {
    /// The value's bytes as they stand.
    pub fn raw(&self) -> &'a [u8] {
        self.raw
    }

    /// The value as a whole number from 0 to 2⁶⁴ − 1. `1e3` and `100.0` are whole numbers: servers
    /// written in Python take them for such, and a limit that overlooked them could be evaded.
    pub fn as_u64(&self) -> Option<u64> {
        if self.kind != Kind::Number {
            return None;
        }
        let text = std::str::from_utf8(self.raw).ok()?;
        if let Ok(number) = text.parse() {
            return Some(number);
        }
        if text.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        const TWO_POW_64: f64 = 18_446_744_073_709_551_616.0;
        let number: f64 = text.parse().ok()?;
        let is_whole = (0.0..TWO_POW_64).contains(&number) && number.fract() == 0.0;
        is_whole.then_some(number as u64)
    }

    /// The value as `true` or `false`.
    pub fn as_bool(&self) -> Option<bool> {
        (self.kind == Kind::Bool).then(|| self.raw == b"true")
    }

    /// The value as a string with its escapes decoded; `None` also for a lone surrogate, which no
    /// Unicode string has.
    pub fn as_str(&self) -> Option<Cow<'a, str>> {
        if self.kind != Kind::String {
            return None;
        }
        text::decode(self.raw.get(1..self.raw.len().checked_sub(1)?)?)
    }

    /// Whether the value is `null`.
    pub fn is_null(&self) -> bool {
        self.kind == Kind::Null
    }

    /// Members of the value where it is an object. Offsets of their spans count from
    /// `self.value.start`.
    pub fn members(&self) -> Option<Members<'a>> {
        (self.kind == Kind::Object).then(|| Members {
            state: State::Open,
            ..members(self.raw)
        })
    }
}

/// What the walk expects next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A document whose encoding is not checked yet.
    Start,
    /// The opening brace.
    Open,
    /// A key, behind an object's beginning that is not there.
    Key,
    /// A comma or the closing brace.
    Behind,
    Done,
}

/// Iterator over the members of an object; see [`members`].
#[derive(Clone, Debug)]
pub struct Members<'a> {
    body: &'a [u8],
    at: usize,
    state: State,
}

/// Walks the members of the object that `body` holds, in order.
///
/// The document is valid when the iterator has ended without an error: members come before what
/// stands behind them has been looked at. After an error there are no more items.
///
/// To add a member, put it in front of the first one's `key_span` with a comma behind it. To
/// replace a value, replace the bytes of its `value` span.
pub fn members(body: &[u8]) -> Members<'_> {
    Members {
        body,
        at: 0,
        state: State::Start,
    }
}

/// Walks the members of an object of which `rest` is the end: from the quote of some key at its top on. Its text before that
/// is not known to be valid. Offsets count from the start of `rest`.
pub fn rest_of_members(rest: &[u8]) -> Members<'_> {
    Members {
        body: rest,
        at: 0,
        state: State::Key,
    }
}

impl<'a> Members<'a> {
    fn advance(&mut self) -> Result<Option<Member<'a>>, JsonError> {
        let (has_opened, key_at) = match self.state {
            State::Done => return Ok(None),
            State::Behind => (true, scan::skip_blank(self.body, self.at)),
            State::Key => {
                scan::check_utf8(self.body)?;
                return self.member(0).map(Some);
            }
            State::Start | State::Open => {
                if self.state == State::Start {
                    scan::check_utf8(self.body)?;
                }
                let open = scan::skip_blank(self.body, 0);
                if self.body.get(open) != Some(&b'{') {
                    return Err(JsonError {
                        offset: open,
                        what: "expected an object",
                    });
                }
                (false, scan::skip_blank(self.body, open + 1))
            }
        };
        match self.body.get(key_at) {
            Some(b'}') => self.finish(key_at + 1).map(|()| None),
            Some(b',') if has_opened => self.member(scan::skip_blank(self.body, key_at + 1)).map(Some),
            _ if has_opened => Err(JsonError {
                offset: key_at,
                what: "expected `,` or `}`",
            }),
            _ => self.member(key_at).map(Some),
        }
    }

    fn member(&mut self, key_start: usize) -> Result<Member<'a>, JsonError> {
        let body = self.body;
        let (key_end, value_start) = scan::skip_key(body, key_start)?;
        let (value_end, kind) = scan::skip_value(body, value_start)?;
        self.at = value_end;
        self.state = State::Behind;
        Ok(Member {
            key: text::decode_lossy(&body[key_start + 1..key_end - 1]),
            key_span: key_start..key_end,
            kind,
            value: value_start..value_end,
            raw: &body[value_start..value_end],
        })
    }

    /// Nothing but white space may follow the object.
    fn finish(&mut self, end: usize) -> Result<(), JsonError> {
        self.state = State::Done;
        let rest = scan::skip_blank(self.body, end);
        if rest < self.body.len() {
            return Err(JsonError {
                offset: rest,
                what: "trailing characters",
            });
        }
        Ok(())
    }
}

impl<'a> Iterator for Members<'a> {
    type Item = Result<Member<'a>, JsonError>;

    fn next(&mut self) -> Option<Self::Item> {
        let result = self.advance();
        if result.is_err() {
            self.state = State::Done;
        }
        result.transpose()
    }
}

impl FusedIterator for Members<'_> {}

#[cfg(test)]
mod tests;
