//! Secrets and prompts stay where they belong: no log, no file, no answer shows them, and no core dump holds them.

mod support;

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use support::{
    BINARY, Gateway, KEY, Setup,
    client::{Client, chat, chat_request},
    eventually, fleet,
    scripted::{Scripted, Then},
    skipped, write_config,
};

/// The operator's credentials; the first stands in an environment variable, the second in a file.
const UPSTREAM: &str = "sk-upstream-4f7d1c";
const TOKEN: &str = "admin-token-93b2aa";
/// A key that nobody has: most likely a mistyped one, or one of another system.
const WRONG: &str = "sk-wrong-17ce55";
/// Another credential that a client sends by mistake, and what it asked.
const COOKIE: &str = "cookie-5d1f08";
const PROMPT: &str = "prompt-e0a44b";

const SECRETS: [&str; 6] = [UPSTREAM, TOKEN, WRONG, COOKIE, PROMPT, KEY];

fn assert_clean(what: &str, bytes: &[u8]) {
    for secret in SECRETS {
        let at = memchr::memmem::find(bytes, secret.as_bytes());
        assert!(
            at.is_none(),
            "{secret} is in {what}: {}",
            String::from_utf8_lossy(bytes)
        );
    }
}

/// All files below a directory.
fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory)
        .expect("a directory")
        .map(|entry| entry.expect("an entry").path());
    entries
        .flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] })
        .collect()
}

fn config(upstream: &str) -> String {
    Setup::new(upstream)
        .model("refused", "sim:status=401")
        .model("broken", "sim:garbage")
        .model("failing", "sim:tokens=9,error=2")
        .model("bad", "sim:status=400")
        .key("narrow", "sk-test-narrow", ", models: [bad]")
        .limits("  - { match: { key: narrow }, requests: 1, every: 1h }")
        .config()
        .replace("key: upstream-secret", "key: \"${env:TEST_UPSTREAM_KEY}\"")
        .replace(
            "address: \"127.0.0.1:0\" }",
            "address: \"127.0.0.1:0\", token: \"${file:token}\" }",
        )
        .replace(
            "log: { format: json }",
            "log: { format: json, level: trace, access: \"{dir}/access.log\" }",
        )
}

fn start(upstream: &str) -> Gateway {
    let directory = tempfile::tempdir().expect("a directory");
    let token = directory.path().join("token");
    fs::write(&token, format!("{TOKEN}\n")).expect("a file");
    fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).expect("a file");
    let mut command = Command::new(BINARY);
    command.env("TEST_UPSTREAM_KEY", UPSTREAM);
    Gateway::try_start_by(command, directory, &config(upstream)).unwrap_or_else(|log| panic!("{log}"))
}

/// Header lines with a key in each place where one may stand.
fn credentials(key: &str) -> [String; 3] {
    ["authorization: Bearer ", "x-api-key: ", "x-goog-api-key: "]
        .map(|field| format!("{field}{key}\r\ncookie: session={COOKIE}\r\nx-forwarded-for: 10.0.0.1\r\n"))
}

/// Everything that a client may do wrong or right; all answers, heads and bodies.
fn use_it(gateway: &Gateway) -> Vec<u8> {
    let mut all = Vec::new();
    let mut take = |request: Vec<u8>| {
        let mut client = Client::connect(gateway.addr());
        client.send(request);
        all.extend(client.rest().expect("an answer and the end"));
    };
    let post = |path: &str, fields: &str, body: &str| {
        let length = body.len();
        format!("POST {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n{fields}content-length: {length}\r\n\r\n{body}")
            .into_bytes()
    };
    let body = |model: &str, stream: bool| chat(model, stream).replace("hello there", PROMPT);
    for key in [KEY, WRONG, "sk-test-narrow"] {
        for fields in credentials(key) {
            for model in ["fast", "refused", "broken", "failing", "bad", "none"] {
                for stream in [false, true] {
                    take(post("/v1/chat/completions", &fields, &body(model, stream)));
                }
            }
            // Malformed in ways whose messages might quote what was sent.
            take(post(
                "/v1/chat/completions",
                &fields,
                &format!("{{\"model\":\"{PROMPT}\""),
            ));
            take(post(
                "/v1/chat/completions",
                &fields,
                &format!("{{\"model\":\"fast\",\"stream\":\"{PROMPT}\"}}"),
            ));
            take(post(
                "/v1/chat/completions",
                &fields,
                &format!("{{\"model\":\"fast\",\"max_tokens\":\"{PROMPT}\"}}"),
            ));
            take(post("/v1/chat/completions", &fields, PROMPT));
            take(post(&format!("/v1/nothing?key={key}"), &fields, "{}"));
            take(post(
                &format!("/v1/chat/completions?key={key}"),
                &fields,
                &body("fast", false),
            ));
            take(post(
                "/v1/chat/completions",
                &format!("{fields}x-a : b\r\n"),
                "{}",
            ));
            take(post(
                "/v1/chat/completions",
                &format!("{fields}transfer-encoding: x\r\n"),
                "{}",
            ));
        }
    }
    all
}

#[test]
fn no_answer_log_or_file_shows_a_secret_or_a_prompt() {
    let fleet = fleet("tokens=2,pace=0,first=0");
    let gateway = start(&fleet.url());
    assert_clean("an answer", &use_it(&gateway));
    assert_eq!(
        fleet.last().header("authorization"),
        Some(format!("Bearer {UPSTREAM}"))
    );

    for (token, status) in [(TOKEN, 200), (WRONG, 401), (KEY, 401)] {
        for path in ["/status", "/metrics", "/kernel"] {
            let mut client = Client::connect(gateway.admin);
            client.send(format!(
                "GET {path} HTTP/1.1\r\nhost: admin\r\nauthorization: Bearer {token}\r\n\r\n"
            ));
            let answer = client.answer();
            assert_eq!(answer.status, status, "{path}");
            assert_clean(path, &answer.body);
            assert!(!answer.text().is_empty());
        }
    }
    // Reloads that fail beside a secret.
    for (from, to) in [
        (
            "kind: openai, key: \"${env:TEST_UPSTREAM_KEY}\"",
            format!("kind: openai, key: [{UPSTREAM}]"),
        ),
        (
            "kind: openai, key: \"${env:TEST_UPSTREAM_KEY}\"",
            format!("kind: openai, kee: {UPSTREAM}"),
        ),
        ("token: \"${file:token}\"", format!("token: {{ {TOKEN}: 1 }}")),
    ] {
        let bad = config(&fleet.url()).replacen(from, &to, 1);
        assert_ne!(bad, config(&fleet.url()));
        let outcome = gateway.reload(&bad);
        assert!(outcome.contains("the old one stays"), "{outcome}");
    }
    write_config(gateway.dir(), &config(&fleet.url()));
    let usage = gateway.command(&["usage", "--records"]);
    let check = Command::new(BINARY)
        .args(["check", "-c"])
        .arg(gateway.config_path())
        .env("TEST_UPSTREAM_KEY", UPSTREAM)
        .output()
        .expect("the gateway's binary");
    assert!(check.status.success());
    for output in [&usage, &check] {
        assert_clean("a command's output", &output.stdout);
        assert_clean("a command's errors", &output.stderr);
    }

    let access = gateway.dir().join("access.log");
    eventually("the access log is written", || {
        fs::read(&access)
            .is_ok_and(|bytes| bytes.len() > 1000)
            .then_some(())
    });
    let directory = gateway.dir().to_path_buf();
    let mut gateway = gateway;
    gateway.signal(libc::SIGTERM);
    assert_eq!(gateway.wait().code(), Some(0));
    let own = ["gateway.yaml", "token"].map(|name| directory.join(name));
    let mut looked_at = 0;
    for file in files(&directory).iter().filter(|file| !own.contains(file)) {
        assert_clean(&file.display().to_string(), &fs::read(file).expect("a file"));
        looked_at += 1;
    }
    assert!(
        looked_at >= 3,
        "journal, sums, access log: {:?}",
        files(&directory)
    );
    assert_clean("the log", gateway.log().as_bytes());
    assert!(gateway.log().lines().count() > 5, "{}", gateway.log());
}

/// What a provider says about a credential that it refuses is for the operator, not for clients or logs.
#[test]
fn a_provider_that_quotes_the_credential_is_not_quoted() {
    for status in ["401 Unauthorized", "403 Forbidden"] {
        let body = format!(r#"{{"error":{{"message":"incorrect API key provided: {UPSTREAM}"}}}}"#);
        let answer = format!(
            "HTTP/1.1 {status}\r\ncontent-type: application/json\r\nwww-authenticate: Bearer realm={UPSTREAM}\r\n\
             x-key: {UPSTREAM}\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let upstream = Scripted::saying(answer, Then::Keep);
        let gateway = start(&upstream.url());
        let mut client = Client::connect(gateway.addr());
        client.send(chat_request("fast", false));
        let answer = client.answer();
        assert_eq!(answer.status, 502);
        assert_clean(
            "the answer",
            format!("{:?} {}", answer.fields, answer.text()).as_bytes(),
        );
        gateway.await_log("refuses the configured credential");
        assert_clean("the log", gateway.log().as_bytes());
    }
}

#[test]
fn what_is_generated_is_for_the_owner_alone() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let gateway = Setup::new(fleet.url()).start();
    let mode = |path: PathBuf| fs::metadata(path).expect("a file").permissions().mode() & 0o777;
    assert_eq!(mode(gateway.state()), 0o700);
    assert_eq!(mode(gateway.state().join("admin.token")), 0o600);
    let token = fs::read_to_string(gateway.state().join("admin.token")).expect("a token");
    assert!(token.trim().len() >= 32, "{}", token.trim().len());
    assert!(!gateway.log().contains(token.trim()));
    // The command line is for everyone to see.
    let line = fs::read(format!("/proc/{}/cmdline", gateway.pid())).expect("a process");
    assert_clean("the command line", &line);
}

#[test]
fn no_core_dump_is_made() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let gateway = Setup::new(fleet.url()).start();
    let limits = fs::read_to_string(format!("/proc/{}/limits", gateway.pid())).expect("a process");
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"))
        .expect("a limit");
    assert_eq!(
        core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(),
        ["0", "0"]
    );
}

/// The files of a process that may not be dumped belong to root (proc(5)), so that others of its user cannot read its
/// memory. For root itself there is no difference to see, so the gateway runs as another user.
#[test]
fn its_memory_is_closed_to_others_of_its_user() {
    const NOBODY: u32 = 65534;
    let as_nobody = || {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", BINARY]);
        command
    };
    let mut probe = as_nobody();
    probe.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
    if !probe.status().is_ok_and(|status| status.success()) {
        return skipped("root", "cannot run the binary as another user");
    }
    let directory = tempfile::tempdir().expect("a directory");
    chown(directory.path(), Some(NOBODY), Some(NOBODY)).expect("root may");
    let fleet = fleet("tokens=1,pace=0,first=0");
    let gateway = Gateway::try_start_by(as_nobody(), directory, &Setup::new(fleet.url()).config())
        .unwrap_or_else(|log| panic!("{log}"));
    let process = PathBuf::from(format!("/proc/{}", gateway.pid()));
    assert_eq!(fs::metadata(gateway.state()).expect("a directory").uid(), NOBODY);
    assert_eq!(fs::metadata(process.join("mem")).expect("a process").uid(), 0);
}
