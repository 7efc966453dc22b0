//! How tokens are counted where a provider does not tell them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The vocabulary that a model's tokens are counted with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Tokenizer {
    /// OpenAI's models from gpt-4o on, and gpt-oss.
    O200kBase,
    /// gpt-4, gpt-3.5, and embeddings.
    Cl100kBase,
    /// None: by a ratio of bytes to tokens that settled requests teach.
    None,
}
