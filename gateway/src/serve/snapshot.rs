//! The configuration as the hot path wants it: looked up by hash, names resolved, bytes ready to send.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use sha2::{Digest, Sha256};

use crate::{
    config::{
        self,
        schema::{self, Balance, Config, OnDisconnect},
    },
    dialect::{Tier, estimate::Calibrations},
    fleet::{Endpoints, Provider, Target},
    ledger::prices::{self, Book},
    quota::{Table, policy::Bound, refusals::Rule},
};

/// Output reserved for a request that permits no smaller one, tokens, where the model says nothing else.
const OUTPUT_TOKENS_DEFAULT: u32 = 4096;

/// One state of the configuration. Running requests keep the one they started with.
pub struct Snapshot {
    /// Counts reloads, from 1.
    pub generation: u64,
    keys: HashMap<[u8; 32], Arc<Key>>,
    models: HashMap<Box<str>, Arc<Model>>,
    /// Bounds and times of the client's side.
    pub http: Http,
    /// When the kernel shall drop a client.
    pub refusals: Rule,
    /// Requests are served although they cannot be recorded.
    pub serves_unrecorded: bool,
}

/// Bounds and times of the client's side, as plain numbers.
#[derive(Debug, Clone, Copy)]
pub struct Http {
    pub body_bytes_max: usize,
    pub bodies_bytes_max: usize,
    pub connections_max: usize,
    pub head_timeout: Duration,
    pub body_timeout: Duration,
    pub idle_timeout: Duration,
    pub write_timeout: Duration,
}

/// A virtual key.
pub struct Key {
    pub name: Arc<str>,
    /// Empty for none.
    pub team: Arc<str>,
    models: Option<Vec<String>>,
    pub limits: Vec<Bound>,
}

/// A virtual model.
pub struct Model {
    pub name: Arc<str>,
    pub targets: Vec<Target>,
    pub balance: Balance,
    pub timeouts: Timeouts,
    pub output_tokens_default: u64,
}

/// A model's times.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    pub connect: Duration,
    pub first_token: Duration,
    pub idle: Duration,
    pub total: Duration,
}

/// What lives longer than a snapshot: levels of limits, endpoints with their connections.
#[derive(Default)]
pub struct Registry {
    pub limits: Table,
    pub endpoints: Endpoints,
    pub calibrations: Calibrations,
    generation: u64,
}

impl Snapshot {
    /// Compiles a valid configuration. Errors are what only shows now: a CA file that cannot be read, say.
    pub fn build(config: &Config, registry: &mut Registry) -> anyhow::Result<Snapshot> {
        let mut providers = HashMap::new();
        for (name, provider) in &config.providers {
            providers.insert(
                name.as_str(),
                Arc::new(registry.endpoints.provider(name, provider)?),
            );
        }
        let mut models = HashMap::new();
        let book = Book::new(config);
        for model in &config.models {
            let mut compiled = compile_model(model, &config.providers, &providers, &book)?;
            for target in &mut compiled.targets {
                target.calibration = registry.calibrations.of(&target.provider.name, &target.model);
            }
            models.insert(model.name.clone().into_boxed_str(), Arc::new(compiled));
        }
        let mut keys = HashMap::new();
        for key in &config.keys {
            let hash = config::parse_sha256(&key.sha256)
                .with_context(|| format!("key {}: sha256 is not 64 hex digits", key.name))?;
            let compiled = Key {
                name: key.name.as_str().into(),
                team: key.team.as_deref().unwrap_or_default().into(),
                models: key.models.clone(),
                limits: registry.limits.bounds(config, key),
            };
            keys.insert(hash, Arc::new(compiled));
        }
        registry.generation += 1;
        Ok(Snapshot {
            generation: registry.generation,
            keys,
            models,
            http: compile_http(&config.http),
            refusals: Rule {
                after: config.kernel.drop.after_refusals,
                within: config.kernel.drop.within.0,
            },
            serves_unrecorded: config.ledger.on_error == schema::OnError::Serve,
        })
    }

    /// Who has this key. The look-up is by SHA-256: an attacker who times it learns about hashes, of which he
    /// cannot choose a prefix, and the comparison at its end takes constant time.
    pub fn key(&self, secret: &[u8]) -> Option<&Arc<Key>> {
        use subtle::ConstantTimeEq;
        let hash: [u8; 32] = Sha256::digest(secret).into();
        let (known, key) = self.keys.get_key_value(&hash)?;
        bool::from(known.ct_eq(&hash)).then_some(key)
    }

    /// The virtual model of this name.
    pub fn model(&self, name: &str) -> Option<&Arc<Model>> {
        self.models.get(name)
    }

    /// The models that a key may use, by name.
    pub fn models_of(&self, key: &Key) -> Vec<&str> {
        let mut names: Vec<&str> = self
            .models
            .values()
            .map(|model| model.name.as_ref())
            .filter(|name| key.may_use(name))
            .collect();
        names.sort_unstable();
        names
    }
}

impl Model {
    /// Whether an answer of some of its targets is read on when its client hangs up.
    pub fn drains(&self) -> bool {
        self.targets
            .iter()
            .any(|target| target.provider.on_disconnect == OnDisconnect::Drain)
    }

    /// Input tokens of a body, by what the target has taught that goes first.
    pub fn input_tokens(&self, body_bytes: u64) -> u64 {
        let first = self
            .targets
            .iter()
            .filter(|target| target.weight > 0)
            .min_by_key(|target| target.priority);
        first.map_or(1, |target| target.calibration.input_tokens(body_bytes))
    }

    /// The most that a request can cost, nano-dollars, whichever of the model's targets serves it: for reservations.
    /// Targets whose price nobody knows are left out; `None` where no price is known.
    pub fn cost_max(&self, input: u64, output: u64, tier: Tier, unix_ms: u64) -> Option<u64> {
        let prices = self.targets.iter().filter_map(|target| target.tariff.at(unix_ms));
        prices.map(|price| price.cost_max(input, output, tier)).max()
    }
}

impl Key {
    /// Whether the key may use a model.
    pub fn may_use(&self, model: &str) -> bool {
        self.models
            .as_ref()
            .is_none_or(|models| models.iter().any(|allowed| allowed == model))
    }
}

fn compile_model(
    model: &schema::Model,
    schemas: &BTreeMap<String, schema::Provider>,
    providers: &HashMap<&str, Arc<Provider>>,
    book: &Book,
) -> anyhow::Result<Model> {
    let mut targets = Vec::with_capacity(model.targets.len());
    for target in &model.targets {
        let provider = providers
            .get(target.provider.as_str())
            .with_context(|| format!("model {}: unknown provider {}", model.name, target.provider))?;
        let name = target.model.as_deref().unwrap_or(&model.name);
        let vendor = schemas
            .get(&target.provider)
            .and_then(|schema| prices::vendor(&target.provider, schema));
        targets.push(Target {
            provider: provider.clone(),
            model: name.into(),
            model_json: serde_json::to_vec(name)?,
            weight: target.weight,
            priority: target.priority,
            tariff: book.tariff(&target.provider, vendor.as_deref(), name),
            calibration: Arc::default(),
        });
    }
    Ok(Model {
        name: model.name.as_str().into(),
        targets,
        balance: model.balance,
        timeouts: Timeouts {
            connect: model.timeouts.connect.0,
            first_token: model.timeouts.first_token.0,
            idle: model.timeouts.idle.0,
            total: model.timeouts.total.0,
        },
        output_tokens_default: model.max_output_tokens.unwrap_or(OUTPUT_TOKENS_DEFAULT).into(),
    })
}

fn compile_http(http: &schema::Http) -> Http {
    Http {
        body_bytes_max: http.body_max.0 as usize,
        bodies_bytes_max: http.bodies_max.0 as usize,
        connections_max: http.connections_max,
        head_timeout: http.head_timeout.0,
        body_timeout: http.body_timeout.0,
        idle_timeout: http.idle_timeout.0,
        write_timeout: http.write_timeout.0,
    }
}
