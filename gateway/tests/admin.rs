//! Run-time administration against the built binary: keys, tokens, what survives a crash, and what is never shown.

mod support;

use std::{
    fs,
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
};

use gateway::ledger::record::Outcome;
use serde_json::{Value, json};
use support::{
    Gateway, KEY, Setup,
    client::{Answer, Client, chat},
    eventually, fleet, skipped,
};

/// A stream that does not end while a test lasts.
const ENDLESS: &str = "sim:tokens=1000000,pace=5ms,first=0";

/// Connections on which a key is tried: with several cores each gets some of them.
const CONNECTIONS: usize = 24;

fn setup(upstream: impl Into<String>) -> Setup {
    Setup::new(upstream).model("endless", ENDLESS)
}

fn request(client: &mut Client, secret: &str, model: &str, stream: bool) {
    let fields = format!("authorization: Bearer {secret}\r\n");
    client.post_with("/v1/chat/completions", &chat(model, stream), &fields);
}

/// What a request with this secret is answered.
fn status_with(gateway: &Gateway, secret: &str) -> u16 {
    let mut client = Client::connect(gateway.addr());
    request(&mut client, secret, "fast", false);
    client.answer().status
}

/// Runs a command of the binary and reads what it prints as JSON.
fn command(gateway: &Gateway, arguments: &[&str]) -> Value {
    let admin = gateway.admin.to_string();
    let arguments: Vec<&str> = arguments
        .iter()
        .copied()
        .chain(["--json", "--admin", &admin])
        .collect();
    let output = gateway.command(&arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {errors}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn text(value: &Value) -> String {
    value
        .as_str()
        .unwrap_or_else(|| panic!("no text: {value}"))
        .to_owned()
}

fn create(gateway: &Gateway, body: Value) -> Answer {
    gateway.admin("POST /v1/keys", &body.to_string())
}

/// A new key's id and secret.
fn created(gateway: &Gateway, name: &str) -> (String, String) {
    let answer = create(gateway, json!({ "name": name }));
    assert_eq!(answer.status, 201, "{}", answer.text());
    (text(&answer.json()["key"]["id"]), text(&answer.json()["secret"]))
}

fn with_token(gateway: &Gateway, token: &str, line: &str, body: &str) -> Answer {
    let mut client = Client::connect(gateway.admin);
    let length = body.len();
    client.send(format!(
        "{line} HTTP/1.1\r\nhost: admin\r\nauthorization: Bearer {token}\r\ncontent-length: {length}\r\n\r\n{body}"
    ));
    client.answer()
}

fn assert_nowhere(directory: &Path, secrets: &[String]) {
    for entry in fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            assert_nowhere(&path, secrets);
            continue;
        }
        let bytes = fs::read(&path).unwrap_or_default();
        for secret in secrets {
            let found = memchr::memmem::find(&bytes, secret.as_bytes());
            assert!(found.is_none(), "a secret is in {}", path.display());
        }
    }
}

#[test]
fn a_key_lives_from_the_command_line_to_its_end() {
    let fleet = fleet("tokens=2,pace=0,first=0");
    let setup = setup(fleet.url());
    let config = setup.workers(3, "auto").config();
    let gateway = Gateway::start(&config);
    let on_all_cores = |secret: &str, status: u16| {
        // A refusal closes its connection, so each try has new ones.
        let mut open: Vec<Client> = (0..CONNECTIONS)
            .map(|_| Client::connect(gateway.addr()))
            .collect();
        open.iter_mut()
            .for_each(|client| request(client, secret, "fast", false));
        for client in &mut open {
            assert_eq!(client.answer().status, status);
        }
    };
    let made = command(
        &gateway,
        &[
            "keys",
            "create",
            "--name",
            "bob",
            "--models",
            "fast",
            "--metadata",
            "who=Bob",
        ],
    );
    let first = text(&made["secret"]);
    on_all_cores(&first, 200);

    let rotated = command(&gateway, &["keys", "rotate", "bob", "--overlap", "1h"]);
    let second = text(&rotated["secret"]);
    on_all_cores(&first, 200);
    on_all_cores(&second, 200);
    let third = text(&command(&gateway, &["keys", "rotate", "bob"])["secret"]);
    on_all_cores(&first, 401);
    on_all_cores(&second, 401);
    on_all_cores(&third, 200);

    command(&gateway, &["keys", "update", "bob", "--disable"]);
    on_all_cores(&third, 401);
    command(
        &gateway,
        &["keys", "update", "bob", "--enable", "--networks", "192.0.2.0/24"],
    );
    on_all_cores(&third, 403);
    let shown = command(&gateway, &["keys", "update", "bob", "--clear", "networks,models"]);
    assert_eq!(shown["metadata"]["who"], "Bob");
    on_all_cores(&third, 200);
    let list = gateway.command(&["keys", "list", "--admin", &gateway.admin.to_string()]);
    let list = String::from_utf8_lossy(&list.stdout).into_owned();
    assert!(list.contains("alice") && list.contains("bob"), "{list}");

    let revoked = command(&gateway, &["keys", "revoke", "bob"]);
    on_all_cores(&third, 401);
    assert_eq!(revoked["state"], "revoked");
    assert!(revoked["last_used_at"].is_string(), "{revoked}");
    command(&gateway, &["keys", "delete", "bob"]);
    on_all_cores(KEY, 200);

    let secrets = [first, second, third];
    let directory = gateway.kill();
    assert_nowhere(directory.path(), &secrets);
    let gateway = Gateway::start_in(directory, &config);
    for secret in &secrets {
        assert_eq!(status_with(&gateway, secret), 401);
    }
    let audit = gateway.admin("GET /v1/audit", "").text();
    let log = gateway.log();
    for secret in &secrets {
        assert!(!audit.contains(secret.as_str()) && !log.contains(secret.as_str()));
    }
}

#[test]
fn streams_of_a_revoked_key_are_ended_or_finish() {
    let fleet = fleet("tokens=2,pace=0,first=0");
    let gateway = setup(fleet.url()).start();
    let begin = |secret: &str, model: &str| {
        let mut client = Client::connect(gateway.addr());
        request(&mut client, secret, model, true);
        client.receive_until(b"\"content\"");
        client
    };
    let (id, secret) = created(&gateway, "ends");
    let mut stream = begin(&secret, "endless");
    // A change of the key in the meantime does not hide the stream from the revocation.
    let patched = gateway.admin(&format!("PATCH /v1/keys/{id}"), r#"{"tags": ["changed"]}"#);
    assert_eq!(patched.status, 200, "{}", patched.text());
    assert_eq!(
        gateway.admin(&format!("POST /v1/keys/{id}/revoke"), "").status,
        200
    );
    let rest = String::from_utf8(stream.rest().expect("a proper end")).expect("text");
    assert!(
        rest.contains("key_revoked"),
        "{}",
        &rest[rest.len().saturating_sub(400)..]
    );
    assert!(!rest.contains("[DONE]"));
    let records = gateway.await_records(1);
    assert_eq!((&*records[0].key, records[0].outcome), ("ends", Outcome::Stopped));

    let (id, secret) = created(&gateway, "finishes");
    let mut stream = begin(&secret, "endless");
    let answer = gateway.admin(&format!("POST /v1/keys/{id}/revoke"), r#"{"running": "finish"}"#);
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(status_with(&gateway, &secret), 401);
    for _ in 0..40 {
        stream.receive_until(b"\"content\"");
    }
    let (_, other) = created(&gateway, "another");
    let mut third = begin(&other, "endless");
    let (id, _) = created(&gateway, "ended");
    gateway.admin(&format!("DELETE /v1/keys/{id}"), "");
    for _ in 0..40 {
        stream.receive_until(b"\"content\"");
        third.receive_until(b"\"content\"");
    }
}

#[test]
fn what_was_answered_survives_a_kill() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let setup = setup(fleet.url());
    let mut gateway = setup.start();
    let mut good: Vec<(String, String)> = Vec::new();
    let mut ended: Vec<String> = Vec::new();
    for round in 0..3 {
        let (answered, ends, stop) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicBool::new(false));
        let admin = gateway.admin;
        let token = fs::read_to_string(gateway.state().join("admin.token")).expect("a token");
        // Changes until the process is killed under them; what had an answer is noted.
        let (made, revoked) = thread::scope(|scope| {
            let worker = |thread: usize| {
                let (answered, ends, stop, token) = (&answered, &ends, &stop, token.trim().to_owned());
                move || {
                    let (mut made, mut revoked) = (Vec::new(), Vec::new());
                    let Ok(mut client) = Client::try_connect(admin, None) else {
                        return (made, revoked);
                    };
                    let mut ask = |line: &str, body: &str| {
                        let length = body.len();
                        let head = format!("{line} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {token}\r\n");
                        client
                            .try_send(format!("{head}content-length: {length}\r\n\r\n{body}"))
                            .ok()?;
                        client.try_answer().ok()
                    };
                    for n in 0.. {
                        let body = format!(r#"{{"name": "k-{round}-{thread}-{n}"}}"#);
                        let Some(answer) = ask("POST /v1/keys", &body) else {
                            break;
                        };
                        assert_eq!(answer.status, 201, "{}", answer.text());
                        let key = answer.json();
                        let (id, secret) = (text(&key["key"]["id"]), text(&key["secret"]));
                        answered.fetch_add(1, Ordering::Relaxed);
                        if n % 3 != 0 {
                            made.push((id, secret));
                        } else if ask(&format!("POST /v1/keys/{id}/revoke"), "")
                            .is_some_and(|a| a.status == 200)
                        {
                            ends.fetch_add(1, Ordering::Relaxed);
                            revoked.push(secret);
                        }
                        if stop.load(Ordering::Relaxed) && n > 10_000 {
                            break;
                        }
                    }
                    (made, revoked)
                }
            };
            let workers: Vec<_> = (0..4).map(|thread| scope.spawn(worker(thread))).collect();
            eventually("some changes", || {
                (answered.load(Ordering::Relaxed) > 30 && ends.load(Ordering::Relaxed) > 5).then_some(())
            });
            gateway.signal(libc::SIGKILL);
            stop.store(true, Ordering::Relaxed);
            let results: Vec<_> = workers
                .into_iter()
                .map(|worker| worker.join().expect("no panic"))
                .collect();
            results
                .into_iter()
                .fold((Vec::new(), Vec::new()), |mut all, (made, revoked)| {
                    all.0.extend(made);
                    all.1.extend(revoked);
                    all
                })
        });
        good.extend(made);
        ended.extend(revoked);
        gateway = Gateway::start_in(gateway.kill(), &setup.config());
        let mut client = Client::connect(gateway.addr());
        for (id, secret) in &good {
            request(&mut client, secret, "fast", false);
            assert_eq!(client.answer().status, 200, "{id} was made and answered");
        }
        for secret in &ended {
            // Refusals may close the connection.
            assert_eq!(
                status_with(&gateway, secret),
                401,
                "a key was revoked and answered"
            );
        }
    }
}

#[test]
fn changes_under_load_leave_other_keys_alone() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let config = setup(fleet.url()).workers(2, "auto").config();
    let gateway = Gateway::start(&config);
    let (_, steady) = created(&gateway, "steady");
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let mut client = Client::connect(gateway.addr());
                while !stop.load(Ordering::Relaxed) {
                    request(&mut client, &steady, "fast", false);
                    assert_eq!(client.answer().status, 200);
                }
            });
        }
        let changers: Vec<_> = (0..3)
            .map(|thread| {
                let gateway = &gateway;
                scope.spawn(move || {
                    for n in 0..15 {
                        let (id, secret) = created(gateway, &format!("c-{thread}-{n}"));
                        assert_eq!(status_with(gateway, &secret), 200);
                        assert_eq!(
                            gateway.admin(&format!("POST /v1/keys/{id}/revoke"), "").status,
                            200
                        );
                        assert_eq!(status_with(gateway, &secret), 401);
                    }
                })
            })
            .collect();
        let results: Vec<_> = changers.into_iter().map(|changer| changer.join()).collect();
        stop.store(true, Ordering::Relaxed);
        assert!(results.iter().all(Result::is_ok));
    });
    let reloaded = gateway.reload(&config);
    assert!(reloaded.contains("configuration reloaded"), "{reloaded}");
    assert_eq!(
        status_with(&gateway, &steady),
        200,
        "a reload keeps run-time keys"
    );
}

#[test]
fn an_expiry_comes_by_itself() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let gateway = setup(fleet.url()).start();
    let answer = create(&gateway, json!({ "name": "brief", "expires_in": "1500ms" }));
    let secret = text(&answer.json()["secret"]);
    assert_eq!(status_with(&gateway, &secret), 200);
    eventually("the key's end", || {
        (status_with(&gateway, &secret) == 401).then_some(())
    });
    let past = create(
        &gateway,
        json!({ "name": "past", "expires_at": "2001-01-01T00:00:00Z" }),
    );
    let mut client = Client::connect(gateway.addr());
    request(&mut client, &text(&past.json()["secret"]), "fast", false);
    assert_eq!(client.answer().json()["error"]["code"], "key_expired");
    let expired = gateway.admin("GET /v1/keys?state=expired", "").json();
    assert_eq!(expired["data"].as_array().map(Vec::len), Some(2));
}

#[test]
fn limits_of_the_file_bind_run_time_keys() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let setup = setup(fleet.url()).limits("  - { requests: 2, every: 1h }");
    let gateway = setup.start();
    let (_, secret) = created(&gateway, "bound");
    let statuses: Vec<u16> = (0..3).map(|_| status_with(&gateway, &secret)).collect();
    assert_eq!(statuses, [200, 200, 429]);
    gateway.reload(&setup.config());
    assert_eq!(
        status_with(&gateway, &secret),
        429,
        "what was used stays used over a reload"
    );
}

#[test]
fn tokens_follow_a_reload_and_viewers_only_look() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let base = setup(fleet.url()).config();
    let with = |tokens: &str| {
        base.replace(
            "admin: { address: \"127.0.0.1:0\" }",
            &format!("admin: {{ address: \"127.0.0.1:0\", token: first-admin-token, tokens: [{tokens}] }}"),
        )
    };
    let eve = "{ name: eve, token: eve-may-look-at-it }";
    let gateway = Gateway::start(&with(eve));
    let status = |token: &str, line: &str, body: &str| with_token(&gateway, token, line, body).status;
    assert_eq!(status("first-admin-token", "GET /v1/keys", ""), 200);
    assert_eq!(status("eve-may-look-at-it", "GET /v1/keys", ""), 200);
    assert_eq!(
        status("eve-may-look-at-it", "POST /v1/keys", r#"{"name": "x"}"#),
        403
    );
    assert_eq!(status("eve-may-look-at-it", "POST /reload", ""), 403);

    let ops = "{ name: ops, token: ops-may-do-everything, role: admin }";
    let changed = with(ops).replace("first-admin-token", "second-admin-token");
    let outcome = gateway.reload(&changed);
    assert!(outcome.contains("configuration reloaded"), "{outcome}");
    for gone in ["first-admin-token", "eve-may-look-at-it"] {
        assert_eq!(status(gone, "GET /v1/keys", ""), 401);
    }
    assert_eq!(status("second-admin-token", "GET /v1/keys", ""), 200);
    assert_eq!(
        status("ops-may-do-everything", "POST /v1/keys", r#"{"name": "x"}"#),
        201
    );
    let audit = with_token(&gateway, "second-admin-token", "GET /v1/audit", "").json();
    assert_eq!(audit["data"][0]["by"], "ops");
    let log = gateway.log();
    for token in ["first-admin-token", "second-admin-token", "ops-may-do-everything"] {
        assert!(!log.contains(token));
    }
}

#[test]
fn garbage_is_refused_and_harms_nothing() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let gateway = setup(fleet.url()).start();
    let (id, secret) = created(&gateway, "kept");
    let deep = "[".repeat(30_000);
    let huge = format!(r#"{{"name": "{}"}}"#, "x".repeat(100_000));
    for body in [
        "",
        "null",
        "\"x\"",
        "{",
        "\u{0}",
        &deep,
        &huge,
        r#"{"name": 1}"#,
        r#"{"name": "a\u0000b"}"#,
    ] {
        for line in [
            "POST /v1/keys",
            &format!("PATCH /v1/keys/{id}"),
            "PUT /v1/budgets/gateway/all",
            "POST /v1/teams",
        ] {
            let answer = gateway.admin(line, body);
            assert!((400..500).contains(&answer.status), "{line}: {}", answer.status);
        }
    }
    for path in [
        "/v1/keys/%ff",
        "/v1/keys/..%2f..",
        "/v1/teams/%00",
        "/v1/budgets/team/%F0%9F%92%A9",
    ] {
        let answer = gateway.admin(&format!("GET {path}"), "");
        assert!((400..500).contains(&answer.status), "{path}: {}", answer.status);
    }
    assert_eq!(status_with(&gateway, &secret), 200);
    let keys = gateway.admin("GET /v1/keys", "").json();
    assert_eq!(keys["data"].as_array().map(Vec::len), Some(2), "{keys}");
}

#[test]
fn budgets_are_set_topped_up_and_deleted_from_the_command_line() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let gateway = setup(fleet.url()).start();
    let set = command(&gateway, &["budgets", "set", "key", "alice"]);
    assert_eq!(set["credit_usd"], "0");
    for _ in 0..2 {
        let added = command(
            &gateway,
            &["budgets", "topup", "key", "alice", "2.5", "--reference", "a"],
        );
        assert_eq!(added["credit_usd"], "2.5", "once for each reference");
    }
    let gateway = Gateway::start_in(gateway.kill(), &setup(fleet.url()).config());
    let list = command(&gateway, &["budgets", "list"]);
    assert_eq!(list[0]["credit_usd"], "2.5");
    command(&gateway, &["budgets", "delete", "key", "alice"]);
    assert_eq!(command(&gateway, &["budgets", "list"]), json!([]));
}

#[test]
fn the_document_is_valid_by_a_validator_of_others() {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/venv/bin/python");
    let probe = Command::new(&python)
        .args(["-c", "import openapi_spec_validator"])
        .output();
    if !probe.is_ok_and(|output| output.status.success()) {
        return skipped(
            "openapi",
            "openapi-spec-validator is not in target/venv (tests/setup.sh)",
        );
    }
    let fleet = fleet("tokens=1,pace=0,first=0");
    let gateway = setup(fleet.url()).start();
    let path = gateway.dir().join("openapi.json");
    fs::write(&path, gateway.admin("GET /openapi.json", "").text()).expect("a file");
    let output = Command::new(&python)
        .args(["-m", "openapi_spec_validator"])
        .arg(&path)
        .output()
        .expect("python");
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

#[test]
fn a_budget_is_in_force_at_once_and_over_a_restart() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let setup = setup(fleet.url());
    let gateway = setup.start();
    assert_eq!(status_with(&gateway, KEY), 200);
    // Prepaid, and nothing paid: nothing may be spent.
    assert_eq!(gateway.admin("PUT /v1/budgets/key/alice", "{}").status, 200);
    assert_ne!(status_with(&gateway, KEY), 200);
    let (_, other) = created(&gateway, "other");
    assert_eq!(status_with(&gateway, &other), 200, "another key's budget");
    let gateway = Gateway::start_in(gateway.kill(), &setup.config());
    assert_ne!(status_with(&gateway, KEY), 200);
    assert_eq!(gateway.admin("DELETE /v1/budgets/key/alice", "").status, 204);
    assert_eq!(status_with(&gateway, KEY), 200);
}

#[test]
fn budgets_of_the_file_are_listed_with_how_they_stand() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let mut setup = setup(fleet.url());
    setup.more += "budget: { usd: 100, every: 1mo, alerts: [50%, 150%], unpriced: allow }\n";
    let gateway = setup.start();
    command(
        &gateway,
        &["budgets", "set", "key", "alice", "--usd", "3", "--every", "1d"],
    );
    let list = command(&gateway, &["budgets", "list"]);
    let of = |name: &str| {
        let found = list
            .as_array()
            .expect("a list")
            .iter()
            .find(|one| one["name"] == name);
        found.unwrap_or_else(|| panic!("{name} in {list}")).clone()
    };
    let all = of("all");
    assert_eq!(
        [
            &all["source"],
            &all["usd"],
            &all["every"],
            &all["left_usd"],
            &all["spent_usd"]
        ],
        ["file", "100", "1mo", "100", "0"]
    );
    assert_eq!(all["alerts"], json!([50, 150]));
    assert_eq!(all["alerts_told"], json!([]));
    assert!(all["resets_at"].is_string(), "{all}");
    assert_eq!(of("alice")["source"], "runtime");
    let page = gateway.admin("GET /v1/budgets?limit=1", "").json();
    let next = page["next"].as_str().expect("another page");
    assert_eq!(page["data"][0]["name"], "alice");
    let page = gateway
        .admin(&format!("GET /v1/budgets?limit=1&after={next}"), "")
        .json();
    assert_eq!(
        (&page["data"][0]["name"], &page["next"]),
        (&json!("all"), &Value::Null)
    );
    // One made at run time takes the place of the file's.
    assert_eq!(
        gateway
            .admin("PUT /v1/budgets/gateway/all", r#"{"usd":"7","every":"1mo"}"#)
            .status,
        200
    );
    let list = command(&gateway, &["budgets", "list", "--scope", "gateway"]);
    assert_eq!(list.as_array().expect("a list").len(), 1);
    assert_eq!([&list[0]["source"], &list[0]["usd"]], ["runtime", "7"]);
}

#[test]
fn reloads_are_in_the_audit_log_whoever_asked_for_them() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let gateway = setup(fleet.url()).start();
    assert_eq!(gateway.admin("POST /reload", "").status, 200);
    gateway.signal(libc::SIGHUP);
    let reloads = eventually("both reloads", || {
        let log = gateway.admin("GET /v1/audit", "").json();
        let entries = log["data"].as_array().expect("a list").clone();
        let reloads: Vec<Value> = entries
            .into_iter()
            .filter(|entry| entry["action"] == "reload")
            .collect();
        (reloads.len() == 2).then_some(reloads)
    });
    assert_eq!([&reloads[0]["by"], &reloads[1]["by"]], ["signal", "admin"]);
    for entry in reloads {
        let done = entry["detail"]["done"].as_str().unwrap_or_default();
        assert!(done.starts_with("reloaded, generation "), "{entry}");
    }
}

#[test]
fn a_key_has_limits_of_its_own_and_they_are_shown() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let setup = setup(fleet.url())
        .limits("  - { name: all, requests: 100, every: 1h, per: shared }\n  - { match: { model: endless }, requests: 9, every: 1m, per: user }");
    let gateway = setup.start();
    let arguments = [
        "keys",
        "create",
        "--name",
        "batch",
        "--limit",
        "requests=2,every=1h",
    ];
    let made = command(&gateway, &arguments);
    let secret = made["secret"].as_str().expect("a secret");
    assert_eq!(made["key"]["limits"], json!([{ "requests": 2, "every": "1h" }]));
    assert_eq!(
        [200, 200, 429].map(|_| status_with(&gateway, secret)),
        [200, 200, 429]
    );
    let limits = command(&gateway, &["limits", "--key", "batch"]);
    let left = |place: usize| limits[place]["standing"]["left"].clone();
    assert_eq!(limits.as_array().map(Vec::len), Some(3), "{limits}");
    assert_eq!(
        (left(0), left(1), left(2)),
        (json!("98"), Value::Null, json!("0"))
    );
    assert_eq!(limits[2]["source"], "key");
    let fast = command(&gateway, &["limits", "--key", "batch", "--model", "fast"]);
    assert_eq!(fast.as_array().map(Vec::len), Some(2), "{fast}");
    assert_eq!(command(&gateway, &["limits"]).as_array().map(Vec::len), Some(2));
    // The share that was used stays used under another amount, and over a restart; without the limit nothing binds.
    command(
        &gateway,
        &["keys", "update", "batch", "--limit", "requests=3,every=1h"],
    );
    assert_eq!(status_with(&gateway, secret), 429);
    let gateway = Gateway::start_in(gateway.kill(), &setup.config());
    assert_eq!(status_with(&gateway, secret), 429);
    command(&gateway, &["keys", "update", "batch", "--clear", "limits"]);
    assert_eq!(status_with(&gateway, secret), 200);
    let wrong = gateway.admin("POST /v1/keys", r#"{"name":"x","limits":[{"requests":1}]}"#);
    assert_eq!(wrong.status, 400, "{}", wrong.text());
    assert_eq!(gateway.admin("GET /v1/limits?key=nobody", "").status, 404);
}
