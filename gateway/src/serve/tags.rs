//! Tags that a client puts on a request for the books: `x-gateway-tags: project=apollo,stage=test`.

use crate::{
    bounds::{TAGS_BYTES_MAX, TAGS_MAX},
    error::{Error, Kind},
};

/// Reads the header's value, which goes into the record as it is.
///
/// # Errors
/// Of the client: more or longer tags than there is room for, or not of the form `name=value,…`. Names have letters,
/// digits, `_`, `-` and `.`; values are visible ASCII without commas. What would be left out of the books in silence is
/// refused instead.
pub fn parse(value: &[u8]) -> Result<&str, Error> {
    let wrong = |message: String| Error {
        code: Some("invalid_tags"),
        ..Error::new(Kind::BadRequest, message)
    };
    let value = value.trim_ascii();
    if value.len() > TAGS_BYTES_MAX {
        return Err(wrong(format!(
            "x-gateway-tags has more than {TAGS_BYTES_MAX} bytes"
        )));
    }
    let text = std::str::from_utf8(value).unwrap_or("\0");
    let mut count = 0;
    for tag in text.split(',').filter(|_| !text.is_empty()) {
        count += 1;
        let is_name = |name: &str| {
            !name.is_empty()
                && name
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b))
        };
        let good = tag
            .split_once('=')
            .is_some_and(|(name, value)| is_name(name) && value.bytes().all(|b| b.is_ascii_graphic()));
        if !good {
            return Err(wrong(
                "x-gateway-tags must be of the form name=value,name=value".into(),
            ));
        }
    }
    if count > TAGS_MAX {
        return Err(wrong(format!("x-gateway-tags has more than {TAGS_MAX} tags")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_taken_as_they_are_or_refused() {
        for good in [
            "",
            "a=b",
            "project=apollo,stage=test",
            "a=",
            "a=b=c",
            "x.y-z_1=\"{}\"",
        ] {
            assert_eq!(parse(good.as_bytes()).expect("good tags"), good);
        }
        assert_eq!(parse(b" a=b ").expect("good tags"), "a=b");
        let long = format!("a={}", "x".repeat(300));
        let many = vec!["a=b"; 17].join(",");
        for wrong in [
            "a", "=b", "a=b,", ",a=b", "a b=c", "a=b c", "a=\u{e4}", "a=\x01", &long, &many,
        ] {
            assert_eq!(
                parse(wrong.as_bytes()).expect_err("refused").code(),
                "invalid_tags",
                "{wrong}"
            );
        }
        assert!(parse(b"a=\xff").is_err());
    }
}
