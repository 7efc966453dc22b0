//! The control thread's part in limits: their state file, and who is told of budgets' alerts.

use std::{
    fs,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread,
    time::Duration,
};

use anyhow::Context;
use serde_json::{Value, json};

use super::cluster::Cluster;
use crate::{
    bounds::ALERTS_WAITING_MAX,
    config::{Config, schema, units::Dollars},
    net::words::Words,
    quota::{Levels, Quota, budget::Alert, levels::Shelf, state},
};

/// The state file below the ledger's directory.
const STATE_FILE: &str = "limits.state";

/// Pauses between tries to deliver an alert to the webhook.
const RETRY_PAUSES: [Duration; 4] = [
    Duration::from_secs(1),
    Duration::from_secs(3),
    Duration::from_secs(9),
    Duration::from_secs(15),
];

/// Time for one try.
const TRY_TIME: Duration = Duration::from_secs(5);

/// Opens the levels of limits below the ledger's directory, with what an earlier run left.
///
/// # Errors
/// The file system's.
pub fn open(config: &Config, cluster: Option<&Cluster>) -> anyhow::Result<Quota> {
    let path = config.ledger.path.join(STATE_FILE);
    let at = || format!("cannot keep the state of limits in {}", path.display());
    let mut levels = open_levels(&path, config.limit_state.levels).with_context(at)?;
    if let Some(cluster) = cluster {
        levels.share(cluster.directory().clone());
    }
    Ok(Quota {
        levels,
        ..Quota::default()
    })
}

fn open_levels(path: &Path, places: usize) -> std::io::Result<Levels> {
    let old = match fs::read(path) {
        Ok(bytes) => Some(to_words(&bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    // The old file stays until the new one has everything: a process killed here begins again.
    let fresh = path.with_extension("state.new");
    let words = Words::create(&fresh, state::words_for(places))?;
    let (levels, restored) = state::restore(words, places, old.as_deref());
    if restored.foreign {
        let aside = path.with_extension("state.bad");
        fs::rename(path, &aside)?;
        tracing::error!(
            file = %aside.display(),
            "the state of limits cannot be read and was put aside: limits and budgets begin anew"
        );
    }
    fs::rename(&fresh, path)?;
    if restored.lost > 0 {
        let lost = restored.lost;
        tracing::warn!(
            lost,
            "levels of limits were lost: there is no place for them, or they made no sense"
        );
    }
    if restored.debts_forgiven {
        tracing::warn!(
            "the state of limits is of a gateway that did not note debts: what was used beyond amounts in the periods that \
             run is not carried into the next"
        );
    }
    if old.is_some() {
        let (kept, given_back) = (restored.kept, restored.given_back);
        tracing::info!(kept, given_back, "limits go on where they were");
    }
    Ok(levels)
}

fn to_words(bytes: &[u8]) -> Vec<u64> {
    let words = bytes.chunks_exact(size_of::<u64>());
    words
        .map(|word| word.try_into().map_or(0, u64::from_ne_bytes))
        .collect()
}

/// Tells of alerts: in the log, in metrics, and to the webhook, by a thread of its own that a slow receiver may hold up.
pub struct Alerts {
    shared: Arc<Shared>,
    queue: SyncSender<Alert>,
}

#[derive(Default)]
struct Shared {
    /// Whom to tell; a reload changes it.
    receiver: Mutex<schema::Alerts>,
    raised: AtomicU64,
    delivered: AtomicU64,
    failed: AtomicU64,
}

impl Alerts {
    /// Starts the thread.
    ///
    /// # Errors
    /// There can be no more threads.
    pub fn start(receiver: &schema::Alerts) -> std::io::Result<Alerts> {
        let (queue, alerts) = sync_channel(ALERTS_WAITING_MAX);
        let shared = Arc::new(Shared {
            receiver: Mutex::new(receiver.clone()),
            ..Shared::default()
        });
        let own = shared.clone();
        thread::Builder::new()
            .name("alerts".into())
            .spawn(move || deliver_all(&own, &alerts))?;
        Ok(Alerts { shared, queue })
    }

    /// Follows a new configuration.
    pub fn follow(&self, receiver: &schema::Alerts) {
        *self.shared.lock() = receiver.clone();
    }

    /// Writes the limits' clock down and tells of the alerts that are due. To be called often.
    pub fn tick(&self, quota: &Quota) {
        quota.levels.beat();
        while let Some(alert) = quota.budgets.next_alert() {
            self.tell(alert);
        }
    }

    fn tell(&self, alert: Alert) {
        self.shared.raised.fetch_add(1, Ordering::Relaxed);
        let (used, amount) = (Dollars(alert.used), Dollars(alert.amount));
        tracing::warn!(
            kind = alert.budget.subject.kind(),
            name = alert.budget.subject.name(),
            percent = alert.percent,
            %used,
            %amount,
            "a budget has reached a share of its amount"
        );
        if self.shared.lock().webhook.is_none() {
            return;
        }
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) = self.queue.try_send(alert) {
            self.shared.failed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts for metrics: raised, delivered to the webhook, given up.
    pub fn counts(&self) -> [(&'static str, u64); 3] {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        [
            ("raised", of(&self.shared.raised)),
            ("delivered", of(&self.shared.delivered)),
            ("failed", of(&self.shared.failed)),
        ]
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, schema::Alerts> {
        self.receiver.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread: one alert after the other, in their order.
fn deliver_all(shared: &Shared, alerts: &Receiver<Alert>) {
    for alert in alerts {
        let body = body_of(&alert);
        let mut pauses = RETRY_PAUSES.iter();
        loop {
            let receiver = shared.lock().clone();
            let Some(url) = &receiver.webhook else { break };
            let Err(error) = post(url, receiver.token.as_ref().map(|token| token.expose()), &body) else {
                shared.delivered.fetch_add(1, Ordering::Relaxed);
                break;
            };
            let Some(pause) = pauses.next() else {
                tracing::error!(error, "an alert could not be delivered to the webhook");
                shared.failed.fetch_add(1, Ordering::Relaxed);
                break;
            };
            thread::sleep(*pause);
        }
    }
}

/// What the webhook gets. `id` is the same for all tries of one alert.
fn body_of(alert: &Alert) -> Value {
    let subject = &alert.budget.subject;
    json!({
        "id": format!("{}-{}-{}-{}", subject.kind(), subject.name(), alert.percent, alert.unix_ms),
        "event": "budget_alert",
        "subject": { "kind": subject.kind(), "name": subject.name() },
        "percent": alert.percent,
        "used_usd": Dollars(alert.used).to_string(),
        "budget_usd": Dollars(alert.amount).to_string(),
        "unix_ms": alert.unix_ms,
    })
}

/// Sends one alert; any 2xx is a receipt. Errors never repeat the URL, which may hold a secret.
fn post(url: &str, token: Option<&str>, body: &Value) -> Result<(), String> {
    let agent = ureq::Agent::config_builder()
        .timeout_global(Some(TRY_TIME))
        .max_redirects(0)
        .tls_config(tls())
        .build()
        .new_agent();
    let mut request = agent.post(url).header("content-type", "application/json");
    if let Some(token) = token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    match request.send(body.to_string().as_bytes()) {
        Ok(answer) if answer.status().is_success() => Ok(()),
        Ok(answer) => Err(format!("it answered {}", answer.status().as_u16())),
        Err(ureq::Error::StatusCode(status)) => Err(format!("it answered {status}")),
        Err(ureq::Error::Timeout(_)) => Err("it did not answer in time".into()),
        Err(_) => Err("it cannot be reached".into()),
    }
}

/// The data plane's cryptography and the system's roots.
fn tls() -> ureq::tls::TlsConfig {
    use ureq::tls::{Certificate, RootCerts, TlsConfig};
    let native = rustls_native_certs::load_native_certs().certs;
    let roots: Vec<Certificate<'static>> = native
        .iter()
        .map(|certificate| Certificate::from_der(certificate).to_owned())
        .collect();
    TlsConfig::builder()
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .root_certs(RootCerts::from(roots))
        .build()
}

/// The limits' part of the state, for `gateway status` and metrics.
pub fn status(quota: &Quota) -> Value {
    let shelf = |shelf: Shelf| {
        let table = quota.levels.shelf(shelf);
        json!({ "used": table.used(), "places": table.capacity() })
    };
    json!({
        "own": shelf(Shelf::Own),
        "guests": shelf(Shelf::Guests),
        "parallel": shelf(Shelf::Parallel),
        "overflowed": quota.levels.overflowed(),
        "budgets": quota.budgets.all().len(),
    })
}
