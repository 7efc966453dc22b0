//! Requests that are admitted and settled, for the examples that measure what that costs.

use std::{net::IpAddr, path::Path, sync::Arc, time::Duration};

use gateway::{
    config,
    net::words::Words,
    quota::{
        Amounts, Facts, Ids, Policies, Quota,
        leases::Directory,
        reservation::{Ask, admit},
        state,
    },
};

/// Policies that bind every request, and keys that ask. A tenth of the policies count each key apart, at least one; the
/// others are the keys' common ones.
pub struct Bound {
    pub quota: Arc<Quota>,
    policies: Arc<Policies>,
    ids: Vec<Ids>,
}

impl Bound {
    /// Every key has its levels already, as in a gateway that has run for a while. `leases`: beside the levels of this
    /// host alone.
    ///
    /// # Errors
    /// The configuration's.
    pub fn new(policies: usize, keys: usize, leases: Option<Arc<Directory>>) -> anyhow::Result<Bound> {
        let own = policies.div_ceil(10);
        let text = configuration(policies, own);
        let config = config::parse(&text, "cost", Path::new("/"), &|_| None)?;
        let places = (own * keys * 3 / 2).max(1024);
        let (mut levels, _) = state::restore(Words::in_memory(state::words_for(places)), places, None);
        if let Some(directory) = leases {
            levels.share(directory);
        }
        let bound = Bound {
            quota: Arc::new(Quota {
                levels,
                ..Quota::default()
            }),
            policies: Arc::new(Policies::new(&config)),
            ids: (0..keys).map(|n| Ids::new(&format!("key-{n}"), "", "")).collect(),
        };
        bound.ids.iter().for_each(|ids| bound.one(*ids));
        Ok(bound)
    }

    /// CPU nanoseconds to admit and to settle a request, the mean of so many.
    ///
    /// # Errors
    /// The kernel does not tell the thread's time.
    pub fn measure(&self, rounds: usize) -> anyhow::Result<f64> {
        let before = cpu()?;
        let mut at = 0;
        for _ in 0..rounds {
            // A stride that visits all keys in an order that no cache foresees.
            at = (at + 7_368_787) % self.ids.len();
            self.one(self.ids[at]);
        }
        Ok((cpu()? - before).as_nanos() as f64 / rounds as f64)
    }

    fn one(&self, ids: Ids) {
        let facts = Facts {
            ids,
            user: "",
            model: "fast",
            path: "/v1/chat/completions",
            client: IpAddr::from([192, 0, 2, 1]),
            header: &|_| None,
            own: &[],
        };
        let ask = Ask {
            input: 100,
            output: 200,
            output_is_explicit: true,
            stream: true,
            rates: None,
        };
        let Ok(admission) = admit(&self.quota, &self.policies, &facts, ask) else {
            panic!("refused: what is measured is an admission");
        };
        admission.reservation.settle(Amounts {
            input: 90,
            output: 120,
            nano_usd: 0,
        });
    }
}

/// So many policies of all kinds and windows, the first `own` of which count each key apart. No amount is ever used up.
fn configuration(policies: usize, own: usize) -> String {
    let kinds = [
        "tokens: 100000000000",
        "requests: 100000000000",
        "output_tokens: 100000000000",
    ];
    let windows = ["bucket", "sliding", "calendar"];
    let mut text = String::from("listeners: [{ address: 127.0.0.1:0 }]\nlimits:\n");
    for n in 0..policies {
        let per = if n < own { "key" } else { "shared" };
        let (kind, window) = (kinds[n % 3], windows[n / 3 % 3]);
        text.push_str(&format!(
            "  - {{ name: p{n}, per: {per}, {kind}, every: 1mo, window: {window} }}\n"
        ));
    }
    text
}

/// CPU time of this thread so far.
///
/// # Errors
/// The kernel does not tell it.
pub fn cpu() -> anyhow::Result<Duration> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat")?;
    let ns = text.split_whitespace().next().unwrap_or("0").parse()?;
    Ok(Duration::from_nanos(ns))
}
