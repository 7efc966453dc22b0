//! What sharing limits with other hosts costs: `cargo run --release -p gateway --example lease_cost`.
//!
//! Without arguments: CPU time to admit and to settle a request, with levels of this host alone and with leases beside them.
//! With `REDIS_URL SUBJECTS SECONDS`: CPU time of the control thread, rounds and calls of a host on a real server while
//! so many subjects are asked for ten times a second each.

mod support;

use std::{
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
    net::clock,
    quota::{lease::Kind, leases::Directory},
};
use ipnet::IpNet;
use support::{Bound, cpu};

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
    let leases = leased.then(|| {
        let directory = Arc::new(Directory::default());
        // The whole amount at once and for ever: what remains is the path of an admission.
        directory.set_opening(100, u64::MAX / 2);
        directory
    });
    Bound::new(policies, keys, leases)?.measure(rounds)
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
            let (before, told) = (cpu()?, reports(&task));
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            let spent = cpu()? - before;
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
