//! What sharing limits with other hosts costs: `cargo run --release -p gateway --example lease_cost`.
//!
//! Without arguments: CPU time to admit and to settle a request, with levels of this host alone and with leases beside them.
//! With `REDIS_URL SUBJECTS SECONDS`: CPU time of the control thread, rounds and calls of a host on a real server while
//! so many subjects are asked for ten times a second each.

use std::{
    net::IpAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use gateway::{
    config,
    control::cluster::{Cluster, Node},
    net::{clock, words::Words},
    quota::{
        Amounts, Facts, Ids, Policies, Quota,
        lease::Kind,
        leases::Directory,
        reservation::{Ask, admit},
        state,
    },
};
use ipnet::IpNet;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments[..] {
        [url, subjects, seconds] => rounds(url, subjects.parse()?, seconds.parse()?),
        _ => admissions(),
    }
}

/// Admit and settle, by the number of policies and keys.
fn admissions() -> anyhow::Result<()> {
    println!("policies      keys   ns alone   ns with leases");
    for policies in [1, 10] {
        for keys in [10, 10_000] {
            let rounds = 2_000_000 / policies.max(4);
            let alone = admission(policies, keys, rounds, false)?;
            let leased = admission(policies, keys, rounds, true)?;
            println!("{policies:>8} {keys:>9} {alone:>10.0} {leased:>16.0}");
        }
    }
    Ok(())
}

fn admission(policies: usize, keys: usize, rounds: usize, leased: bool) -> anyhow::Result<f64> {
    let kinds = [
        "tokens: 100000000000",
        "requests: 100000000000",
        "output_tokens: 100000000000",
    ];
    let windows = ["bucket", "sliding", "calendar"];
    let mut text = String::from("listeners: [{ address: 127.0.0.1:0 }]\nlimits:\n");
    // A tenth of the policies count each key apart, at least one, as in admit_cost.
    let own = policies.div_ceil(10);
    for n in 0..policies {
        let per = if n < own { "key" } else { "shared" };
        let (kind, window) = (kinds[n % 3], windows[n / 3 % 3]);
        text.push_str(&format!(
            "  - {{ name: p{n}, per: {per}, {kind}, every: 1mo, window: {window} }}\n"
        ));
    }
    let config = config::parse(&text, "lease_cost", Path::new("/"), &|_| None)?;
    let policies = Arc::new(Policies::new(&config));
    let places = (own * keys * 3 / 2).max(1024);
    let (mut levels, _) = state::restore(Words::in_memory(state::words_for(places)), places, None);
    if leased {
        let directory = Arc::new(Directory::default());
        // The whole amount at once and for ever: what remains is the path of an admission.
        directory.set_opening(100, u64::MAX / 2);
        levels.share(directory);
    }
    let quota = Arc::new(Quota {
        levels,
        ..Quota::default()
    });
    let ids: Vec<Ids> = (0..keys).map(|n| Ids::new(&format!("key-{n}"), "", "")).collect();
    ids.iter().for_each(|ids| one(&quota, &policies, *ids));
    let before = cpu("thread-self")?;
    let mut at = 0;
    for _ in 0..rounds {
        at = (at + 7_368_787) % keys;
        one(&quota, &policies, ids[at]);
    }
    Ok((cpu("thread-self")? - before).as_nanos() as f64 / rounds as f64)
}

fn one(quota: &Arc<Quota>, policies: &Arc<Policies>, ids: Ids) {
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
    let Ok(admission) = admit(quota, policies, &facts, ask) else {
        panic!("refused");
    };
    admission.reservation.settle(Amounts {
        input: 90,
        output: 120,
        nano_usd: 0,
    });
}

/// A host that nobody tells of blocks.
struct Alone;

impl Node for Alone {
    fn block_from_peer(&self, _: IpNet, _: Duration) {}
    fn unblock_from_peer(&self, _: IpNet) {}
}

/// The control task on a thread of its own, with subjects in use.
fn rounds(url: &str, subjects: u64, seconds: u64) -> anyhow::Result<()> {
    gateway::net::tls::init();
    let text = format!(
        "listeners: [{{ address: 127.0.0.1:0 }}]\nproviders: {{ sim: {{ kind: openai }} }}\n\
         models: [{{ name: m, targets: [{{ provider: sim }}] }}]\nkeys: []\nstore: {{ redis: \"{url}\" }}\n"
    );
    let config = config::parse(&text, "lease_cost", Path::new("/"), &|_| None)?;
    let store = config.store.context("no store")?;
    let cluster = Cluster::new(&store, Arc::new(Directory::default()))?;
    let (task, ended) = (cluster.clone(), Arc::new(AtomicBool::new(false)));
    let end = ended.clone();
    let control = thread::spawn(move || -> anyhow::Result<(Duration, u64)> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async move {
            let _tasks = task.start(Arc::new(Alone), None);
            // Until all levels are known to the store.
            tokio::time::sleep(Duration::from_secs(3)).await;
            let reports = |cluster: &Cluster| cluster.status().json()["reports"].as_u64().unwrap_or(0);
            let (before, told) = (cpu("thread-self")?, reports(&task));
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            let spent = cpu("thread-self")? - before;
            let told = reports(&task) - told;
            end.store(true, Relaxed);
            Ok((spent, told))
        })
    });
    let window = Kind::Bucket {
        window_ns: 60_000_000_000,
    };
    while !ended.load(Relaxed) {
        let began = Instant::now();
        for id in 0..subjects {
            let now_ns = clock::monotonic_ns();
            if let Ok(level) = cluster.directory().level(id, window, 1_000_000, now_ns)
                && let Ok(standing) = level.reserve(10, now_ns)
            {
                level.settle(10, 8, standing.until_ns, now_ns);
            }
        }
        thread::sleep(Duration::from_millis(100).saturating_sub(began.elapsed()));
    }
    let (spent, told) = control
        .join()
        .map_err(|_| anyhow::anyhow!("the control thread panicked"))??;
    let rounds = seconds as f64 / store.round.0.as_secs_f64();
    println!(
        "{subjects} subjects: {:.2} % of a core, {:.0} us a round, {:.0} levels reported a second",
        spent.as_secs_f64() / seconds as f64 * 100.0,
        spent.as_micros() as f64 / rounds,
        told as f64 / seconds as f64
    );
    Ok(())
}

/// CPU time of a thread so far.
fn cpu(thread: &str) -> anyhow::Result<Duration> {
    let text = std::fs::read_to_string(format!("/proc/{thread}/schedstat"))?;
    let ns = text.split_whitespace().next().unwrap_or("0").parse()?;
    Ok(Duration::from_nanos(ns))
}
