//! Keys made at run time.

use super::*;

#[test]
fn a_key_is_made_changed_rotated_and_revoked() {
    with_server(async |server| {
        let body = r#"{"name": "alice", "team": "search", "models": ["fast"], "metadata": {"who": "Alice"}}"#;
        let made = server.ask("POST /v1/keys", body).await;
        assert_eq!(made.status, 201, "{}", made.body);
        assert!(made.head.contains("cache-control: no-store"), "{}", made.head);
        let (id, secret) = (made.json()["key"]["id"].clone(), made.json()["secret"].clone());
        let (id, secret) = (id.as_str().expect("id"), secret.as_str().expect("secret"));
        let keys = &server.plane.directory.shared.keys;
        let key = keys.get(&crate::config::key_hash(secret)).expect("in force");
        assert_eq!((&*key.name, &*key.team), ("alice", "search"));
        assert!(key.may_use("fast") && !key.may_use("slow"));

        let shown = server.ask(&format!("GET /v1/keys/{id}"), "").await;
        assert!(!shown.body.contains(secret), "{}", shown.body);
        assert!(
            shown.json()["secrets"][0]["hint"]
                .as_str()
                .expect("hint")
                .ends_with(&secret[secret.len() - 4..])
        );
        let version = shown.json()["version"].as_u64().expect("version");
        assert!(
            shown.head.contains(&format!("etag: \"{version}\"")),
            "{}",
            shown.head
        );

        let patched = server
            .ask(
                &format!("PATCH /v1/keys/{id}"),
                r#"{"models": null, "team": null, "disabled": true}"#,
            )
            .await;
        assert_eq!(patched.status, 200, "{}", patched.body);
        assert_eq!(patched.json()["state"], "disabled");
        assert!(patched.json()["models"].is_null());
        assert_eq!(patched.json()["metadata"]["who"], "Alice");
        assert!(
            keys.get(&crate::config::key_hash(secret))
                .expect("known")
                .disabled
        );

        let rotated = server
            .ask(&format!("POST /v1/keys/{id}/rotate"), r#"{"overlap": "1h"}"#)
            .await;
        assert_eq!(rotated.status, 200, "{}", rotated.body);
        let fresh = rotated.json()["secret"].as_str().expect("secret").to_owned();
        assert_eq!(
            rotated.json()["key"]["secrets"].as_array().expect("list").len(),
            2
        );
        for secret in [secret, &fresh] {
            assert!(keys.get(&crate::config::key_hash(secret)).is_some());
        }
        let rotated = server.ask(&format!("POST /v1/keys/{id}/rotate"), "").await;
        let last = rotated.json()["secret"].as_str().expect("secret").to_owned();
        for secret in [secret, &fresh] {
            assert!(
                keys.get(&crate::config::key_hash(secret)).is_none(),
                "ended by a rotation without overlap"
            );
        }

        let life = keys
            .get(&crate::config::key_hash(&last))
            .expect("in force")
            .life
            .clone();
        let revoked = server.ask(&format!("POST /v1/keys/{id}/revoke"), "").await;
        assert_eq!(revoked.json()["state"], "revoked", "{}", revoked.body);
        assert!(keys.get(&crate::config::key_hash(&last)).is_none());
        assert!(life.is_ended());
        assert_eq!(
            server.ask(&format!("PATCH /v1/keys/{id}"), "{}").await.status,
            409
        );
        assert_eq!(server.ask(&format!("DELETE /v1/keys/{id}"), "").await.status, 204);
        assert_eq!(server.ask(&format!("GET /v1/keys/{id}"), "").await.status, 404);

        let audit = server.ask("GET /v1/audit", "").await.json();
        let actions: Vec<&str> = audit["data"]
            .as_array()
            .expect("list")
            .iter()
            .filter_map(|entry| entry["action"].as_str())
            .collect();
        assert_eq!(
            actions,
            ["delete", "revoke", "rotate", "rotate", "update", "create"]
        );
        assert_eq!(audit["data"][0]["by"], "admin");
        for secret in [secret, &fresh, &last] {
            assert!(!audit.to_string().contains(secret));
        }
    });
}

#[test]
fn a_change_of_what_was_changed_meanwhile_is_refused() {
    with_server(async |server| {
        let made = server.ask("POST /v1/keys", r#"{"name": "bob"}"#).await.json();
        let id = made["key"]["id"].as_str().expect("id").to_owned();
        let version = made["key"]["version"].as_u64().expect("version");
        let patch = async |if_match: &str| {
            let body = r#"{"tags": ["x"]}"#;
            server
                .raw(&format!(
                    "PATCH /v1/keys/{id} HTTP/1.1\r\nhost: gateway\r\nconnection: close\r\nif-match: {if_match}\r\n\
                     authorization: Bearer {TOKEN}\r\ncontent-length: {}\r\n\r\n{body}",
                    body.len()
                ))
                .await
        };
        assert_eq!(patch(&format!("\"{version}\"")).await.status, 200);
        let stale = patch(&format!("\"{version}\"")).await;
        assert_eq!(
            (stale.status, stale.json()["error"]["code"].as_str()),
            (412, Some("changed_meanwhile"))
        );
        assert_eq!(patch("*").await.status, 200);
        assert_eq!(patch("17").await.status, 400);
    });
}

#[test]
fn lists_have_pages_and_the_files_keys() {
    with_server(async |server| {
        for name in ["a", "b", "c", "m", "z"] {
            let body = format!(r#"{{"name": "{name}"}}"#);
            assert_eq!(server.ask("POST /v1/keys", &body).await.status, 201);
        }
        let (mut names, mut after) = (Vec::new(), String::new());
        loop {
            let page = server.ask(&format!("GET /v1/keys?limit=2{after}"), "").await;
            assert_eq!(page.status, 200, "{}", page.body);
            let page = page.json();
            let data = page["data"].as_array().expect("list");
            assert!(data.len() <= 2);
            names.extend(
                data.iter()
                    .map(|key| key["name"].as_str().expect("name").to_owned()),
            );
            let Some(next) = page["next"].as_str() else { break };
            after = format!("&after={next}");
        }
        assert_eq!(names, ["a", "b", "c", "filed", "m", "z"]);
        let by_team = server.ask("GET /v1/keys?team=search", "").await.json();
        assert_eq!(by_team["data"][0]["source"], "file");
        let id = by_team["data"][0]["id"].as_str().expect("id");
        for (line, body) in [("DELETE", ""), ("PATCH", "{}")] {
            let answer = server.ask(&format!("{line} /v1/keys/{id}"), body).await;
            assert_eq!(answer.json()["error"]["code"], "read_only");
        }
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let leaked = server.ask(&format!("GET /v1/keys?sha256={abc}"), "").await.json();
        assert_eq!(leaked["data"][0]["name"], "filed");
        for wrong in [
            "limit=0",
            "limit=1001",
            "after=zz",
            "limit=x",
            "colour=red",
            "state=odd",
        ] {
            let answer = server.ask(&format!("GET /v1/keys?{wrong}"), "").await;
            assert_eq!(answer.json()["error"]["code"], "bad_request", "{wrong}");
        }
    });
}

#[test]
fn what_a_key_must_not_be_is_said() {
    with_server(async |server| {
        for (body, status, words) in [
            ("", 400, "not understood"),
            ("[]", 400, "not understood"),
            (r#"{"name": "x", "nmae": "y"}"#, 400, "nmae"),
            (r#"{"name": ""}"#, 400, "name"),
            (r#"{"name": "x", "team": "nobody"}"#, 400, "team"),
            (r#"{"name": "x", "models": ["nothing"]}"#, 400, "nothing"),
            (
                r#"{"name": "x", "networks": ["everywhere"]}"#,
                400,
                "not understood",
            ),
            (r#"{"name": "x", "expires_at": "soon"}"#, 400, "RFC 3339"),
            (
                r#"{"name": "x", "expires_in": "1h", "expires_at": "2030-01-01T00:00:00Z"}"#,
                400,
                "not both",
            ),
            (r#"{"name": "x", "sha256": "12"}"#, 400, "sha256"),
            (r#"{"name": "filed"}"#, 409, "configuration file"),
            (
                r#"{"name": "x", "team": "search", "organization": "o"}"#,
                400,
                "organization",
            ),
            (
                r#"{"name": "x", "sha256": "BA7816BF8F01CFEA414140DE5DAE2223B00361A396177A9CB410FF61F20015AD"}"#,
                409,
                "secret",
            ),
        ] {
            let answer = server.ask("POST /v1/keys", body).await;
            assert_eq!(answer.status, status, "{body}: {}", answer.body);
            assert!(
                answer.json()["error"]["message"]
                    .as_str()
                    .expect("words")
                    .contains(words),
                "{}",
                answer.body
            );
        }
        assert_eq!(server.ask("POST /v1/keys", r#"{"name": "x"}"#).await.status, 201);
        assert_eq!(server.ask("POST /v1/keys", r#"{"name": "x"}"#).await.status, 409);
        let audit = server.ask("GET /v1/audit", "").await.json();
        assert_eq!(
            audit["data"].as_array().expect("list").len(),
            1,
            "what failed is not in the log of changes"
        );
        let own = "88d4266fd4e6338d13b845fcf289579d209c897823b9217da3e161936f031589";
        let made = format!(r#"{{"name": "own", "sha256": "{own}"}}"#);
        let made = server.ask("POST /v1/keys", &made).await;
        assert_eq!(made.status, 201, "{}", made.body);
        let audit = server.ask("GET /v1/audit", "").await;
        assert!(
            !audit.body.contains(own),
            "a hash is enough to guess a weak secret by"
        );
        let id = made.json()["key"]["id"].as_str().expect("id").to_owned();
        let filed = r#"{"sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}"#;
        let rotated = server.ask(&format!("POST /v1/keys/{id}/rotate"), filed).await;
        assert_eq!(rotated.status, 409, "{}", rotated.body);
    });
}
