//! Scenarios: small YAML files that say what is sent and what the simulated upstream makes of it.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Deserializer};

use crate::load::{self, Arrivals, HangUp, Part, Sources, Stage};
use crate::upstream::{Behaviour, behaviour};

/// Parts of one mix. Targets that map models by name know so many.
pub const PARTS_MAX: usize = 8;

/// Which cost of the target is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Figure {
    /// CPU per event.
    Event,
    /// CPU per request.
    Request,
    /// Resident memory per open stream.
    Stream,
}

/// One scenario, as its file says.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// The file's name without `.yaml`.
    #[serde(skip)]
    pub name: String,
    /// What it is, on one line.
    pub about: String,
    pub figure: Figure,
    /// Requests at once, all parts together that have no connections of their own.
    #[serde(default = "one")]
    pub connections: usize,
    #[serde(default = "yes")]
    pub keep_alive: bool,
    /// TLS between the load generator and the target.
    #[serde(default)]
    pub tls: bool,
    /// TLS sessions are resumed where the target hands tickets out; otherwise each connection has a whole handshake.
    #[serde(default)]
    pub tls_resume: bool,
    /// The scenario that this one's delay is compared with.
    pub beside: Option<String>,
    /// Open loop: requests per second.
    pub rate: Option<f64>,
    /// Open loop: rates that change.
    #[serde(default)]
    pub stages: Vec<StageFile>,
    /// Requests of the open loop come as if by many who know nothing of each other.
    #[serde(default)]
    pub poisson: bool,
    #[serde(default, deserialize_with = "time")]
    pub ramp: Duration,
    #[serde(default, deserialize_with = "time")]
    pub warm_up: Duration,
    /// Time of the window, unless the command line says it.
    #[serde(default = "ten_seconds", deserialize_with = "time")]
    pub window: Duration,
    /// Time that one request may take.
    #[serde(default = "two_minutes", deserialize_with = "time")]
    pub timeout: Duration,
    /// The clients' addresses.
    pub source: Option<String>,
    /// Only for targets that check keys.
    #[serde(default)]
    pub needs_keys: bool,
    pub parts: Vec<PartFile>,
}

/// One stage of a rate.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageFile {
    pub from: f64,
    pub to: f64,
    #[serde(deserialize_with = "time")]
    pub time: Duration,
}

/// One sort of request. What is not said is as in [`Part`].
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartFile {
    pub name: String,
    /// What the simulated upstream does, in its words.
    #[serde(default)]
    pub behaviour: String,
    #[serde(default = "weight")]
    pub weight: u32,
    pub connections: Option<usize>,
    #[serde(default)]
    pub hold: bool,
    /// Path of the target; its end tells the API.
    #[serde(default = "chat")]
    pub path: String,
    #[serde(default = "yes")]
    pub stream: bool,
    #[serde(default = "prompt_bytes")]
    pub prompt_bytes: usize,
    #[serde(default)]
    pub shared_bytes: usize,
    #[serde(default = "weight")]
    pub prompts: u32,
    pub max_tokens: Option<u32>,
    #[serde(default)]
    pub include_usage: bool,
    pub hang_up: Option<HangUpFile>,
    pub slow_reader: Option<u64>,
    #[serde(default)]
    pub tools: u32,
    /// A key that the target must refuse.
    #[serde(default)]
    pub bad_key: bool,
    /// The status that each answer must have [default: 200, or 401 with `bad_key`].
    pub expect_status: Option<u16>,
    /// Any status will do: the behaviour has faults on purpose.
    #[serde(default)]
    pub any_status: bool,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HangUpFile {
    pub after_tokens: u64,
    pub share_percent: u8,
}

fn one() -> usize {
    1
}
fn weight() -> u32 {
    1
}
fn yes() -> bool {
    true
}
fn prompt_bytes() -> usize {
    256
}
fn chat() -> String {
    "/v1/chat/completions".to_owned()
}
fn ten_seconds() -> Duration {
    Duration::from_secs(10)
}
fn two_minutes() -> Duration {
    Duration::from_secs(120)
}

fn time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    behaviour::duration(&text)
        .ok_or_else(|| serde::de::Error::custom("expected a time such as 250ms, 10s or 2m"))
}

/// The simulated upstream knows the parts by these names, whatever the scenario: so a target's configuration need not
/// change with it.
pub fn model_of(part: usize) -> String {
    format!("bench-{part}")
}

impl Scenario {
    /// Reads one file.
    ///
    /// # Errors
    /// A file that cannot be read, is no scenario, or asks for what there is not.
    pub fn read(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        Self::parse(&name, &text).with_context(|| format!("{} is no scenario", path.display()))
    }

    /// Reads the text of a file called `name`.
    ///
    /// # Errors
    /// A text that is no scenario, or asks for what there is not.
    pub fn parse(name: &str, text: &str) -> Result<Self> {
        let mut scenario: Self = serde_saphyr::from_str(text).map_err(|error| anyhow!("{error}"))?;
        scenario.name = name.to_owned();
        if scenario.parts.is_empty() || scenario.parts.len() > PARTS_MAX {
            bail!("a scenario has 1 to {PARTS_MAX} parts");
        }
        for part in &scenario.parts {
            let read = Behaviour::default().with_words(&part.behaviour);
            read.map_err(|error| anyhow!("part `{}`: {error}", part.name))?;
            if part.hang_up.is_some_and(|hang_up| hang_up.share_percent > 100) {
                bail!("part `{}`: share_percent is at most 100", part.name);
            }
        }
        if scenario
            .source
            .as_ref()
            .is_some_and(|source| Sources::parse(source).is_none())
        {
            bail!("`source` is an IPv4 network such as 127.0.0.0/8");
        }
        Ok(scenario)
    }

    /// Reads all files of a folder, in the order of their names.
    ///
    /// # Errors
    /// Those of [`Self::read`].
    pub fn read_all(folder: &Path) -> Result<BTreeMap<String, Self>> {
        let mut scenarios = BTreeMap::new();
        let entries =
            std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "yaml") {
                let scenario = Self::read(&path)?;
                scenarios.insert(scenario.name.clone(), scenario);
            }
        }
        Ok(scenarios)
    }

    /// Streams that are held open.
    pub fn held(&self) -> usize {
        let own = |part: &PartFile| part.connections.unwrap_or(self.connections);
        self.parts.iter().filter(|part| part.hold).map(own).sum()
    }

    /// Connections at once, about.
    pub fn connections_max(&self) -> usize {
        let own: usize = self.parts.iter().filter_map(|part| part.connections).sum();
        own + self.connections
    }

    /// What the load generator does for it. `window` is used instead of the scenario's own; `model` names the model of
    /// each part; `url` has no path.
    ///
    /// # Errors
    /// Words of a behaviour that are none: [`Self::parse`] finds them first.
    pub fn load(
        &self,
        url: &str,
        key: Option<&str>,
        window: Option<Duration>,
        model: impl Fn(usize) -> String,
    ) -> Result<load::Options> {
        let parts: Result<Vec<Part>> = self
            .parts
            .iter()
            .enumerate()
            .map(|(index, part)| part.load(&model(index)))
            .collect();
        Ok(load::Options {
            url: url.to_owned(),
            key: key.map(str::to_owned),
            parts: parts?,
            connections: self.connections,
            keep_alive: self.keep_alive,
            rate: self.rate,
            stages: self
                .stages
                .iter()
                .map(|stage| Stage {
                    from: stage.from,
                    to: stage.to,
                    time: stage.time,
                })
                .collect(),
            arrivals: if self.poisson {
                Arrivals::Poisson
            } else {
                Arrivals::Even
            },
            duration: Some(self.warm_up + window.unwrap_or(self.window)),
            warm_up: self.warm_up,
            ramp: self.ramp,
            timeout: self.timeout,
            tls_resume: self.tls_resume,
            sources: self.source.as_ref().and_then(|source| Sources::parse(source)),
            ..load::Options::default()
        })
    }
}

impl PartFile {
    fn load(&self, model: &str) -> Result<Part> {
        let behaviour = Behaviour::default()
            .with_words(&self.behaviour)
            .map_err(|error| anyhow!("{error}"))?;
        let default_status = if self.bad_key { 401 } else { 200 };
        let expect_status = (!self.any_status).then(|| self.expect_status.unwrap_or(default_status));
        Ok(Part {
            name: self.name.clone(),
            weight: self.weight,
            connections: self.connections,
            hold: self.hold,
            path: Some(self.path.replace("{model}", model)),
            model: model.to_owned(),
            stream: self.stream,
            prompt_bytes: self.prompt_bytes,
            shared_bytes: self.shared_bytes,
            prompts: self.prompts,
            max_tokens: self.max_tokens,
            include_usage: self.include_usage,
            expect_tokens: behaviour
                .tokens_fixed()
                .map(|tokens| u64::from(tokens.min(self.max_tokens.unwrap_or(u32::MAX)))),
            expect_status,
            hang_up: self.hang_up.map(|hang_up| HangUp {
                after_tokens: hang_up.after_tokens,
                share_percent: hang_up.share_percent,
            }),
            slow_reader: self.slow_reader,
            key: self.bad_key.then(|| "sk-bench-wrong".to_owned()),
            tools: self.tools,
            ..Part::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scenarios_of_this_folder_are_read() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
        let scenarios = Scenario::read_all(&folder).unwrap();
        for wanted in [
            "json-1k", "json-1m", "paced", "busy", "light", "flood", "idle", "memory", "mixed",
        ] {
            assert!(scenarios.contains_key(wanted), "{wanted}");
        }
        for scenario in scenarios.values() {
            let options = scenario.load("http://h", Some("k"), None, model_of).unwrap();
            assert_eq!(options.parts.len(), scenario.parts.len());
        }
        assert_eq!(scenarios["memory"].held(), 5000);
        assert_eq!(
            (scenarios["idle"].held(), scenarios["idle"].connections_max()),
            (10_000, 11_001)
        );
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("about: x\nfigure: event\nparts: []", "1 to 8 parts"),
            ("about: x\nfigure: pages\nparts: [{name: a}]", "figure"),
            (
                "about: x\nfigure: event\nparts: [{name: a, behaviour: colour=red}]",
                "colour=red",
            ),
            ("about: x\nfigure: event\nramp: soon\nparts: [{name: a}]", "250ms"),
            (
                "about: x\nfigure: event\nsource: here\nparts: [{name: a}]",
                "network",
            ),
            ("about: x\nfigure: event\nspeed: 9\nparts: [{name: a}]", "speed"),
        ] {
            let error = format!("{:#}", Scenario::parse("x", text).unwrap_err());
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
