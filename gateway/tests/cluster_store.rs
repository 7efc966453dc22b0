//! Hosts on a real Redis or Valkey that forgets scripts or data, has garbage in it, no memory left, few rights to give, or
//! parts that hang; and what stays in it.

#[path = "support/hosts.rs"]
mod hosts;
mod support;

use std::time::{Duration, Instant};

use gateway::{
    control::cluster::{
        Status,
        feed::Feed,
        level::{Answer, Level, Report, Times},
        link::{Address, Item, Link},
    },
    net::clock,
    quota::lease::Kind,
};
use hosts::{Host, at, exhaust, store};
use support::{
    eventually,
    redis::{Redis, servers},
    skipped,
};

const TIMES: Times = Times {
    lease_us: 60_000_000,
    keep_us: 3_600_000_000,
};

/// The number that a script answers.
fn number(redis: &Redis, script: &str) -> u64 {
    let answer = redis.ask(&format!("EVAL \"{script}\" 0")).unwrap_or_default();
    let digits = answer.trim().strip_prefix(':').map(str::parse);
    digits
        .and_then(Result::ok)
        .unwrap_or_else(|| panic!("{script}: {answer}"))
}

/// Units used of all levels, as the store has it.
fn used(redis: &Redis) -> u64 {
    number(
        redis,
        "local sum = 0 for _, key in ipairs(redis.call('KEYS', '*:level:*')) do \
         sum = sum + redis.call('HGET', key, 'u') end return sum",
    )
}

/// Units leased of all levels.
fn leased(redis: &Redis) -> u64 {
    number(
        redis,
        "local sum = 0 for _, key in ipairs(redis.call('KEYS', '*:level:*')) do \
         for _, value in ipairs(redis.call('HVALS', key)) do \
         sum = sum + (string.match(value, '^%S+ %S+ (%S+) %S+ %S+$') or 0) end end return sum",
    )
}

fn trouble(host: &Host) -> String {
    host.cluster.status().trouble().unwrap_or_default()
}

fn losses(host: &Host) -> u64 {
    host.cluster.status().json()["losses"].as_u64().expect("a number")
}

/// Calls of one connection, one after the other.
fn with_link<T>(redis: &Redis, run: impl AsyncFnOnce(Link) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let address = Address::new(&at(redis, ""));
    runtime
        .expect("a runtime")
        .block_on(async move { run(address.connect().await.expect("a connection")).await })
}

fn report(id: u64, kind: Kind, amount: u64, host: &str, spent: u64) -> Report {
    Report {
        id,
        host: host.into(),
        kind,
        amount,
        seq: 1,
        spent,
        from_start: 0,
        from_known: 0,
        birth: 0,
        kept: 0,
        wanted: 10,
        needed: 10,
        held: 0,
        hard: true,
    }
}

async fn ask(link: &Link, report: Report) -> Answer {
    let heard = link.report(0, std::slice::from_ref(&report), TIMES).await;
    let heard = heard.expect("an answer");
    heard.answers[0].unwrap_or_else(|| panic!("{report:?}: {:?}", heard.trouble))
}

#[test]
fn scripts_that_are_flushed_are_sent_again() {
    for binary in servers() {
        let redis = Redis::start(binary, &[]);
        let hosts = [Host::connected(&at(&redis, "  first_share: 0\n"))];
        eventually("a lease", || {
            hosts[0].uses(1, Kind::Credit, 1_000, 5).then_some(())
        });
        redis.ask("SCRIPT FLUSH").expect("an answer");
        assert_eq!(5 + exhaust(&hosts, 1, Kind::Credit, 1_000, 5), 1_000);
        assert_eq!(losses(&hosts[0]), 0);
    }
}

/// Hosts that nothing is asked of hold nothing and report nothing; still they tell a store that lost its data.
#[test]
fn data_that_is_flushed_is_told_again_by_idle_hosts() {
    for binary in servers() {
        let redis = Redis::start(binary, &[]);
        let settings = at(&redis, "  first_share: 0\n");
        let hosts = [(); 2].map(|()| Host::connected(&settings));
        for host in &hosts {
            eventually("a lease", || host.uses(1, Kind::Credit, 1_000, 300).then_some(()));
        }
        eventually("600 used and nothing leased", || {
            (used(&redis) == 600 && leased(&redis) == 0).then_some(())
        });
        redis.ask("FLUSHALL").expect("an answer");
        eventually("600 used again", || (used(&redis) == 600).then_some(()));
        let rest = exhaust(&hosts, 1, Kind::Credit, 1_000, 5);
        assert!((391..=400).contains(&rest), "{rest}");
        assert!(hosts.iter().all(|host| losses(host) == 0));
    }
}

#[test]
fn a_level_with_garbage_in_it_stands_alone() {
    for binary in servers() {
        let redis = Redis::start(binary, &[]);
        let host = Host::connected(&at(&redis, "  first_share: 0\n  on_store_loss: local\n"));
        redis
            .ask("SET {gateway:1}:level:0000000000000001 garbage")
            .expect("an answer");
        redis
            .ask("HSET {gateway:3}:level:0000000000000003 u garbage h:x garbage")
            .expect("an answer");
        for spoilt in [1, 3] {
            // Goes on by itself, as without the store.
            eventually("a local grant", || {
                host.uses(spoilt, Kind::Credit, 100, 1).then_some(())
            });
            for id in 10..14 {
                eventually("a lease", || host.uses(id, Kind::Credit, 100, 1).then_some(()));
            }
        }
        assert!(
            trouble(&host).contains(":level:000000000000000"),
            "{}",
            trouble(&host)
        );
        assert!(host.cluster.status().is_connected());
        assert_eq!(losses(&host), 0);
        redis
            .ask("DEL {gateway:1}:level:0000000000000001")
            .expect("an answer");
        eventually("the level in the store", || {
            host.uses(1, Kind::Credit, 100, 1);
            redis
                .ask("HGET {gateway:1}:level:0000000000000001 u")
                .filter(|answer| answer.starts_with('$') && !answer.starts_with("$-1"))
        });
    }
}

/// Nothing that can be configured or used makes an answer that is no number.
#[test]
fn the_largest_numbers() {
    for binary in servers() {
        let redis = Redis::start(binary, &[]);
        let year_ns = 366 * 86_400 * 1_000_000_000;
        let kinds = [
            Kind::Credit,
            Kind::Parallel,
            Kind::Sliding { window_ns: year_ns },
            Kind::Bucket { window_ns: year_ns },
            Kind::Period {
                end_unix_ms: clock::unix_ms() + 31 * 86_400_000,
                length_ms: 31 * 86_400_000,
            },
        ];
        with_link(&redis, async |link| {
            let mut id = 0;
            for kind in kinds {
                for amount in [1, 1_000, 1 << 53, u64::MAX] {
                    for spent in [0, 1, (1 << 53) + 1, u64::MAX] {
                        id += 1;
                        let answer = ask(&link, report(id, kind, amount, "a", spent)).await;
                        assert!(answer.accepted && answer.out <= 10, "{answer:?}");
                        let left = amount.saturating_sub(spent);
                        assert!(answer.out <= left, "{amount} {spent} {answer:?}");
                    }
                }
            }
            // Cents beside nine million dollars: nothing is lost on the way.
            let all = (1 << 53) - 1;
            let first = report(9_000, Kind::Credit, all, "a", all - 7);
            ask(&link, Report { wanted: 0, ..first }).await;
            let answer = ask(&link, report(9_000, Kind::Credit, all, "b", 3)).await;
            assert_eq!((answer.used, answer.out), (all - 4, 4));
        });
    }
}

/// What a clock that was ahead left in the store: a period, a slot and a dead host's lease of the far future.
#[test]
fn a_store_whose_clock_was_ahead() {
    for binary in servers() {
        let redis = Redis::start(binary, &[]);
        let now_ms = clock::unix_ms();
        let day_ms = 86_400_000;
        let period = Kind::Period {
            end_unix_ms: now_ms + day_ms,
            length_ms: day_ms,
        };
        let sliding = Kind::Sliding {
            window_ns: 3_600_000_000_000,
        };
        with_link(&redis, async |link| {
            for (id, kind) in [(1, period), (2, sliding)] {
                ask(&link, report(id, kind, 100, "a", 30)).await;
                let key = format!("{{gateway:{id}}}:level:{id:016x}");
                let ahead_us = (now_ms + 400 * day_ms) * 1_000;
                let fields = [
                    format!("p {}", now_ms + 400 * day_ms),
                    format!("s:{} 5", ahead_us * 16 / 3_600_000_000),
                    format!("h:dead \"7 1 20 {ahead_us} 0\""),
                ];
                for field in fields {
                    redis.ask(&format!("HSET {key} {field}")).expect("an answer");
                }
                let answer = ask(&link, report(id, kind, 100, "b", 0)).await;
                assert_eq!(answer.used, if kind == sliding { 35 } else { 30 });
                // The dead host's lease ends with an ordinary lease's time.
                let lease = redis.ask(&format!("HGET {key} h:dead")).expect("an answer");
                let lease = lease.lines().nth(1).expect("a lease").to_owned();
                let expiry_us: u64 = lease
                    .split(' ')
                    .nth(3)
                    .and_then(|text| text.parse().ok())
                    .expect("a time");
                assert!(expiry_us < (now_ms + 600_000) * 1_000, "{lease}");
                let ends = redis.ask(&format!("HGET {key} p")).expect("an answer");
                if kind == period {
                    assert!(ends.contains(&(now_ms + day_ms).to_string()), "{ends}");
                }
            }
        });
    }
}

/// A message that was overtaken on its way leaves the level as it is, also what it would mend on a host's behalf.
#[test]
fn a_late_message_changes_nothing() {
    for binary in servers() {
        let redis = Redis::start(binary, &[]);
        let (now_ms, day_ms) = (clock::unix_ms(), 86_400_000);
        let ahead_ms = now_ms + 400 * day_ms;
        // What the late one says, what the store has by then. A period that begins and one that a clock ahead began; a
        // slot and a lease of such a clock are in both.
        let ends = [(now_ms + 2 * day_ms, now_ms), (now_ms + day_ms, ahead_ms)];
        with_link(&redis, async |link| {
            for (id, (said_ms, had_ms)) in (1..).zip(ends) {
                let period = Kind::Period {
                    end_unix_ms: said_ms,
                    length_ms: day_ms,
                };
                let last = Report {
                    seq: 2,
                    ..report(id, period, 100, "a", 30)
                };
                ask(&link, last.clone()).await;
                let key = format!("{{gateway:{id}}}:level:{id:016x}");
                let fields = format!(
                    "p {had_ms} s:{ahead_ms} 5 h:dead \"7 1 20 {} 0\"",
                    ahead_ms * 1_000
                );
                redis.ask(&format!("HSET {key} {fields}")).expect("an answer");
                let all = || redis.ask(&format!("HGETALL {key}")).expect("an answer");
                let before = all();
                let late = Report {
                    seq: 1,
                    ..last.clone()
                };
                assert!(!ask(&link, late).await.accepted);
                assert_eq!(all(), before);
                // One that is not late mends it.
                assert!(ask(&link, Report { seq: 3, ..last }).await.accepted);
                assert!(all().contains(&said_ms.to_string()), "{}", all());
                assert!(!all().contains(&ahead_ms.to_string()), "{}", all());
            }
        });
    }
}

/// Debt is what was used beyond leases when nothing was left, and nothing else goes along into the next period.
#[test]
fn a_lowered_amount_makes_no_debt() {
    for binary in servers() {
        let redis = Redis::start(binary, &[]);
        // A period that ends within a second by the store's clock is over: one after the other, without waiting.
        let begin_ms = clock::unix_ms();
        let period = |number: u64| Kind::Period {
            end_unix_ms: begin_ms + 100 * number,
            length_ms: 100,
        };
        // Of each report: period, amount, host, spent, kept. What is used then, by the script and by the model.
        let run = |id: u64, hard: bool, reports: &[(u64, u64, &str, u64, u64)]| {
            with_link(&redis, async |link| {
                let (mut model, mut used) = (Level::default(), Vec::new());
                for (seq, (number, amount, host, spent, kept)) in (1..).zip(reports) {
                    let report = Report {
                        seq,
                        kept: *kept,
                        wanted: 0,
                        hard,
                        ..report(id, period(*number), *amount, host, *spent)
                    };
                    let expected = model.report(&report, TIMES, clock::unix_ms() * 1_000);
                    let answer = ask(&link, report.clone()).await;
                    assert_eq!(
                        (answer.used, answer.free),
                        (expected.used, expected.free),
                        "{report:?}"
                    );
                    used.push(answer.used);
                }
                used
            })
        };
        let lowered = [
            (1, 100, "a", 0, 90),
            (1, 100, "a", 80, 10),
            (1, 10, "a", 80, 10),
            // Its lease was granted before.
            (1, 10, "a", 90, 0),
            (2, 10, "b", 0, 0),
        ];
        assert_eq!(run(1, true, &lowered), [0, 80, 80, 90, 0]);
        let overused = [
            (1, 100, "a", 0, 80),
            (1, 10, "a", 80, 0),
            (1, 10, "a", 105, 0),
            (2, 10, "b", 0, 0),
            (3, 10, "c", 0, 0),
            (4, 10, "d", 0, 0),
            (5, 10, "e", 0, 0),
        ];
        assert_eq!(run(2, true, &overused), [0, 80, 105, 25, 15, 5, 0]);
        assert_eq!(run(3, false, &overused), [0, 80, 105, 0, 0, 0, 0]);
        // Another host's lease leaves nothing for what goes beyond: debt if it is used, none if it comes back.
        for (id, other, debt) in [(5, 50, 30), (6, 0, 0)] {
            let two = [
                (1, 100, "a", 0, 50),
                (1, 100, "b", 0, 50),
                (1, 100, "b", 80, 0),
                (1, 100, "a", other, 0),
                (2, 100, "c", 0, 0),
            ];
            assert_eq!(run(id, true, &two), [0, 0, 80, 80 + other, debt]);
        }
        let raised = [(1, 100, "a", 120, 0), (2, 200, "b", 0, 0)];
        assert_eq!(run(7, true, &raised), [120, 0]);
    }
}

#[test]
fn what_stays_in_the_store_ends_by_itself() {
    for binary in servers() {
        let redis = Redis::start(binary, &[]);
        let hosts = [(); 2].map(|()| Host::connected(&at(&redis, "  first_share: 0\n")));
        let hour_ms = 3_600_000;
        let kinds = [
            Kind::Parallel,
            Kind::Sliding {
                window_ns: 60_000_000_000,
            },
            Kind::Bucket {
                window_ns: 60_000_000_000,
            },
            Kind::Period {
                end_unix_ms: clock::unix_ms() / hour_ms * hour_ms + hour_ms,
                length_ms: hour_ms,
            },
        ];
        for (id, kind) in (1..).zip(kinds) {
            eventually("a lease", || hosts[0].uses(id, kind, 100, 1).then_some(()));
        }
        let client = "192.0.2.7/32".parse().expect("an address");
        hosts[0].cluster.tell_block(client, Some(Duration::from_secs(30)));
        eventually("the block", || {
            hosts[1].seen.0.lock().expect("seen").first().copied()
        });
        // What stays: a mark of each part, and the log and index of blocks, which are bounded.
        let most_ms = 4 * hour_ms;
        let forever = number(
            &redis,
            &format!(
                "local sum = 0 for _, key in ipairs(redis.call('KEYS', '*')) do \
                 local ttl = redis.call('PTTL', key) \
                 if not string.find(key, ':mark') and (ttl < 0 or ttl > {most_ms}) then sum = sum + 1 end end \
                 return sum"
            ),
        );
        assert_eq!(forever, 0, "{:?}", redis.ask("KEYS *"));
    }
}

/// The commands that docs/cluster.md lists suffice, and no key has another prefix.
#[test]
fn a_user_with_few_rights() {
    for binary in servers() {
        let redis = Redis::start(binary, &[]);
        let manual = include_str!("../../docs/cluster.md");
        let line = manual
            .lines()
            .find(|line| line.starts_with("ACL SETUSER gateway"));
        let made = redis.ask(line.expect("the command")).expect("an answer");
        if made.starts_with("-ERR unknown command") {
            skipped(
                "redis",
                format!("this {binary} knows no users: it is older than 6"),
            );
            continue;
        }
        assert!(made.starts_with("+OK"), "{made}");
        let settings = at(
            &redis,
            "  first_share: 0\n  username: gateway\n  password: open-sesame\n",
        );
        let hosts = [(); 2].map(|()| Host::connected(&settings));
        assert!(exhaust(&hosts, 1, Kind::Credit, 1_000, 5) > 990);
        let client = "192.0.2.7/32".parse().expect("an address");
        hosts[0].cluster.tell_block(client, Some(Duration::from_secs(30)));
        eventually("the block", || {
            hosts[1].seen.0.lock().expect("seen").first().copied()
        });
        assert_eq!(trouble(&hosts[0]), "");

        redis.ask("ACL SETUSER gateway -zadd -hset").expect("an answer");
        hosts[0].await_status("a refusal", |status| !status.is_connected());
        assert!(!trouble(&hosts[0]).contains("sesame"), "{}", trouble(&hosts[0]));
    }
}

#[test]
fn a_store_without_memory_is_no_store() {
    for binary in servers() {
        let redis = Redis::start(binary, &[]);
        let host = Host::connected(&at(&redis, "  first_share: 0\n  on_store_loss: refuse\n"));
        eventually("a lease", || host.uses(1, Kind::Credit, 1_000, 1).then_some(()));
        redis.ask("CONFIG SET maxmemory 1").expect("an answer");
        host.await_status("the loss", |status| !status.is_connected());
        assert!(trouble(&host).contains("OOM"), "{}", trouble(&host));
        eventually("a refusal", || {
            (!host.uses(1, Kind::Credit, 1_000, 1)).then_some(())
        });
        redis.ask("CONFIG SET maxmemory 0").expect("an answer");
        host.await_status("a connection", Status::is_connected);
        eventually("a lease", || host.uses(1, Kind::Credit, 1_000, 1).then_some(()));
    }
}

/// A reader that is slower than the log is long, or whose log is gone, takes all items anew.
#[test]
fn a_reader_that_was_left_behind_by_the_log_misses_nothing() {
    for binary in servers() {
        let redis = Redis::start(binary, &[]);
        with_link(&redis, async |mut link| {
            let mut feed = Feed::new("things");
            let mut read = async |link: &mut Link| {
                let mut names = Vec::new();
                loop {
                    let pulled = feed.pull(link, clock::unix_ms()).await.expect("a portion");
                    names.extend(pulled.items.into_iter().map(|item| item.name));
                    if !pulled.more {
                        names.sort_unstable();
                        return names;
                    }
                }
            };
            let mut stamp = 0;
            let mut put = async |link: &mut Link, name: &str| {
                stamp += 1;
                let item = Item {
                    name: name.into(),
                    stamp: format!("{stamp:016x}-h"),
                    value: "v".into(),
                    ttl: None,
                };
                assert!(link.publish("things", &item).await.expect("an answer"));
            };
            put(&mut link, "a").await;
            assert_eq!(read(&mut link).await, ["a"]);
            put(&mut link, "b").await;
            assert_eq!(read(&mut link).await, ["b"]);
            for name in ["c", "d", "e"] {
                put(&mut link, name).await;
            }
            redis
                .ask("XTRIM {gateway:things}:log MAXLEN 1")
                .expect("an answer");
            assert_eq!(read(&mut link).await, ["a", "b", "c", "d", "e"]);
            assert_eq!(read(&mut link).await, [""; 0]);
            redis.ask("FLUSHALL").expect("an answer");
            put(&mut link, "f").await;
            assert_eq!(read(&mut link).await, ["f"]);
        });
    }
}

/// A cluster that goes on without a part.
fn partial_cluster(binary: &'static str) -> (Vec<Redis>, String) {
    let nodes = Redis::cluster(binary);
    for node in &nodes {
        node.ask("CONFIG SET cluster-require-full-coverage no")
            .expect("an answer");
    }
    let urls: Vec<String> = nodes.iter().map(Redis::url).collect();
    let line = format!("  cluster: [{}]\n", urls.join(", "));
    (nodes, line)
}

/// The node in which hosts say that they are there; levels of others, and of it.
fn node_of_hosts(nodes: &[Redis]) -> (&Redis, Vec<u64>, Vec<u64>) {
    let holds = |node: &Redis, key: &str| {
        let answer = node.ask(&format!("EXISTS {key}")).unwrap_or_default();
        answer.starts_with(':')
    };
    let node = nodes.iter().find(|node| holds(node, "{gateway:hosts}"));
    let node = node.expect("the node of the hosts");
    let is_other = |id: &u64| !holds(node, &format!("{{gateway:{id}}}:mark"));
    let (others, own): (Vec<u64>, Vec<u64>) = (0..16).partition(is_other);
    assert!(!others.is_empty() && !own.is_empty());
    (node, others, own)
}

/// While one of three masters hangs, a hungry level of another one waits for no round.
#[test]
fn a_part_that_hangs_delays_no_hungry_level() {
    for binary in servers() {
        let (nodes, cluster) = partial_cluster(binary);
        let lines = "  lease: 10s\n  round: 1s\n  first_share: 0\n  on_store_loss: refuse\n";
        let host = Host::connected(&store(&format!("{cluster}{lines}")));
        let (hanging, well, ill) = node_of_hosts(&nodes);
        let uses = |id| {
            let admitted = host.uses(id, Kind::Credit, 1_000, 1);
            if !admitted {
                // As a gateway does with each refusal.
                host.cluster.directory().hurry();
            }
            admitted
        };
        for id in 0..16 {
            eventually("a lease", || uses(id).then_some(()));
        }
        hanging.signal(libc::SIGSTOP);
        let began = Instant::now();
        let levels = 60;
        for n in 0..levels {
            // Never met before, so the store must answer; and one that asks for the part that hangs.
            let beyond = 16 * (n + 1);
            let level = well[n as usize % well.len()] + beyond;
            let other = ill[n as usize % ill.len()] + beyond;
            eventually("a lease", || {
                let _ = uses(other);
                uses(level).then_some(())
            });
        }
        // A round each would take a minute.
        assert!(
            began.elapsed() < Duration::from_secs(levels / 2),
            "{:?}",
            began.elapsed()
        );
        hanging.signal(libc::SIGCONT);
    }
}

/// One of three masters hangs, the one in which hosts say that they are there: levels of the others are leased on.
#[test]
fn a_part_that_hangs_holds_up_no_other() {
    for binary in servers() {
        let (nodes, cluster) = partial_cluster(binary);
        let lines = "  lease: 2s\n  round: 20ms\n  first_share: 0\n  on_store_loss: refuse\n";
        let host = Host::connected(&store(&format!("{cluster}{lines}")));
        let (hanging, well, ill) = node_of_hosts(&nodes);
        for id in 0..16 {
            eventually("a lease", || host.uses(id, Kind::Credit, 1_000, 1).then_some(()));
        }
        hanging.signal(libc::SIGSTOP);
        // Levels that ask for the part that hangs all the while.
        for round in 1..12 {
            for id in &ill {
                host.uses(*id, Kind::Credit, 1_000, 100);
            }
            for id in &well {
                // Never met before, so the store must answer.
                let level = id + 16 * round;
                eventually("a lease", || {
                    host.uses(level, Kind::Credit, 1_000, 1).then_some(())
                });
            }
        }
        let refused = || ill.iter().all(|id| !host.uses(*id, Kind::Credit, 1_000, 1));
        eventually("refusals", || refused().then_some(()));
        host.await_status("silent parts", |status| {
            status
                .trouble()
                .is_some_and(|trouble| trouble.contains("parts do not answer"))
        });
        assert!(host.cluster.status().is_connected());
        assert_eq!(losses(&host), 0);
        hanging.signal(libc::SIGCONT);
        for id in 0..16 {
            eventually("a lease", || host.uses(id, Kind::Credit, 1_000, 1).then_some(()));
        }
        host.await_status("all parts", |status| status.trouble().is_none());
    }
}

#[test]
fn what_idle_hosts_do_not_use_a_busy_one_has() {
    for binary in servers() {
        let redis = Redis::start(binary, &[]);
        let hosts = [(); 3].map(|()| Host::connected(&at(&redis, "  first_share: 0\n")));
        for host in &hosts {
            eventually("a lease", || host.uses(1, Kind::Credit, 1_000, 1).then_some(()));
        }
        assert_eq!(3 + exhaust(&hosts[..1], 1, Kind::Credit, 1_000, 1), 1_000);
    }
}
