//! What the handlers of keys, teams and budgets have in common.

use std::sync::Arc;

use axum::{
    extract::{FromRequestParts, Path, Query},
    http::{HeaderMap, HeaderValue, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{Failure, token::Who};
use crate::control::store::{self, Cause, Row};

/// Entries of one page, unless the request says.
pub const PAGE_DEFAULT: usize = 100;

/// Entries of one page at most.
pub const PAGE_MAX: usize = 1000;

/// Where something was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// In the configuration file: only there it can be changed.
    File,
    /// By the admin API.
    Runtime,
}

/// Parameters of a list.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Page {
    /// Entries at most, 1 to 1000; a page may hold fewer.
    #[schemars(range(min = 1, max = PAGE_MAX))]
    pub limit: Option<usize>,
    /// The `next` of the page before.
    pub after: Option<String>,
}

/// Entries that a page shall have.
///
/// # Errors
/// There are none so many.
pub fn page_size(limit: Option<usize>) -> Result<usize, Failure> {
    let limit = limit.unwrap_or(PAGE_DEFAULT);
    match (1..=PAGE_MAX).contains(&limit) {
        true => Ok(limit),
        false => Err(Failure::bad_request(format!("`limit` is from 1 to {PAGE_MAX}"))),
    }
}

/// Where a list goes on: behind this name and id.
pub fn cursor(name: &str, id: &str) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    for byte in name.bytes().chain([0]).chain(id.bytes()) {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Reads what [`cursor`] wrote; the beginning where there is none.
///
/// # Errors
/// It is no such text.
pub fn read_cursor(text: Option<&str>) -> Result<(String, String), Failure> {
    let Some(text) = text else {
        return Ok(Default::default());
    };
    let wrong = || Failure::bad_request("`after` is not the `next` of a page");
    if text.len() % 2 != 0 || text.len() > 4096 || !text.is_ascii() {
        return Err(wrong());
    }
    let bytes: Option<Vec<u8>> = (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok())
        .collect();
    let text = String::from_utf8(bytes.ok_or_else(wrong)?).map_err(|_| wrong())?;
    let (name, id) = text.split_once('\0').ok_or_else(wrong)?;
    Ok((name.to_owned(), id.to_owned()))
}

/// A moment as RFC 3339 has it.
pub fn moment(unix_ms: u64) -> String {
    i64::try_from(unix_ms)
        .ok()
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
        .map_or_else(|| unix_ms.to_string(), |moment| moment.to_string())
}

/// The version that the caller has seen, by `If-Match` (RFC 9110, section 13.1.1); none where any will do.
///
/// # Errors
/// It is no `ETag` of ours.
pub fn seen(headers: &HeaderMap) -> Result<Option<u64>, Failure> {
    let Some(value) = headers.get(header::IF_MATCH) else {
        return Ok(None);
    };
    let text = value.to_str().unwrap_or_default().trim();
    if text == "*" {
        return Ok(None);
    }
    let version = text
        .strip_prefix('"')
        .and_then(|text| text.strip_suffix('"'))
        .and_then(|text| text.parse().ok());
    match version {
        Some(version) => Ok(Some(version)),
        None => Err(Failure::bad_request("`If-Match` is not the `ETag` of an answer")),
    }
}

/// An answer with the version of what it shows as its `ETag`.
pub struct Tagged<T>(pub StatusCode, pub Option<u64>, pub T);

impl<T: Serialize> IntoResponse for Tagged<T> {
    fn into_response(self) -> Response {
        let mut answer = (self.0, axum::Json(self.2)).into_response();
        if let Some(version) = self.1
            && let Ok(tag) = HeaderValue::from_str(&format!("\"{version}\""))
        {
            answer.headers_mut().insert(header::ETAG, tag);
        }
        answer
    }
}

impl<T> Tagged<T> {
    /// What a row holds, as `view` shows it.
    pub fn row<D>(status: StatusCode, row: &Row<D>, view: T) -> Tagged<T> {
        Tagged(status, Some(row.version), view)
    }
}

/// Parameters behind the `?`; wrong ones are answered in JSON as all else is.
pub struct Params<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Params<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Params<T>, Failure> {
        match Query::try_from_uri(&parts.uri) {
            Ok(Query(params)) => Ok(Params(params)),
            Err(error) => Err(Failure::bad_request(error.body_text())),
        }
    }
}

/// Parts of the path.
pub struct Names<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Names<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Names<T>, Failure> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(names)) => Ok(Names(names)),
            Err(error) => Err(Failure::bad_request(error.body_text())),
        }
    }
}

/// Who asks: set by the guard.
pub struct By(pub Arc<Who>);

impl<S: Send + Sync> FromRequestParts<S> for By {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<By, Failure> {
        let who = parts.extensions.get::<Arc<Who>>().cloned();
        who.map(By).ok_or_else(|| {
            let message = "the request passed no guard; this is a bug";
            Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
        })
    }
}

impl From<store::Failure> for Failure {
    fn from(failure: store::Failure) -> Failure {
        let (status, code) = match failure.cause {
            Cause::Invalid => (StatusCode::BAD_REQUEST, "bad_request"),
            Cause::NotFound => (StatusCode::NOT_FOUND, "not_found"),
            Cause::Conflict => (StatusCode::CONFLICT, "conflict"),
            Cause::Stale => (StatusCode::PRECONDITION_FAILED, "changed_meanwhile"),
            Cause::Busy => (StatusCode::SERVICE_UNAVAILABLE, "busy"),
            Cause::Broken => (StatusCode::INTERNAL_SERVER_ERROR, "store"),
        };
        Failure::new(status, code, failure.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_goes_on_where_it_ended() {
        for (name, id) in [("alice", "key_1"), ("", ""), ("é\u{1}", "x")] {
            let read = read_cursor(Some(&cursor(name, id))).expect("a cursor");
            assert_eq!((read.0.as_str(), read.1.as_str()), (name, id));
        }
        for wrong in ["x", "0", "zz", "61", "ff00", "éé"] {
            assert!(read_cursor(Some(wrong)).is_err(), "{wrong}");
        }
        assert_eq!(moment(0), "1970-01-01T00:00:00Z");
    }
}
