//! What a run was made on: figures mean little without it.

use std::fs;
use std::process::Command;

use serde::{Deserialize, Serialize};

/// A machine, as far as it matters.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    pub kernel: String,
    pub processor: String,
    pub cores: usize,
    pub memory_bytes: u64,
    /// Seconds since 1970.
    pub unix_s: u64,
    pub date: String,
    /// The commit that was measured, with `-dirty` where files differ from it.
    pub commit: Option<String>,
}

impl Machine {
    pub fn read() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let memory = field(&meminfo, "MemTotal").unwrap_or_default();
        let kibibytes: u64 = memory
            .split(' ')
            .next()
            .and_then(|number| number.parse().ok())
            .unwrap_or(0);
        Self {
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")
                .unwrap_or_default()
                .trim()
                .to_owned(),
            processor: field(&cpuinfo, "model name").unwrap_or_else(|| "unknown".to_owned()),
            cores: crate::sys::cores(),
            memory_bytes: kibibytes * 1024,
            unix_s: unix_s(),
            date: printed(&["date", "-u", "+%Y-%m-%d %H:%M UTC"]).unwrap_or_default(),
            commit: printed(&["git", "describe", "--always", "--dirty"]),
        }
    }
}

fn printed(words: &[&str]) -> Option<String> {
    let output = Command::new(words.first()?).args(&words[1..]).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}

#[allow(clippy::disallowed_methods)] // the harness has no clock module, and nothing is timed with this
fn unix_s() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
