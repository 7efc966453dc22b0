//! Admin tokens.

use super::{root, unique_names};
use crate::config::{Config, load::Report, schema::ADMIN_TOKENS_MAX};

/// Fewest characters of a token that a person thought of; a generated one has 64.
const TOKEN_CHARS_MIN: usize = 16;

pub(super) fn tokens(config: &Config, report: &mut Report<'_>) {
    let tokens = &config.admin.tokens;
    let path = root("admin").name("tokens");
    if tokens.len() > ADMIN_TOKENS_MAX {
        let count = tokens.len();
        report.error(&path, format!("{count} tokens; the most is {ADMIN_TOKENS_MAX}"));
        return;
    }
    unique_names(
        "admin.tokens",
        tokens.iter().map(|token| token.name.as_str()),
        report,
    );
    for (index, token) in tokens.iter().enumerate() {
        let path = path.index(index);
        if token.name == "admin" {
            report.error(&path.name("name"), "`admin` is the name of admin.token");
        }
        let text = token.token.expose();
        if text.len() < TOKEN_CHARS_MIN {
            report.error(
                &path.name("token"),
                format!("the token is too short; the least is {TOKEN_CHARS_MIN} characters"),
            );
        }
        let earlier = tokens[..index]
            .iter()
            .position(|other| other.token == token.token);
        if let Some(other) = earlier {
            report.error(
                &path.name("token"),
                format!("the same token as admin.tokens[{other}]"),
            );
        } else if config.admin.token.as_ref() == Some(&token.token) {
            report.error(&path.name("token"), "the same token as admin.token");
        }
    }
}
