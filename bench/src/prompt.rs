//! Prompts that look like what people send: sentences, some code, quotes and line ends that JSON must escape, some
//! letters outside ASCII. A block of `x` would compress, escape and parse like nothing that a gateway ever sees.

use crate::random::Random;

const WORDS: &[&str] = &[
    "the",
    "of",
    "and",
    "to",
    "a",
    "in",
    "is",
    "that",
    "for",
    "it",
    "as",
    "with",
    "on",
    "by",
    "this",
    "be",
    "from",
    "are",
    "at",
    "which",
    "an",
    "we",
    "or",
    "not",
    "can",
    "have",
    "when",
    "each",
    "if",
    "more",
    "request",
    "answer",
    "server",
    "client",
    "model",
    "token",
    "stream",
    "time",
    "order",
    "customer",
    "invoice",
    "report",
    "summary",
    "table",
    "value",
    "error",
    "result",
    "please",
    "explain",
    "compare",
    "rewrite",
    "translate",
    "list",
    "steps",
    "because",
    "between",
    "contract",
    "section",
    "paragraph",
    "meeting",
    "schedule",
    "delivery",
    "warehouse",
    "measurement",
    "temperature",
    "connection",
    "database",
    "function",
    "argument",
    "interface",
    "deployment",
    "throughput",
    "latency",
    "however",
    "therefore",
    "although",
    "approximately",
    "recommendation",
    "café",
    "naïve",
    "Zürich",
    "größer",
    "señor",
];

const CODE: &[&str] = &[
    "\n```python\ndef total(rows):\n\treturn sum(row[\"amount\"] for row in rows)\n```\n",
    "\n```rust\nlet line = format!(\"{name}: {value}\\n\");\n```\n",
    "\n    SELECT name, COUNT(*) FROM \"orders\" WHERE total > 100 GROUP BY name;\n",
    "\n- first: check C:\\logs\\today.txt\n- second: run `make test`\n",
];

/// `bytes` bytes of text; the same seed gives the same text.
pub fn text(bytes: usize, seed: u64) -> String {
    let mut random = Random::new(seed ^ 0x5EED);
    let mut text = String::with_capacity(bytes + 128);
    let mut words_left = 0;
    while text.len() < bytes {
        if words_left == 0 {
            words_left = 5 + random.below(14);
            match random.below(16) {
                0 => text.push_str(CODE[random.below(CODE.len() as u64) as usize]),
                1 => text.push_str("\n\n"),
                2 => text.push_str(" \"As agreed,\" she wrote. "),
                _ => text.push_str(". "),
            }
        }
        // Squared: the first words of the list come most often, as in any language.
        let place = random.unit() * random.unit();
        text.push_str(WORDS[(place * WORDS.len() as f64) as usize]);
        text.push(' ');
        words_left -= 1;
    }
    let mut end = bytes;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    // A character may have been cut off: the size is promised in bytes.
    text.extend(std::iter::repeat_n('.', bytes - end));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_has_its_size_and_needs_escapes() {
        for bytes in [0, 1, 7, 255, 1000, 100_000] {
            assert_eq!(text(bytes, 1).len(), bytes);
        }
        let long = text(100_000, 1);
        assert!(long.contains('"') && long.contains('\n') && long.contains('\\') && !long.is_ascii());
        assert_eq!(text(500, 3), text(500, 3));
        assert_ne!(text(500, 3), text(500, 4));
    }
}
