//! Providers, endpoints and targets as a snapshot of the configuration has them.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::Context;
use arc_swap::ArcSwap;
use rustls::ClientConfig;

use crate::{
    config::{self, schema, units::Secret},
    dialect::{estimate::Calibration, tokens::Vocabulary},
    ledger::prices::Tariff,
    net::tls,
};

/// A party that serves models: an API with one credential and one or more endpoints.
pub struct Provider {
    /// Its name in the configuration.
    pub name: Arc<str>,
    /// `Authorization` of requests to it; `None`: none is sent.
    pub authorization: Option<Secret>,
    /// Where it is reached; never empty.
    pub endpoints: Vec<Arc<Endpoint>>,
    /// What becomes of a running answer when its client hangs up.
    pub on_disconnect: schema::OnDisconnect,
}

/// One base URL of a provider.
pub struct Endpoint {
    /// Unlike that of every other endpoint of the process' life; what pools are kept by.
    pub id: u64,
    /// Where it is, taken apart.
    pub url: config::Endpoint,
    /// Its base URL, as the ledger names it.
    pub name: Arc<str>,
    /// `Host` of requests to it.
    pub authority: String,
    /// Trust for `https`.
    pub tls: Option<Arc<ClientConfig>>,
    /// What the host's name stands for now; empty until it is resolved.
    pub addresses: ArcSwap<Vec<SocketAddr>>,
}

/// One way to serve a virtual model.
pub struct Target {
    /// Who serves it.
    pub provider: Arc<Provider>,
    /// The upstream's own name of the model.
    pub model: Arc<str>,
    /// The same as a JSON string, quotes included.
    pub model_json: Vec<u8>,
    /// Share among targets of the same priority.
    pub weight: u32,
    /// Lower goes first.
    pub priority: u32,
    /// What its tokens cost, over time.
    pub tariff: Tariff,
    /// How many bytes make a token of its model.
    pub calibration: Arc<Calibration>,
    /// What they are counted with where it does not tell.
    pub vocabulary: Option<Vocabulary>,
}

/// All endpoints of the process' life that are in use, so that a reload finds those that stay and keeps their
/// connections.
#[derive(Default)]
pub struct Endpoints {
    known: HashMap<String, Arc<Endpoint>>,
}

impl Endpoints {
    /// Makes a provider of the configuration, with endpoints that are kept where they were known.
    pub fn provider(&mut self, name: &str, schema: &schema::Provider) -> anyhow::Result<Provider> {
        let defaults = [default_endpoint(schema.kind).to_string()];
        let urls = if schema.endpoints.is_empty() {
            &defaults[..]
        } else {
            &schema.endpoints[..]
        };
        let mut tls = None;
        let mut endpoints = Vec::with_capacity(urls.len());
        for text in urls {
            let url = config::parse_endpoint(text).map_err(anyhow::Error::msg)?;
            if url.tls && tls.is_none() {
                let config =
                    tls::client_config(schema.ca.as_deref()).with_context(|| format!("provider {name}"))?;
                tls = Some(config);
            }
            endpoints.push(self.endpoint(text, url, tls.clone(), schema));
        }
        let authorization = schema
            .key
            .as_ref()
            .map(|key| Secret::new(format!("Bearer {}", key.expose())));
        Ok(Provider {
            name: name.into(),
            authorization,
            endpoints,
            on_disconnect: schema.on_disconnect,
        })
    }

    fn endpoint(
        &mut self,
        text: &str,
        url: config::Endpoint,
        tls: Option<Arc<ClientConfig>>,
        schema: &schema::Provider,
    ) -> Arc<Endpoint> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        // Trust is part of the identity: connections made under other authorities are not reused.
        let identity = format!("{text} {:?}", schema.ca);
        let tls = tls.filter(|_| url.tls);
        if let Some(known) = self.known.get(&identity) {
            return known.clone();
        }
        let literal: Option<IpAddr> = url.host.trim_matches(['[', ']']).parse().ok();
        let addresses = literal
            .map(|ip| SocketAddr::new(ip, url.port))
            .into_iter()
            .collect();
        let authority = url.authority();
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let endpoint = Endpoint {
            id,
            name: text.trim_end_matches('/').into(),
            url,
            authority,
            tls,
            addresses: ArcSwap::from_pointee(addresses),
        };
        let endpoint = Arc::new(endpoint);
        self.known.insert(identity, endpoint.clone());
        endpoint
    }

    /// Forgets endpoints that no snapshot uses any more.
    pub fn sweep(&mut self) {
        self.known.retain(|_, endpoint| Arc::strong_count(endpoint) > 1);
    }

    /// Endpoints whose host is a name.
    pub fn named(&self) -> Vec<Arc<Endpoint>> {
        let is_name = |host: &str| host.trim_matches(['[', ']']).parse::<IpAddr>().is_err();
        self.known
            .values()
            .filter(|endpoint| is_name(&endpoint.url.host))
            .cloned()
            .collect()
    }
}

/// Where a provider is reached that names no endpoint.
fn default_endpoint(kind: schema::ProviderKind) -> &'static str {
    match kind {
        schema::ProviderKind::Openai => "https://api.openai.com",
    }
}
