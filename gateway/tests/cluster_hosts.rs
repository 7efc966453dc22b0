//! Three whole gateways on one real Redis or Valkey: shared limits seen by clients, hosts and stores that are killed.

mod support;

use std::{
    sync::atomic::{AtomicU64, Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

use gateway_bench::upstream::Server;
use support::{
    Gateway, Setup,
    client::{Answer, Client, chat},
    eventually, fleet,
    redis::{Redis, servers},
};

const CHAT: &str = "/v1/chat/completions";

/// A gateway with these limits that shares them through `redis`.
fn gateway(fleet: &Server, redis: &Redis, limits: &str, store: &str) -> Gateway {
    let store = format!(
        "store: {{ redis: \"{}\", lease: 1s, round: 20ms{store} }}\n",
        redis.url()
    );
    let setup = Setup::new(format!("http://{}", fleet.addr()))
        .limits(limits)
        .more(&store);
    Gateway::start(&setup.config())
}

/// Gateways that all have found the store.
fn gateways(fleet: &Server, redis: &Redis, limits: &str, store: &str) -> Vec<Gateway> {
    let gateways: Vec<_> = (0..3).map(|_| gateway(fleet, redis, limits, store)).collect();
    for gateway in &gateways {
        gateway.await_log("connected to the store");
    }
    gateways
}

fn ask(gateway: &Gateway) -> Answer {
    let mut client = Client::connect(gateway.addr());
    let body = r#"{"model":"fast","max_tokens":20,"messages":[{"role":"user","content":"hello"}]}"#;
    client.post(CHAT, body);
    client.answer()
}

/// Asks all gateways from two clients each until all are refused for a while; how many were served.
fn exhaust(gateways: &[&Gateway]) -> u64 {
    let served = AtomicU64::new(0);
    thread::scope(|scope| {
        for gateway in gateways {
            for _ in 0..2 {
                let served = &served;
                scope.spawn(move || {
                    let mut refused_since = Instant::now();
                    while refused_since.elapsed() < Duration::from_secs(2) {
                        match ask(gateway).status {
                            200 => {
                                served.fetch_add(1, SeqCst);
                                refused_since = Instant::now();
                            }
                            429 => thread::sleep(Duration::from_millis(10)),
                            status => panic!("{status}"),
                        }
                    }
                });
            }
        }
    });
    served.into_inner()
}

fn store_of(gateway: &Gateway) -> serde_json::Value {
    let status = gateway.admin("GET /status", "").json();
    status["store"].clone()
}

/// Units of the only level there is that are used, as the store has it.
fn used(redis: &Redis) -> Option<u64> {
    const USED: &str = "EVAL \"return redis.call('HGET', redis.call('KEYS', '*:level:*')[1], 'u')\" 0";
    redis.ask(USED)?.split("\r\n").nth(1)?.parse().ok()
}

/// Waits until the store says that so many units are used.
fn await_used(redis: &Redis, units: u64) {
    eventually(&format!("{units} used"), || {
        (used(redis) == Some(units)).then_some(())
    });
}

#[test]
fn three_gateways_keep_one_limit_and_a_killed_one_returns_its_lease() {
    for binary in servers() {
        let (redis, fleet) = (Redis::start(binary, &[]), fleet("tokens=2,pace=0,first=0"));
        let limits = "  - { name: all, per: shared, requests: 120, window: calendar, every: 1mo }";
        let mut gateways = gateways(&fleet, &redis, limits, "");
        // Each meets the limit for the first time: two percent are three requests.
        let openings = 3 * 3;
        let mut served = 0;
        for gateway in &gateways {
            for _ in 0..10 {
                served += u64::from(ask(gateway).status == 200);
            }
        }
        // Presence is told once a second.
        eventually("three hosts", || {
            (store_of(&gateways[0])["hosts"] == 3).then_some(())
        });
        await_used(&redis, served);
        // What the killed one had used and told counts, and what it had leased and not used comes back: lost is what it
        // used since its last round, some of these.
        let victim = gateways.pop().expect("a gateway");
        let last = (0..5).filter(|_| ask(&victim).status == 200).count() as u64;
        drop(victim.kill());
        served += last + exhaust(&gateways.iter().collect::<Vec<_>>());
        let told = used(&redis).expect("the level");
        assert!(
            (served - last..=served).contains(&told),
            "{told} of {served}, {last}"
        );
        // The formula of docs/cluster.md; nothing ran beyond its reservation, and the store was there.
        let lost = served - told;
        assert!(served <= 120 + openings + lost, "{served}, {lost} lost");
        // Two hosts may each be left with less than a request.
        assert!(told >= 120 - 2, "{told}");
        // A gateway that starts anew finds it used up.
        let late = gateway(&fleet, &redis, limits, ", first_share: 0");
        late.await_log("connected to the store");
        let refused = ask(&late);
        assert_eq!(refused.status, 429);
        assert_eq!(exhaust(&[&late]), 0);
    }
}

#[test]
fn parallel_requests_are_shared_and_slots_of_a_killed_gateway_come_back() {
    for binary in servers() {
        let (redis, fleet) = (Redis::start(binary, &[]), fleet("tokens=2000,pace=100,first=0"));
        let limits = "  - { name: slots, per: shared, parallel: 4 }";
        let mut gateways = gateways(&fleet, &redis, limits, ", first_share: 0");
        let begin = |gateway: &Gateway| {
            let mut client = Client::connect(gateway.addr());
            client.post(CHAT, &chat("fast", true));
            let head = client.receive_until(b"\r\n\r\n");
            head.starts_with(b"HTTP/1.1 200").then_some(client)
        };
        let victim = gateways.pop().expect("a gateway");
        let mut streams: Vec<_> = (0..4).map(|_| eventually("a slot", || begin(&victim))).collect();
        for gateway in &gateways {
            for _ in 0..3 {
                assert!(begin(gateway).is_none(), "all slots are taken");
            }
        }
        // One ends: its slot goes to whoever asks, on another host.
        drop(streams.pop());
        let one = eventually("the freed slot", || begin(&gateways[0]));
        assert!(begin(&gateways[1]).is_none());
        drop(victim.kill());
        let _others: Vec<_> = (0..3)
            .map(|_| eventually("a slot of the killed", || begin(&gateways[1])))
            .collect();
        assert!(begin(&gateways[0]).is_none());
        drop(one);
    }
}

#[test]
fn what_streams_and_answers_use_is_shared() {
    for binary in servers() {
        let (redis, fleet) = (Redis::start(binary, &[]), fleet("tokens=10,pace=0,first=0"));
        let limits = "  - { name: tokens, per: key, output_tokens: 3000, every: 1h, window: sliding }";
        let gateways = gateways(&fleet, &redis, limits, ", first_share: 0");
        let all: Vec<&Gateway> = gateways.iter().collect();
        let served = exhaust(&all);
        // Ten each; near the end the last requests find no room for what they might use.
        assert!(served <= 300, "{served}");
        assert!(served >= 300 - 3 * 4, "{served}");
        let refused = ask(&gateways[0]);
        assert!(refused.text().contains("tokens"), "{}", refused.text());
    }
}

#[test]
fn without_the_store_refuse_refuses_and_recovers() {
    for binary in servers() {
        let (mut redis, fleet) = (Redis::start(binary, &[]), fleet("tokens=2,pace=0,first=0"));
        let limits = "  - { name: all, per: shared, requests: 1000, every: 1h }";
        let gateway = gateway(&fleet, &redis, limits, ", on_store_loss: refuse");
        gateway.await_log("connected to the store");
        assert_eq!(ask(&gateway).status, 200);
        redis.kill();
        let refused = eventually("a refusal", || {
            Some(ask(&gateway)).filter(|answer| answer.status != 200)
        });
        assert_eq!(refused.status, 503);
        assert!(
            refused.text().contains("limit_store_unavailable"),
            "{}",
            refused.text()
        );
        assert_eq!(store_of(&gateway)["connected"], false);
        let status = gateway.admin("GET /status", "").json();
        assert!(status["degraded"].to_string().contains("store"), "{status}");
        let metrics = gateway.admin("GET /metrics", "").text();
        assert!(metrics.contains("\ngateway_store_connected 0\n"), "{metrics}");
        redis.restart();
        eventually("service", || (ask(&gateway).status == 200).then_some(()));
        assert_eq!(store_of(&gateway)["connected"], true);
    }
}

#[test]
fn without_the_store_local_goes_on_with_a_share() {
    for binary in servers() {
        let (redis, fleet) = (Redis::start(binary, &[]), fleet("tokens=2,pace=0,first=0"));
        let limits = "  - { name: all, per: shared, requests: 90, window: calendar, every: 1mo }";
        let gateways = gateways(&fleet, &redis, limits, ", first_share: 0");
        for gateway in &gateways {
            eventually("three hosts", || (store_of(gateway)["hosts"] == 3).then_some(()));
            eventually("a lease", || (ask(gateway).status == 200).then_some(()));
        }
        redis.signal(libc::SIGSTOP);
        for gateway in &gateways {
            gateway.await_log("the store is out of reach");
        }
        let all: Vec<&Gateway> = gateways.iter().collect();
        let served = 3 + exhaust(&all);
        // A third each, and what the leases held at the loss: at most an eighth each.
        assert!((87..=90 + 3 * 12).contains(&served), "{served}");
        redis.signal(libc::SIGCONT);
        for gateway in &gateways {
            eventually("the store", || {
                (store_of(gateway)["local_levels"] == 0).then_some(())
            });
        }
        // Nothing is forgotten and nothing counted twice. Who came back first may have leased what the last had used.
        await_used(&redis, served);
        let rest = exhaust(&all);
        await_used(&redis, served + rest);
        assert!(served + rest <= 90 + 3 * 12, "{served} and {rest}");
    }
}

#[test]
fn keys_and_budgets_made_on_one_gateway_are_everywhere() {
    for binary in servers() {
        let (mut redis, fleet) = (Redis::start(binary, &[]), fleet("tokens=2,pace=0,first=0"));
        let limits = "  - { name: all, per: shared, requests: 1000000, every: 1m }";
        let gateways = gateways(&fleet, &redis, limits, "");
        let status_with = |gateway: &Gateway, secret: &str| {
            let mut client = Client::connect(gateway.addr());
            let body = chat("fast", false);
            let length = body.len();
            client.send(format!(
                "POST {CHAT} HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {secret}\r\n\
                 content-length: {length}\r\n\r\n{body}"
            ));
            client.answer().status
        };
        let made = gateways[0].admin("POST /v1/keys", r#"{"name": "bob"}"#);
        assert_eq!(made.status, 201, "{}", made.text());
        let made = made.json();
        let secret = made["secret"].as_str().expect("a secret").to_owned();
        let id = made["key"]["id"].as_str().expect("an id").to_owned();
        for gateway in &gateways {
            eventually("the key", || (status_with(gateway, &secret) == 200).then_some(()));
        }
        let budget = r#"{"usd": "12.5", "every": "1mo"}"#;
        assert_eq!(gateways[1].admin("PUT /v1/budgets/key/bob", budget).status, 200);
        for gateway in &gateways {
            eventually("the budget", || {
                let shown = gateway.admin("GET /v1/budgets/key/bob", "");
                (shown.status == 200 && shown.text().contains("12.5")).then_some(())
            });
        }
        // The store loses everything and comes back: the hosts tell it again, also one that is new.
        redis.restart();
        let late = gateway(&fleet, &redis, limits, "");
        // The simulated model has no price, so a key with a budget is known and refused.
        eventually("the key on a new host", || {
            (status_with(&late, &secret) == 429).then_some(())
        });
        let revoked = late.admin(&format!("POST /v1/keys/{id}/revoke"), "");
        assert_eq!(revoked.status, 200, "{}", revoked.text());
        for gateway in &gateways {
            eventually("the revocation", || {
                (status_with(gateway, &secret) == 401).then_some(())
            });
        }
        let held = redis.ask(
            "EVAL \"return table.concat(redis.call('HVALS', redis.call('KEYS', '*documents*:items')[1]))\" 0",
        );
        let held = held.expect("an answer");
        assert!(
            held.contains("bob") && !held.contains(&secret),
            "no secret is in the store: {held}"
        );
    }
}
