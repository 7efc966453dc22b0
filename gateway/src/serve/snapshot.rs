//! The configuration as the hot path wants it: looked up by hash, names resolved, bytes ready to send.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use super::keys::{self, ByHash, Key, Life, NEVER_MS};
use crate::{
    config::{
        self,
        schema::{self, Balance, Config, OnDisconnect},
    },
    dialect::{Tier, estimate::Calibrations, tokens::Vocabulary},
    fleet::{Endpoints, Provider, Target},
    ledger::prices::{self, Book},
    quota::{
        Ids, Policies, Quota, Rates,
        refusals::{Prefixes, Rule},
    },
};
use anyhow::Context;

/// Output reserved for a request that permits no smaller one, tokens, where the model says nothing else.
const OUTPUT_TOKENS_DEFAULT: u32 = 4096;

/// One state of the configuration. Running requests keep the one they started with.
pub struct Snapshot {
    /// Counts reloads, from 1.
    pub generation: u64,
    keys: ByHash,
    models: HashMap<Box<str>, Arc<Model>>,
    /// Limit policies, in their order.
    pub policies: Arc<Policies>,
    /// Levels and budgets; the same for all snapshots.
    pub quota: Arc<Quota>,
    organizations: HashMap<Box<str>, Arc<str>>,
    /// The header that tells a request's user.
    pub user_header: Option<Box<str>>,
    /// Bounds and times of the client's side.
    pub http: Http,
    /// How long events of streams may be gathered.
    pub gather: Duration,
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

/// A virtual model.
pub struct Model {
    pub name: Arc<str>,
    pub targets: Vec<Target>,
    pub balance: Balance,
    pub timeouts: Timeouts,
    pub output_tokens_default: u64,
    /// Bytes of the longest names that a target gives to a record.
    pub names_bytes_max: usize,
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
    pub quota: Arc<Quota>,
    pub endpoints: Endpoints,
    /// The file's keys by name: what a key's versions share outlives the snapshot.
    lives: HashMap<String, Arc<Life>>,
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
        let mut keys = ByHash::default();
        let mut lives = HashMap::new();
        let organizations = organizations(config);
        for key in &config.keys {
            let hash = config::parse_sha256(&key.sha256)
                .with_context(|| format!("key {}: sha256 is not 64 hex digits", key.name))?;
            let life = registry.lives.get(&key.name).cloned().unwrap_or_default();
            lives.insert(key.name.clone(), life.clone());
            let team = key.team.as_deref().unwrap_or_default();
            let organization = organizations.get(team).copied().unwrap_or_default();
            let compiled = Key {
                name: key.name.as_str().into(),
                team: team.into(),
                organization: organization.into(),
                models: key.models.as_deref().map(Arc::from),
                networks: Arc::new([]),
                expires_unix_ms: NEVER_MS,
                disabled: false,
                ids: Ids::new(&key.name, team, organization),
                own: None,
                life,
            };
            keys.insert(hash, Arc::new(compiled));
        }
        registry.lives = lives;
        registry.quota.budgets.set_file(config);
        registry.generation += 1;
        Ok(Snapshot {
            generation: registry.generation,
            keys,
            models,
            policies: Arc::new(Policies::new(config)),
            quota: registry.quota.clone(),
            organizations: organizations
                .into_iter()
                .map(|(team, organization)| (team.into(), organization.into()))
                .collect(),
            user_header: config.limit_state.user_header.as_deref().map(Into::into),
            http: compile_http(&config.http),
            gather: config.relay.gather.0,
            refusals: Rule {
                after: config.kernel.drop.after_refusals,
                within: config.kernel.drop.within.0,
                prefixes: Prefixes {
                    v4: config.kernel.drop.prefix_v4,
                    v6: config.kernel.drop.prefix_v6,
                },
            },
            serves_unrecorded: config.ledger.on_error == schema::OnError::Serve,
        })
    }

    /// Has the vocabularies loaded that its models' tokens are counted with.
    pub fn load_vocabularies(&self) {
        let targets = self.models.values().flat_map(|model| &model.targets);
        targets
            .filter_map(|target| target.vocabulary)
            .for_each(Vocabulary::load);
    }

    /// The organization of a team; `None` where it has none.
    pub fn organization(&self, team: &str) -> Option<&Arc<str>> {
        self.organizations.get(team)
    }

    /// Who has the secret with this SHA-256, of the configuration file's keys.
    pub fn key(&self, hash: &[u8; 32]) -> Option<&Arc<Key>> {
        keys::find(&self.keys, hash)
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
    /// Whether tokens of some of its targets are counted with a vocabulary.
    pub fn has_vocabulary(&self) -> bool {
        self.targets.iter().any(|target| target.vocabulary.is_some())
    }

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

    /// The dearest rates of all targets for so much input, for reservations, in the tier that is asked for or the default
    /// one, as a provider may serve either; `None` where a target's price is not known: what goes there would escape
    /// every budget.
    pub fn rates(&self, tier: Tier, input: u64, unix_ms: u64) -> Option<Rates> {
        let mut rates = Rates::default();
        for target in &self.targets {
            let price = target.tariff.at(unix_ms)?;
            for tier in [Tier::Default, tier] {
                let of_target = price.rates(tier, input);
                let dearest = of_target.input.max(of_target.cached);
                rates.input = rates
                    .input
                    .max(dearest)
                    .max(of_target.write_5m)
                    .max(of_target.write_1h);
                rates.output = rates.output.max(of_target.output);
            }
        }
        Some(rates)
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
            vocabulary: Vocabulary::of(target.tokenizer, name),
        });
    }
    let names_bytes = |target: &Target| {
        let endpoints = target.provider.endpoints.iter();
        let endpoint = endpoints.map(|endpoint| endpoint.name.len()).max();
        target.provider.name.len() + target.model.len() + endpoint.unwrap_or_default()
    };
    Ok(Model {
        name: model.name.as_str().into(),
        names_bytes_max: targets.iter().map(names_bytes).max().unwrap_or_default(),
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

/// Teams with their organizations.
fn organizations(config: &Config) -> HashMap<&str, &str> {
    let teams = config.teams.iter();
    teams
        .filter_map(|team| Some((team.name.as_str(), team.organization.as_deref()?)))
        .collect()
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
