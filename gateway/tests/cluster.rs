//! Several hosts on one real Redis or Valkey: what they lease, what happens when the store or a host is gone. The hosts
//! here are the control task and the levels alone; `cluster_hosts.rs` runs whole gateways.

#[path = "support/hosts.rs"]
mod hosts;
mod support;

use std::{
    cell::Cell,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

use gateway::{
    control::cluster::{
        Status,
        level::{Level, Report, Times},
        link::Address,
    },
    net::clock,
    quota::lease::Kind,
};
use hosts::{Host, at, exhaust, store};
use ipnet::IpNet;
use support::{
    eventually,
    redis::{Redis, free_port, servers},
    skipped,
};

#[test]
fn three_hosts_use_one_amount() {
    for binary in servers() {
        let redis = Redis::start(binary, &[]);
        let hosts = [(); 3].map(|()| Host::connected(&at(&redis, "  first_share: 0\n")));
        let used = exhaust(&hosts, 1, Kind::Credit, 20_000, 7);
        // No host died and none began with an opening: the bound is the amount itself.
        assert!(used <= 20_000, "{used}");
        assert!(used > 20_000 - 3 * 7, "{used}");
    }
}

#[test]
fn openings_are_within_the_bound() {
    for binary in servers() {
        let redis = Redis::start(binary, &[]);
        let first = [Host::connected(&at(&redis, "  first_share: 5\n"))];
        assert!(exhaust(&first, 1, Kind::Credit, 1_000, 10) <= 1_000);
        // Two more meet a level that is used up: five percent, or one request, each.
        let others = [(); 2].map(|()| Host::connected(&at(&redis, "  first_share: 5\n")));
        let more = exhaust(&others, 1, Kind::Credit, 1_000, 10);
        assert!(more <= 2 * 50, "{more}");
    }
}

#[test]
fn a_killed_hosts_lease_comes_back() {
    for binary in servers() {
        let redis = Redis::start(binary, &[]);
        let settings = at(&redis, "  first_share: 0\n");
        let first = Host::connected(&settings);
        eventually("a lease", || first.uses(1, Kind::Parallel, 10, 0).then_some(()));
        // Ten slots, all held by a host that dies.
        let now_ns = clock::monotonic_ns();
        let level = first
            .cluster
            .directory()
            .level(1, Kind::Parallel, 10, now_ns)
            .expect("room");
        for _ in 0..10 {
            eventually("a slot", || level.reserve(1, clock::monotonic_ns()).ok());
        }
        first.end(false);
        let second = Host::connected(&settings);
        assert!(!second.uses(1, Kind::Parallel, 10, 1));
        eventually("the slots", || {
            second.uses(1, Kind::Parallel, 10, 10).then_some(())
        });
    }
}

#[test]
fn a_host_that_ends_gives_back_at_once() {
    for binary in servers() {
        let redis = Redis::start(binary, &[]);
        let settings = store(&format!(
            "  redis: {}\n  lease: 1m\n  first_share: 0\n",
            redis.url()
        ));
        let first = Host::connected(&settings);
        eventually("a lease", || {
            first.uses(1, Kind::Credit, 1_000, 500).then_some(())
        });
        first.end(true);
        let second = Host::connected(&settings);
        // With a lease of a minute this would otherwise take a minute.
        eventually("the rest", || {
            second.uses(1, Kind::Credit, 1_000, 500).then_some(())
        });
        assert!(!second.uses(1, Kind::Credit, 1_000, 1));
    }
}

#[test]
fn a_store_that_is_killed_and_comes_back_empty_hears_what_was_used() {
    for binary in servers() {
        let mut redis = Redis::start(binary, &[]);
        let settings = at(&redis, "  first_share: 0\n  on_store_loss: refuse\n");
        let hosts = [(); 2].map(|()| Host::connected(&settings));
        let mut used = 0;
        for host in &hosts {
            eventually("a lease", || host.uses(1, Kind::Credit, 1_000, 200).then_some(()));
            used += 200;
        }
        redis.kill();
        for host in &hosts {
            host.await_status("the loss", |status| !status.is_connected());
            assert!(
                host.cluster
                    .status()
                    .trouble()
                    .is_some_and(|trouble| trouble.contains("store"))
            );
            // The leases run out, and then it refuses, also levels that it has never met.
            eventually("a refusal", || {
                let admitted = host.uses(1, Kind::Credit, 1_000, 1);
                used += u64::from(admitted);
                (!admitted).then_some(())
            });
            assert!(!host.uses(1, Kind::Credit, 1_000, 1));
            assert!(!host.uses(2, Kind::Credit, 1_000, 1));
        }
        let reports = |status: &Status| status.json()["reports"].as_u64().unwrap_or(0);
        let before = hosts.each_ref().map(|host| reports(&host.cluster.status()));
        redis.restart();
        // Both report what they used before one of them may use up the rest.
        for (host, before) in hosts.iter().zip(before) {
            host.await_status("a report", |status| {
                status.is_connected() && reports(status) > before
            });
        }
        let rest = exhaust(&hosts, 1, Kind::Credit, 1_000, 5);
        assert!(used + rest <= 1_000, "{used} and {rest}");
        assert!(used + rest > 1_000 - 3 * 5, "{used} and {rest}");
    }
}

#[test]
fn hosts_go_on_with_their_share_while_the_store_hangs() {
    for binary in servers() {
        let redis = Redis::start(binary, &[]);
        let settings = at(&redis, "  first_share: 0\n  on_store_loss: local\n");
        let hosts = [(); 2].map(|()| Host::connected(&settings));
        for host in &hosts {
            host.await_status("two hosts", |status| status.json()["hosts"] == 2);
            eventually("a lease", || host.uses(1, Kind::Credit, 1_000, 100).then_some(()));
        }
        thread::sleep(Duration::from_millis(200));
        // It accepts connections and says nothing, as behind a network that drops.
        redis.signal(libc::SIGSTOP);
        for host in &hosts {
            host.await_status("the loss", |status| !status.is_connected());
        }
        // Two hosts: each goes on with half of what is left, 400, and what its lease held at the loss.
        let used = 200 + exhaust(&hosts, 1, Kind::Credit, 1_000, 5);
        assert!(used > 900, "{used}");
        assert!(used <= 1_000 + 500, "{used}");
        redis.signal(libc::SIGCONT);
        for host in &hosts {
            host.await_status("an end of local grants", |status| {
                status.is_connected() && status.json()["local_levels"] == 0
            });
        }
        // Nothing was forgotten and nothing counted twice: what is left is the amount less what was used.
        let rest = exhaust(&hosts, 1, Kind::Credit, 2_000, 1);
        let sum = used + rest;
        assert!((1_995..=2_000).contains(&sum), "{used} and {rest}");
    }
}

#[test]
fn no_request_waits_while_the_store_hangs() {
    for binary in servers() {
        let redis = Redis::start(binary, &[]);
        let host = Host::connected(&at(&redis, ""));
        let window = Kind::Bucket {
            window_ns: 1_000_000_000,
        };
        eventually("a lease", || host.uses(1, window, 1_000_000, 1).then_some(()));
        redis.signal(libc::SIGSTOP);
        let began = Instant::now();
        let mut longest = Duration::ZERO;
        while began.elapsed() < Duration::from_secs(3) {
            let before = Instant::now();
            host.uses(1, window, 1_000_000, 1);
            longest = longest.max(before.elapsed());
            thread::sleep(Duration::from_millis(1));
        }
        // A machine that is busy takes the CPU away for a while; a wait for the store would be its whole patience.
        assert!(longest < Duration::from_millis(200), "{longest:?}");
        redis.signal(libc::SIGCONT);
    }
}

#[test]
fn a_cluster_of_three_masters() {
    for binary in servers() {
        let nodes = Redis::cluster(binary);
        let urls: Vec<String> = nodes.iter().map(Redis::url).collect();
        let settings = store(&format!(
            "  cluster: [{}]\n  lease: 2s\n  round: 20ms\n  first_share: 0\n",
            urls.join(", ")
        ));
        let hosts = [(); 2].map(|()| Host::connected(&settings));
        // Levels in different parts, so on different nodes.
        for id in [1, 2, 3, 1 << 40] {
            let used = exhaust(&hosts, id, Kind::Credit, 1_000, 3);
            assert!(used <= 1_000 && used > 1_000 - 2 * 3, "{id}: {used}");
        }
        blocks_reach_others(&hosts);
    }
}

fn blocks_reach_others(hosts: &[Host; 2]) {
    let [one, other] = hosts;
    let client = "192.0.2.7/32".parse().expect("an address");
    one.cluster.tell_block(client, Some(Duration::from_secs(30)));
    let hold = eventually("the block", || {
        other.seen.0.lock().expect("seen").first().copied()
    });
    let (seen, hold) = (hold.0, hold.1.expect("a block"));
    assert_eq!(seen, client);
    assert!(
        hold <= Duration::from_secs(31) && hold > Duration::from_secs(15),
        "{hold:?}"
    );
    one.cluster.tell_block(client, None);
    eventually("the lift", || {
        other
            .seen
            .0
            .lock()
            .expect("seen")
            .get(1)
            .copied()
            .filter(|seen| seen.1.is_none())
    });
    assert!(
        one.seen.0.lock().expect("seen").is_empty(),
        "a host hears nothing of its own"
    );
}

#[test]
fn blocks_reach_hosts_that_are_there_and_those_that_come() {
    for binary in servers() {
        let redis = Redis::start(binary, &[]);
        let settings = at(&redis, "");
        let hosts = [(); 2].map(|()| Host::connected(&settings));
        blocks_reach_others(&hosts);
        let client: IpNet = "2001:db8::/64".parse().expect("an address");
        hosts[0].cluster.tell_block(client, Some(Duration::from_secs(30)));
        let late = Host::connected(&settings);
        eventually("the block", || {
            let seen = late.seen.0.lock().expect("seen").clone();
            seen.into_iter()
                .find(|(seen, hold)| *seen == client && hold.is_some())
        });
    }
}

#[test]
fn a_password_and_tls() {
    for binary in servers() {
        let directory = tempfile::tempdir().expect("a directory");
        let made =
            rcgen::generate_simple_self_signed(vec!["localhost".into(), "127.0.0.1".into()]).expect("a key");
        let path = |name: &str| directory.path().join(name).display().to_string();
        std::fs::write(path("cert.pem"), made.cert.pem()).expect("a file");
        std::fs::write(path("key.pem"), made.signing_key.serialize_pem()).expect("a file");
        let redis = Redis::start(binary, &["--requirepass", "open-sesame"]);
        let wrong = Host::start(&at(&redis, "  password: sesame-shut\n"));
        wrong.await_status("a refusal", |status| {
            status.trouble().is_some_and(|trouble| {
                trouble.contains("NOAUTH")
                    || trouble.contains("WRONGPASS")
                    || trouble.contains("uthentication")
            })
        });
        let trouble = wrong.cluster.status().trouble().unwrap_or_default();
        assert!(!trouble.contains("sesame"), "{trouble}");
        Host::connected(&at(&redis, "  password: open-sesame\n"));

        let tls_port = Cell::new(0);
        let tls = Redis::start_if_it_can(binary, || {
            tls_port.set(free_port());
            let (port, cert, key) = (tls_port.get().to_string(), path("cert.pem"), path("key.pem"));
            let names = [
                "--tls-port",
                "--tls-cert-file",
                "--tls-key-file",
                "--tls-auth-clients",
            ];
            let values: [&str; 4] = [&port, &cert, &key, "no"];
            let pairs = names.into_iter().zip(values);
            pairs
                .flat_map(|(name, value)| [name.into(), value.into()])
                .collect()
        });
        if tls.is_none() {
            skipped("redis", format!("this {binary} was built without TLS"));
            continue;
        }
        let tls_port = tls_port.get();
        let url = format!("  redis: rediss://127.0.0.1:{tls_port}\n  lease: 1s\n");
        let host = Host::connected(&store(&format!("{url}  ca: {}\n", path("cert.pem"))));
        eventually("a lease", || host.uses(1, Kind::Credit, 100, 50).then_some(()));
        let untrusting = Host::start(&store(&url));
        untrusting.await_status("a refusal", |status| {
            status.trouble().is_some_and(|trouble| !trouble.contains("yet"))
        });
        drop(tls);
    }
}

/// The script and `level.rs` say the same, whatever is reported.
#[test]
fn the_script_and_the_model_agree() {
    for binary in servers() {
        let redis = Redis::start(binary, &[]);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let address = Address::new(&at(&redis, ""));
        let link = runtime.block_on(address.connect()).expect("a connection");
        // Long enough that no lease runs out and no unit is earned back during the test.
        let times = Times {
            lease_us: 60_000_000,
            keep_us: 3_600_000_000,
        };
        let month_ns = 30 * 86_400 * 1_000_000_000;
        let kinds = [
            Kind::Credit,
            Kind::Parallel,
            Kind::Sliding { window_ns: month_ns },
            Kind::Bucket { window_ns: month_ns },
            Kind::Period {
                end_unix_ms: clock::unix_ms() + 86_400_000,
                length_ms: 86_400_000,
            },
        ];
        let mut random = 1_u64;
        let mut below = |bound: u64| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % bound
        };
        for (number, kind) in kinds.into_iter().enumerate() {
            let (mut model, mut birth) = (Level::default(), 0);
            let mut spent = [0; 4];
            for seq in 1..200_u64 {
                let host = below(4) as usize;
                spent[host] += below(40);
                let report = Report {
                    id: 100 + number as u64,
                    host: format!("h{host}"),
                    kind,
                    amount: 3_000,
                    // Some are late.
                    seq: if below(10) == 0 {
                        seq.saturating_sub(20)
                    } else {
                        seq
                    },
                    spent: spent[host],
                    from_start: 0,
                    from_known: 0,
                    birth,
                    kept: below(50),
                    wanted: below(300),
                    needed: below(60),
                    held: below(30),
                    hard: below(2) == 0,
                };
                let now_us = clock::unix_ms() * 1_000;
                let expected = model.report(&report, times, now_us);
                let heard = runtime
                    .block_on(link.report(0, std::slice::from_ref(&report), times))
                    .expect("an answer");
                let answer = heard.answers[0].expect("an answer");
                birth = if birth == 0 { answer.birth } else { birth };
                assert_eq!(answer.accepted, expected.accepted, "{report:?}");
                assert_eq!(answer.hosts, expected.hosts, "{report:?}");
                // A bucket earns some units' thousandths meanwhile.
                let near = |a: u64, b: u64| a.abs_diff(b) <= 1;
                assert!(
                    near(answer.out, expected.out),
                    "{report:?} {answer:?} {expected:?}"
                );
                assert!(
                    near(answer.free, expected.free),
                    "{report:?} {answer:?} {expected:?}"
                );
                assert!(
                    near(answer.used, expected.used),
                    "{report:?} {answer:?} {expected:?}"
                );
                assert!(
                    answer.settled_us.abs_diff(expected.settled_us) <= month_ns / 1_000 / 3_000,
                    "{report:?} {answer:?} {expected:?}"
                );
            }
        }
    }
}

/// Cores and the control task at once, with hosts that come and go: the sum stays within the bound of the docs.
#[test]
fn hosts_that_come_and_go() {
    for binary in servers() {
        let redis = Redis::start(binary, &[]);
        let settings = at(&redis, "  first_share: 1\n");
        let (used, over) = (AtomicU64::new(0), AtomicBool::new(false));
        const AMOUNT: u64 = 50_000;
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..3 {
                        let host = Host::connected(&settings);
                        let until = Instant::now() + Duration::from_millis(700);
                        while Instant::now() < until && !over.load(SeqCst) {
                            if host.uses(1, Kind::Credit, AMOUNT, 10) {
                                used.fetch_add(10, SeqCst);
                            }
                            thread::sleep(Duration::from_micros(300));
                        }
                        host.end(false);
                    }
                });
            }
        });
        // Nine processes with an opening each, each killed with at most its lease unreported. The leases are some 1/64 of
        // the amount or half a second of use.
        let bound = AMOUNT + 9 * (AMOUNT / 100) + 9 * (AMOUNT / 16);
        let used = used.into_inner();
        assert!(used <= bound, "{used}");
        let last = [Host::connected(&settings)];
        // What was not reported by the killed comes back with their leases, no more.
        let rest = exhaust(&last, 1, Kind::Credit, AMOUNT, 10);
        assert!(used + rest <= bound, "{used} {rest}");
        assert!(used + rest >= AMOUNT - 20, "{used} {rest}");
    }
}
