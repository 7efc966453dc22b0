//! What is wrong with a configuration file, and where.

use std::fmt;

/// A place in the file: line and column, both from 1; columns count characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pos {
    /// Line, from 1.
    pub line: u32,
    /// Column in characters, from 1.
    pub column: u32,
}

/// One thing that is wrong (an error) or doubtful (a warning).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The file's name as it was given.
    pub source: String,
    /// Where in the file; `None` if the file as a whole is meant.
    pub pos: Option<Pos>,
    /// Path of the field, for example `models[0].targets[1]`; empty for the whole file.
    pub path: String,
    /// What is wrong, in lower case without a full stop. Never holds the value of a secret.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.source)?;
        if let Some(pos) = self.pos {
            write!(f, ":{}:{}", pos.line, pos.column)?;
        }
        if !self.path.is_empty() {
            write!(f, ": {}", self.path)?;
        }
        write!(f, ": {}", self.message)
    }
}

/// All that is wrong with a configuration; at least one problem, in the order of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Errors(pub Vec<Problem>);

impl fmt::Display for Errors {
    /// One line an error.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Errors {}

/// Words with fewer changes than this share of their length are taken for a slip of the keyboard.
const SIMILARITY_MIN: f64 = 0.6;

/// `; did you mean …?` with the known word nearest to `word`, or the known words if none is near.
pub(super) fn hint<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let known: Vec<&str> = known.into_iter().filter(|known| !known.is_empty()).collect();
    if let Some(nearest) = nearest(word, &known) {
        return format!("; did you mean `{nearest}`?");
    }
    match known.len() {
        0 => "; there is none".into(),
        // A longer list hides the message; the schema has it.
        1..=16 => format!("; known: {}", known.join(", ")),
        _ => String::new(),
    }
}

/// The known word that `word` was probably meant to be.
pub(super) fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    // The distance costs the product of both lengths, and a wrong word is foreign input.
    if word.len() > crate::bounds::NAME_BYTES_MAX {
        return None;
    }
    let word = word.to_lowercase();
    let score = |known: &str| strsim::normalized_damerau_levenshtein(&word, &known.to_lowercase());
    known
        .iter()
        .map(|known| (score(known), *known))
        .filter(|(score, _)| *score >= SIMILARITY_MIN)
        .max_by(|one, two| one.0.total_cmp(&two.0))
        .map(|(_, known)| known)
}

/// Shortens and escapes foreign text for a message, so that it stays one readable line.
pub(super) fn quote(text: &str) -> String {
    const QUOTE_CHARS_MAX: usize = 64;
    let mut short: String = text.chars().take(QUOTE_CHARS_MAX).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    format!("`{}`", short.escape_debug())
}

/// Another library's message in our form: lower case, one line, no full stop.
pub(super) fn plain_words(message: &str) -> String {
    let message = message.trim().trim_end_matches('.').replace(['\n', '\r'], " ");
    let mut chars = message.chars();
    match (chars.next(), chars.clone().next()) {
        // An abbreviation such as YAML keeps its capitals.
        (Some(first), Some(second)) if !second.is_uppercase() => first.to_lowercase().chain(chars).collect(),
        _ => message,
    }
}
