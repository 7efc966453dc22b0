//! Applications' own clients: the `openai` package for Python, by base URL and key alone, and curl.
//!
//! The package is in `target/venv` (`tests/setup.sh` puts it there); without it the test prints `skipped: …` and passes.

mod support;

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use gateway::ledger::record::Outcome;
use gateway_bench::upstream::Server;
use support::{
    Gateway, KEY, Setup,
    client::{chat, expected_content},
    eventually, fleet, skipped,
};

/// A key that may use `fast` only, once.
const LIMITED: &str = "sk-test-limited";

fn pair() -> (Server, Gateway) {
    let fleet = fleet("tokens=5,pace=1ms,first=1ms");
    let gateway = Setup::new(fleet.url())
        .model("broken", "sim:tokens=5,error=2")
        .model("cut", "sim:tokens=50,die=rst,after=3,pace=5ms")
        .model("dead", "sim:die=rst")
        .model("refusing", "sim:status=400")
        .model("endless", "sim:tokens=1000000,pace=1ms")
        .key("limited", LIMITED, ", models: [fast]")
        .limits("  - { match: { key: limited }, requests: 1, every: 1h }")
        .start();
    (fleet, gateway)
}

/// The Python with the package, or why there is none.
fn python() -> Result<PathBuf, String> {
    let own = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../venv/bin/python");
    let common = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/venv/bin/python");
    for python in [own, common] {
        let import = Command::new(&python).args(["-c", "import openai"]).output();
        if import.is_ok_and(|output| output.status.success()) {
            return Ok(python);
        }
    }
    Err("no Python with the openai package in target/venv (tests/setup.sh makes it)".into())
}

fn text(output: &Output) -> String {
    [output.stdout.as_slice(), &output.stderr]
        .map(String::from_utf8_lossy)
        .concat()
}

#[test]
fn the_openai_package_works_by_base_url_and_key() {
    let python = match python() {
        Ok(python) => python,
        Err(reason) => return skipped("sdk", reason),
    };
    let (fleet, gateway) = pair();
    let output = Command::new(python)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sdk/calls.py"))
        .args([&format!("http://{}", gateway.addr()), KEY, LIMITED])
        .env_remove("OPENAI_API_KEY")
        .env("NO_PROXY", "*")
        .output()
        .expect("python");
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("passed: left_early"), "{}", text(&output));
    eventually("the upstream is told that the application has gone", || {
        (fleet.stats().streams_open == 0).then_some(())
    });
    let left = eventually("its record", || {
        let records = gateway.records();
        records.into_iter().find(|record| &*record.model == "endless")
    });
    assert_eq!(left.outcome, Outcome::ClientGone);
    // What the package says of itself goes on; what it knows of the caller's key does not.
    let last = fleet.last();
    let agent = last.header("user-agent").expect("a user agent");
    assert!(agent.contains("OpenAI/Python"), "{agent}");
    assert_eq!(
        last.header("authorization").as_deref(),
        Some("Bearer upstream-secret")
    );
}

fn curl(gateway: &Gateway, arguments: &[&str], path: &str) -> Option<Output> {
    let url = format!("http://{}{path}", gateway.addr());
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--noproxy", "*", "--max-time", "30"]);
    match command.args(arguments).arg(url).output() {
        Ok(output) => Some(output),
        Err(error) => {
            skipped("tools", format_args!("curl: {error}"));
            None
        }
    }
}

#[test]
fn curl_works() {
    let (_fleet, gateway) = pair();
    let key = format!("Authorization: Bearer {KEY}");
    let body = chat("fast", true);
    let arguments = [
        "-N",
        "-H",
        &key,
        "-H",
        "Content-Type: application/json",
        "-d",
        &body,
    ];
    for version in ["--http1.1", "--http1.0"] {
        let arguments = [&[version], arguments.as_slice()].concat();
        let Some(output) = curl(&gateway, &arguments, "/v1/chat/completions") else {
            return;
        };
        assert!(output.status.success(), "{version}: {}", text(&output));
        let events = text(&output);
        assert!(events.ends_with("data: [DONE]\n\n"), "{version}: {events}");
        for token in expected_content(5).split(' ').filter(|token| !token.is_empty()) {
            assert!(
                events.contains(&format!("\"content\":\"{token} \"")),
                "{version}: {events}"
            );
        }
    }
    // A body over a kilobyte makes curl ask first (`Expect: 100-continue`); `Upgrade: h2c` is passed over.
    let long = format!(
        r#"{{"model":"fast","messages":[{{"role":"user","content":"{}"}}]}}"#,
        "x".repeat(2 * 1024 * 1024)
    );
    let file = gateway.dir().join("body.json");
    std::fs::write(&file, long).expect("a file");
    let data = format!("@{}", file.display());
    let arguments = [
        "--http2",
        "-H",
        &key,
        "-H",
        "Expect: 100-continue",
        "--data-binary",
        &data,
    ];
    let output = curl(&gateway, &arguments, "/v1/chat/completions").expect("curl");
    assert!(text(&output).contains("\"usage\""), "{}", text(&output));
    // An error is a body and a status, which `--fail` makes an exit code.
    let output = curl(
        &gateway,
        &["--fail-with-body", "-d", "{}"],
        "/v1/chat/completions",
    )
    .expect("curl");
    assert_eq!(output.status.code(), Some(22));
    assert!(text(&output).contains("missing_api_key"), "{}", text(&output));
}
