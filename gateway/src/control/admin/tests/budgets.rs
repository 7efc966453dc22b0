//! Teams, budgets and credit.

use super::*;

#[test]
fn teams_and_budgets_are_kept_and_credit_is_added_once() {
    with_server(async |server| {
        let team = server
            .ask("POST /v1/teams", r#"{"name": "a/b", "organization": "acme"}"#)
            .await;
        assert_eq!(team.status, 201, "{}", team.body);
        assert_eq!(
            server.ask("POST /v1/teams", r#"{"name": "search"}"#).await.status,
            409
        );
        let key = server
            .ask("POST /v1/keys", r#"{"name": "k", "team": "a/b"}"#)
            .await
            .json();
        let hash = crate::config::key_hash(key["secret"].as_str().expect("secret"));
        let keys = &server.plane.directory.shared.keys;
        assert_eq!(&*keys.get(&hash).expect("key").organization, "acme");
        let moved = server
            .ask("PATCH /v1/teams/a%2Fb", r#"{"organization": null}"#)
            .await;
        assert_eq!(moved.status, 200, "{}", moved.body);
        assert_eq!(&*keys.get(&hash).expect("key").organization, "");
        assert_eq!(
            server.ask("DELETE /v1/teams/a%2Fb", "").await.status,
            409,
            "it has a key"
        );

        let put = server
            .ask(
                "PUT /v1/budgets/team/a%2Fb",
                r#"{"usd": "12.50", "every": "1mo", "alerts": [80, 50]}"#,
            )
            .await;
        assert_eq!(put.status, 200, "{}", put.body);
        assert_eq!(
            (&put.json()["usd"], &put.json()["alerts"]),
            (&json!("12.5"), &json!([50, 80]))
        );
        let defaults = ["time_zone", "on_exhausted", "unpriced"].map(|field| put.json()[field].clone());
        assert_eq!(defaults, [json!("UTC"), json!("finish"), json!("refuse")]);
        let put = server
            .ask(
                "PUT /v1/budgets/gateway/all",
                r#"{"usd": "1", "every": "1d", "time_zone": "Asia/Tokyo", "on_exhausted": "error", "unpriced": "allow"}"#,
            )
            .await;
        assert_eq!(put.status, 200, "{}", put.body);
        let shown = server.ask("GET /v1/budgets/gateway/all", "").await.json();
        assert_eq!(
            (&shown["time_zone"], &shown["on_exhausted"], &shown["unpriced"]),
            (&json!("Asia/Tokyo"), &json!("error"), &json!("allow"))
        );
        // Midnight in Tokyo.
        let resets_at = shown["resets_at"].as_str().expect("a time");
        assert!(resets_at.ends_with("T15:00:00Z"), "{resets_at}");
        let topup = r#"{"usd": "5", "reference": "invoice 7"}"#;
        assert_eq!(
            server
                .ask("POST /v1/budgets/team/a%2Fb/topups", topup)
                .await
                .status,
            409,
            "it has a period"
        );
        assert_eq!(server.ask("PUT /v1/budgets/key/k", "{}").await.status, 200);
        assert_eq!(
            server.ask("POST /v1/budgets/key/k/topups", topup).await.status,
            201
        );
        let again = server.ask("POST /v1/budgets/key/k/topups", topup).await;
        assert_eq!((again.status, &again.json()["credit_usd"]), (200, &json!("5")));
        let other = r#"{"usd": "6", "reference": "invoice 7"}"#;
        assert_eq!(
            server.ask("POST /v1/budgets/key/k/topups", other).await.status,
            409
        );
        let back = r#"{"usd": "-1.25", "reference": "refund"}"#;
        let back = server.ask("POST /v1/budgets/key/k/topups", back).await;
        assert_eq!((back.status, &back.json()["credit_usd"]), (201, &json!("3.75")));
        let topups = server.ask("GET /v1/budgets/key/k/topups", "").await.json();
        assert_eq!(
            topups["data"][1],
            json!({
                "reference": "refund", "usd": "-1.25", "by": "admin", "at": topups["data"][1]["at"],
            })
        );
        let keys_budgets = server.ask("GET /v1/budgets?scope=key", "").await.json();
        assert_eq!(keys_budgets["data"].as_array().expect("list").len(), 1);
        for (path, body) in [
            ("/v1/budgets/key/nobody", "{}"),
            ("/v1/budgets/gateway/none", "{}"),
            ("/v1/budgets/planet/x", "{}"),
            ("/v1/budgets/key/k", r#"{"usd": "a lot"}"#),
            ("/v1/budgets/key/k", r#"{"every": "1d"}"#),
            ("/v1/budgets/key/k", r#"{"usd": "1"}"#),
            ("/v1/budgets/key/k", r#"{"alerts": [1001]}"#),
            ("/v1/budgets/key/k", r#"{"unpriced": "perhaps"}"#),
            (
                "/v1/budgets/key/k",
                r#"{"usd": "1", "every": "1d", "time_zone": "Mars/Olympus"}"#,
            ),
        ] {
            let answer = server.ask(&format!("PUT {path}"), body).await;
            assert_eq!(answer.status, 400, "{path} {body} {}", answer.body);
        }
        assert_eq!(server.ask("DELETE /v1/budgets/key/k", "").await.status, 204);
        assert_eq!(
            server.ask("PUT /v1/budgets/key/k", "{}").await.json()["credit_usd"],
            "0"
        );
    });
}
