//! The admin API over a real socket.

use std::{path::Path, sync::Mutex};

use arc_swap::ArcSwap;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::oneshot,
};

use super::*;
use crate::{
    config::Config,
    control::{
        access::{Access, Names},
        plane::Inner,
        store::{self, Store},
    },
    core::Shared,
    serve::snapshot::{Registry, Snapshot},
};

mod budgets;
mod keys;

const TOKEN: &str = "s3cret";

/// Remembers what it was told; its store is a real one.
struct Fake {
    calls: Mutex<Vec<String>>,
    directory: Directory,
    _state: tempfile::TempDir,
}

const CONFIG: &str = "
listeners: [{ address: '127.0.0.1:0' }]
admin: { token: s3cret, tokens: [{ name: eve, token: eve-looks-at-everything }] }
providers: { p: { kind: openai } }
models: [{ name: fast, targets: [{ provider: p }] }]
teams: [{ name: search }]
keys: [{ name: filed, sha256: ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad, team: search }]
";

fn config() -> Config {
    crate::config::parse(CONFIG, "test", Path::new("/"), &|_| None).expect("a configuration")
}

impl Fake {
    fn new() -> Fake {
        let state = tempfile::tempdir().expect("directory");
        let config = config();
        let mut registry = Registry::default();
        let snapshot = Snapshot::build(&config, &mut registry).expect("a snapshot");
        let shared = Arc::new(Shared::new(snapshot, 1));
        let names = Arc::new(ArcSwap::from_pointee(Names::new(&config)));
        let inner = Arc::new(Mutex::new(Inner { config, registry }));
        let db = store::open(state.path()).expect("a database");
        let access = Access::load(&db, shared.clone(), inner).expect("loaded");
        let store = Store::start(db, access).expect("a store");
        Fake {
            calls: Mutex::default(),
            directory: Directory { store, names, shared },
            _state: state,
        }
    }
}

impl Fake {
    fn note(&self, call: String) {
        self.calls.lock().expect("calls").push(call);
    }
}

impl Plane for Fake {
    fn status(&self) -> BoxFuture<'_, Value> {
        Box::pin(async { json!({ "state": "running" }) })
    }
    fn metrics(&self) -> BoxFuture<'_, String> {
        Box::pin(async { "gateway_up 1\n".to_owned() })
    }
    fn reload(&self) -> Result<String, String> {
        self.note("reload".into());
        Err("line 3: unknown field `modles`".into())
    }
    fn kernel_status(&self) -> Value {
        json!({ "loaded": false })
    }
    fn kernel_clients(&self, max: usize) -> Result<Value, String> {
        self.note(format!("clients {max}"));
        Ok(json!([]))
    }
    fn kernel_block(&self, target: Target, hold: Duration) -> Result<IpNet, String> {
        let net = target.net(IpNet::from);
        self.note(format!("block {net} {}", hold.as_secs()));
        match net.addr().is_loopback() {
            true => Err("exempt".into()),
            false => Ok(net),
        }
    }
    fn kernel_unblock(&self, target: Target) -> Result<(IpNet, bool), String> {
        let net = target.net(IpNet::from);
        self.note(format!("unblock {net}"));
        Ok((net, true))
    }
    fn directory(&self) -> &Directory {
        &self.directory
    }
}

/// An answer: its status, its whole head and its body.
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).expect("a JSON body")
    }
}

struct Server {
    address: SocketAddr,
    plane: Arc<Fake>,
}

impl Server {
    async fn raw(&self, request: &str) -> Answer {
        let mut stream = TcpStream::connect(self.address).await.expect("connect");
        stream.write_all(request.as_bytes()).await.expect("send");
        let mut text = String::new();
        stream.read_to_string(&mut text).await.expect("answer");
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        Answer {
            status: status.expect("a status"),
            head: head.to_ascii_lowercase(),
            body: body.to_owned(),
        }
    }

    async fn ask(&self, line: &str, body: &str) -> Answer {
        self.raw(&format!(
            "{line} HTTP/1.1\r\nhost: gateway\r\nconnection: close\r\nauthorization: Bearer {TOKEN}\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        ))
        .await
    }
}

/// Runs a test against a server, and then sees it end.
fn with_server(test: impl AsyncFnOnce(&Server)) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("runtime");
    runtime.block_on(async {
        let listener = bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("bind");
        let server = Server {
            address: listener.local_addr().expect("address"),
            plane: Arc::new(Fake::new()),
        };
        let listener = TcpListener::from_std(listener).expect("listener");
        let (stop, stopped) = oneshot::channel::<()>();
        let guard = Arc::new(Guard::new(&config()).expect("tokens"));
        let serving = serve(listener, server.plane.clone(), guard, async {
            let _ = stopped.await;
        });
        let testing = async {
            test(&server).await;
            stop.send(()).expect("serving");
        };
        tokio::join!(serving, testing);
        assert!(
            TcpStream::connect(server.address).await.is_err(),
            "nothing listens any more"
        );
    });
}

#[test]
fn only_health_goes_without_the_token() {
    with_server(async |server| {
        let close = "host: gateway\r\nconnection: close\r\n";
        let health = server.raw(&format!("GET /healthz HTTP/1.1\r\n{close}\r\n")).await;
        assert_eq!((health.status, health.body.as_str()), (200, "ok\n"));
        for path in ["/metrics", "/status", "/kernel", "/no-such-path"] {
            for wrong in [
                "",
                "authorization: Bearer wrong\r\n",
                "authorization: Bearer \r\n",
                "authorization: Basic s3cret\r\n",
            ] {
                let answer = server
                    .raw(&format!("GET {path} HTTP/1.1\r\n{close}{wrong}\r\n"))
                    .await;
                assert_eq!(answer.status, 401, "{path} {wrong}");
                assert_eq!(answer.json()["error"]["code"], "unauthorized");
                assert!(
                    answer.head.contains("www-authenticate: bearer"),
                    "{}",
                    answer.head
                );
            }
        }
        let answer = server
            .raw(&format!(
                "POST /reload HTTP/1.1\r\n{close}content-length: 0\r\n\r\n"
            ))
            .await;
        assert_eq!(answer.status, 401);
        assert!(server.plane.calls.lock().expect("calls").is_empty());
    });
}

#[test]
fn state_and_metrics_are_shown() {
    with_server(async |server| {
        let metrics = server.ask("GET /metrics", "").await;
        assert_eq!((metrics.status, metrics.body.as_str()), (200, "gateway_up 1\n"));
        assert!(
            metrics.head.contains("text/plain; version=0.0.4"),
            "{}",
            metrics.head
        );
        assert_eq!(server.ask("GET /status", "").await.json()["state"], "running");
        assert_eq!(server.ask("GET /kernel", "").await.json()["loaded"], false);
    });
}

#[test]
fn a_refused_reload_says_why() {
    with_server(async |server| {
        let answer = server.ask("POST /reload", "").await;
        assert_eq!(answer.status, 422);
        assert_eq!(
            answer.json()["error"]["message"],
            "line 3: unknown field `modles`"
        );
        assert_eq!(server.ask("GET /reload", "").await.status, 405);
        let log = server.ask("GET /v1/audit", "").await.json();
        let entry = &log["data"][0];
        assert_eq!(
            [&entry["by"], &entry["action"], &entry["kind"], &entry["detail"]],
            [
                &json!("admin"),
                &json!("reload"),
                &json!("configuration"),
                &json!({ "refused": "line 3: unknown field `modles`" })
            ]
        );
    });
}

#[test]
fn clients_are_blocked_and_unblocked() {
    with_server(async |server| {
        let block = server
            .ask("POST /kernel/block", r#"{"client": "203.0.113.7", "for": "1h"}"#)
            .await;
        assert_eq!(
            (block.status, block.json()["seconds"].as_u64()),
            (200, Some(3600))
        );
        let mapped = r#"{"client": "::ffff:203.0.113.8"}"#;
        assert_eq!(
            server.ask("POST /kernel/block", mapped).await.json()["seconds"],
            600
        );
        let exempt = server
            .ask("POST /kernel/block", r#"{"client": "127.0.0.1"}"#)
            .await;
        assert_eq!(
            (exempt.status, &exempt.json()["error"]["message"]),
            (409, &json!("exempt"))
        );
        let unblock = server
            .ask("POST /kernel/unblock", r#"{"client": "2001:db8::1"}"#)
            .await;
        assert_eq!(unblock.json()["was_blocked"], true);
        let net = r#"{"client": "198.51.100.7/24", "for": "1m"}"#;
        let net = server.ask("POST /kernel/block", net).await;
        assert_eq!(net.json()["net"], "198.51.100.0/24");
        assert_eq!(server.ask("GET /kernel/clients?max=7", "").await.status, 200);
        let wrong = server.ask("GET /kernel/clients?max=no", "").await;
        assert_eq!(
            (wrong.status, &wrong.json()["error"]["code"]),
            (400, &json!("bad_request"))
        );
        let calls = server.plane.calls.lock().expect("calls").clone();
        let wanted = [
            "block 203.0.113.7/32 3600",
            "block 203.0.113.8/32 600",
            "block 127.0.0.1/32 600",
            "unblock 2001:db8::1/128",
            "block 198.51.100.0/24 60",
            "clients 7",
        ];
        assert_eq!(calls, wanted);
        let audit = server.ask("GET /v1/audit", "").await.json();
        let entries = audit["data"].as_array().expect("a list");
        let noted: Vec<(&str, &str, &str)> = entries
            .iter()
            .map(|entry| ["by", "action", "name"].map(|field| entry[field].as_str().expect("text")))
            .map(|[by, action, name]| (by, action, name))
            .collect();
        let wanted = [
            ("admin", "block", "198.51.100.0/24"),
            ("admin", "unblock", "2001:db8::1/128"),
            ("admin", "block", "203.0.113.8/32"),
            ("admin", "block", "203.0.113.7/32"),
        ];
        assert_eq!(noted, wanted, "what was refused is not there");
        assert_eq!(entries[3]["detail"]["seconds"], 3600);
    });
}

#[test]
fn what_is_not_understood_changes_nothing() {
    with_server(async |server| {
        for body in [
            "",
            "[]",
            r#"{"client": "example.org"}"#,
            r#"{"client": "203.0.113.0/33"}"#,
            r#"{"client": "203.0.113.7", "for": "soon"}"#,
            r#"{"client": "203.0.113.7", "for": "999ms"}"#,
            r#"{"client": "203.0.113.7", "for": "31d"}"#,
            r#"{"client": "203.0.113.7", "four": "1h"}"#,
        ] {
            let answer = server.ask("POST /kernel/block", body).await;
            assert_eq!(
                (answer.status, &answer.json()["error"]["code"]),
                (400, &json!("bad_request")),
                "{body}"
            );
        }
        let large = format!("{{\"client\": \"{}\"}}", "1".repeat(BODY_BYTES_MAX));
        assert_eq!(server.ask("POST /kernel/block", &large).await.status, 413);
        assert!(server.plane.calls.lock().expect("calls").is_empty());
    });
}

#[test]
fn a_full_house_goes_on_when_someone_leaves() {
    with_server(async |server| {
        let mut idle = Vec::new();
        for _ in 0..CONNECTIONS_MAX {
            idle.push(TcpStream::connect(server.address).await.expect("connect"));
        }
        let asked = server.ask("GET /status", "");
        let mut asked = pin!(asked);
        let early = tokio::time::timeout(Duration::from_millis(50), asked.as_mut()).await;
        assert!(early.is_err(), "there was no room");
        idle.pop();
        assert_eq!(asked.await.status, 200);
    });
}

#[test]
fn a_viewer_looks_and_changes_nothing() {
    with_server(async |server| {
        let as_eve = async |line: &str, body: &str| {
            server
                .raw(&format!(
                    "{line} HTTP/1.1\r\nhost: gateway\r\nconnection: close\r\n\
                     authorization: Bearer eve-looks-at-everything\r\ncontent-length: {}\r\n\r\n{body}",
                    body.len()
                ))
                .await
        };
        for path in [
            "/status",
            "/v1/keys",
            "/v1/teams",
            "/v1/budgets",
            "/v1/audit",
            "/openapi.json",
        ] {
            assert_eq!(as_eve(&format!("GET {path}"), "").await.status, 200, "{path}");
        }
        for line in [
            "POST /reload",
            "POST /kernel/block",
            "POST /v1/keys",
            "PATCH /v1/keys/x",
            "DELETE /v1/keys/x",
            "POST /v1/keys/x/revoke",
            "PUT /v1/budgets/gateway/all",
            "POST /nowhere",
        ] {
            let answer = as_eve(line, "{}").await;
            assert_eq!(
                (answer.status, answer.json()["error"]["code"].as_str()),
                (403, Some("forbidden")),
                "{line}"
            );
        }
        assert!(server.plane.calls.lock().expect("calls").is_empty());
    });
}

#[test]
fn the_document_has_every_route_and_every_reference_leads_somewhere() {
    with_server(async |server| {
        let document = server.ask("GET /openapi.json", "").await.json();
        assert_eq!(document["openapi"], "3.1.0");
        let mut operations = Vec::new();
        for (path, methods) in document["paths"].as_object().expect("paths") {
            for (method, operation) in methods.as_object().expect("methods") {
                operations.push(operation["operationId"].as_str().expect("an id").to_owned());
                // What is described is served: nothing answers 404 for want of a route, nor 405.
                let path = path
                    .replace("{scope}", "team")
                    .replace("{id}", "x")
                    .replace("{name}", "x");
                let answer = server.ask(&format!("{} {path}", method.to_uppercase()), "").await;
                assert_ne!(answer.status, 405, "{method} {path}");
                assert!(!answer.body.contains("no such path"), "{method} {path}");
            }
        }
        assert!(operations.len() >= 26, "{operations:?}");
        let mut unique = operations.clone();
        unique.sort();
        unique.dedup();
        assert_eq!(unique.len(), operations.len());
        check_references(&document, &document);
    });
}

fn check_references(value: &Value, document: &Value) {
    match value {
        Value::Object(fields) => {
            if let Some(to) = fields.get("$ref").and_then(Value::as_str) {
                let pointer = to.strip_prefix('#').expect("within the document");
                assert!(document.pointer(pointer).is_some(), "{to}");
            }
            fields
                .values()
                .for_each(|field| check_references(field, document));
        }
        Value::Array(items) => items.iter().for_each(|item| check_references(item, document)),
        _ => {}
    }
}
