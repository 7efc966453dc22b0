//! What a request used where its provider does not tell: by a ratio of bytes to tokens that each upstream model's settled
//! requests teach.
//!
//! A ratio is kept for each target's model, for the body of requests and for the text of answers. It begins with the rule
//! of thumb and follows what providers tell by an exponentially weighted mean, so that a model that is asked in Chinese,
//! or writes code, is estimated by what it really does. Several cores teach at the same time without a lock: a lesson may
//! be lost to another one of the same moment, which an average can bear.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
};

/// Ratios are bytes a token in 1/256.
const ONE: u64 = 256;

/// Bytes a token before anything is learned: OpenAI's tokenizers average four characters of English
/// (platform.openai.com/tokenizer).
const FIRST: u32 = 4 * ONE as u32;

/// A lesson's weight: half of what is known comes from the last eleven requests.
const WEIGHT: i64 = 16;

/// Answers after which the mean is as near as it comes (1/16 each: what was believed first weighs less than a thousandth).
const LESSONS_FIRST: u32 = 128;

/// Bounds of a lesson, bytes a token: less than one byte or more than 64 are figures that mean something else.
const RATIO_MIN: u64 = ONE / 2;
const RATIO_MAX: u64 = 64 * ONE;

/// Requests and answers of fewer tokens teach nothing: what frames them outweighs their text.
const TOKENS_MIN: u64 = 16;

/// The ratios of one upstream model.
#[derive(Debug)]
pub struct Calibration {
    input: AtomicU32,
    output: AtomicU32,
    /// Answers that have taught, up to [`LESSONS_FIRST`].
    lessons: AtomicU32,
}

impl Default for Calibration {
    fn default() -> Calibration {
        Calibration {
            input: AtomicU32::new(FIRST),
            output: AtomicU32::new(FIRST),
            lessons: AtomicU32::new(0),
        }
    }
}

impl Calibration {
    /// Input tokens of a body, at least 1.
    pub fn input_tokens(&self, body_bytes: u64) -> u64 {
        tokens(&self.input, body_bytes).max(1)
    }

    /// Output tokens of generated text, as JSON has it.
    pub fn output_tokens(&self, text_bytes: u64) -> u64 {
        tokens(&self.output, text_bytes)
    }

    /// Whether every answer is still worth learning from; later some are enough.
    pub fn is_untaught(&self) -> bool {
        self.lessons.load(Relaxed) < LESSONS_FIRST
    }

    /// Learns from a request whose provider told its input tokens.
    pub fn learn_input(&self, body_bytes: u64, tokens: u64) {
        learn(&self.input, body_bytes, tokens);
    }

    /// Learns from an answer whose provider told its output tokens. Not for one with reasoning: it may be billed and not
    /// sent.
    pub fn learn_output(&self, text_bytes: u64, tokens: u64) {
        if learn(&self.output, text_bytes, tokens) && self.is_untaught() {
            self.lessons.fetch_add(1, Relaxed);
        }
    }
}

fn tokens(ratio: &AtomicU32, bytes: u64) -> u64 {
    let ratio = u64::from(ratio.load(Relaxed)).max(1);
    bytes.saturating_mul(ONE) / ratio
}

/// Whether there was something to learn.
fn learn(ratio: &AtomicU32, bytes: u64, tokens: u64) -> bool {
    if tokens < TOKENS_MIN {
        return false;
    }
    let lesson = bytes.saturating_mul(ONE) / tokens;
    if !(RATIO_MIN..=RATIO_MAX).contains(&lesson) {
        return false;
    }
    let known = i64::from(ratio.load(Relaxed));
    let next = known + (lesson as i64 - known) / WEIGHT;
    ratio.store(next as u32, Relaxed);
    true
}

/// The calibrations of all upstream models in use, kept over reloads.
#[derive(Debug, Default)]
pub struct Calibrations {
    /// By provider and model.
    known: HashMap<(String, String), Arc<Calibration>>,
}

impl Calibrations {
    /// The calibration of a provider's model.
    pub fn of(&mut self, provider: &str, model: &str) -> Arc<Calibration> {
        let name = (provider.to_owned(), model.to_owned());
        self.known.entry(name).or_default().clone()
    }

    /// Forgets those that no snapshot uses any more.
    pub fn sweep(&mut self) {
        self.known
            .retain(|_, calibration| Arc::strong_count(calibration) > 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_begins_with_the_rule_of_thumb_and_learns_what_is_true() {
        let calibration = Calibration::default();
        assert_eq!(
            (calibration.input_tokens(400), calibration.output_tokens(400)),
            (100, 100)
        );
        assert_eq!(
            (calibration.input_tokens(0), calibration.output_tokens(0)),
            (1, 0)
        );
        for _ in 0..200 {
            calibration.learn_input(1000, 500);
            calibration.learn_output(6000, 1000);
        }
        let near = |estimated: u64, tokens: u64| estimated.abs_diff(tokens) * 20 <= tokens;
        assert!(near(calibration.input_tokens(10_000), 5000));
        assert!(near(calibration.output_tokens(60_000), 10_000));
    }

    #[test]
    fn figures_that_cannot_be_do_not_teach() {
        let calibration = Calibration::default();
        for (bytes, tokens) in [
            (100, 0),
            (100, 15),
            (1, 1_000_000),
            (u64::MAX, 16),
            (1_000_000, 16),
        ] {
            calibration.learn_input(bytes, tokens);
        }
        assert_eq!(calibration.input_tokens(400), 100);
        assert_eq!(calibration.input_tokens(u64::MAX), u64::MAX / 1024);
    }

    #[test]
    fn a_reload_keeps_what_was_learned() {
        let mut all = Calibrations::default();
        let first = all.of("p", "m");
        for _ in 0..100 {
            first.learn_input(1000, 500);
        }
        all.sweep();
        assert_ne!(all.of("p", "m").input_tokens(400), 100);
        drop(first);
        all.sweep();
        assert_eq!(all.of("p", "m").input_tokens(400), 100);
    }
}
