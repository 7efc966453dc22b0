//! Wrong configurations and the exact words about them; good ones and what becomes of them.

use std::path::Path;

use proptest::prelude::*;

use super::*;

const GOOD: &str = "\
listeners:
  - address: 127.0.0.1:8080
providers:
  fleet:
    kind: openai
    endpoints: [http://10.0.0.1:8000]
  openai:
    kind: openai
models:
  - name: fast
    targets:
      - provider: fleet
        weight: 80
teams:
  - name: search
keys:
  - name: alice
    sha256: 2bd806c97f0e00af1a1fc3328fa763a9269723c8db8fac4f93af71db186d6e90
    team: search
    models: [fast]
limits:
  - match: { team: search, model: fast }
    tokens: 1000
    every: 1m
";

fn parse_text(text: &str) -> Result<Config, Errors> {
    parse(text, "g.yaml", Path::new("/nowhere"), &|name| {
        (name == "SET").then(|| "value".to_owned())
    })
}

/// What is replaced in [`GOOD`], by what, and all that is then said.
const WRONG: &[(&str, &str, &[&str])] = &[
    (
        "weight: 80",
        "wieght: 80",
        &["g.yaml:13:9: models[0].targets[0]: unknown field `wieght`; did you mean `weight`?"],
    ),
    (
        "weight: 80",
        "weight: eighty",
        &["g.yaml:13:17: models[0].targets[0].weight: expected a whole number, found `eighty`"],
    ),
    (
        "weight: 80",
        "weight: 0",
        &["g.yaml:12:7: models[0].targets: every target has weight 0: none would take a request"],
    ),
    (
        "weight: 80",
        "weight: 1000001",
        &["g.yaml:13:17: models[0].targets[0].weight: 1000001 is too large; the most is 1000000"],
    ),
    (
        "provider: fleet",
        "provider: fleat",
        &["g.yaml:12:19: models[0].targets[0].provider: unknown provider `fleat`; did you mean `fleet`?"],
    ),
    (
        "provider: fleet",
        "provider: zzz",
        &["g.yaml:12:19: models[0].targets[0].provider: unknown provider `zzz`; known: fleet, openai"],
    ),
    (
        "  - address: 127.0.0.1:8080",
        "  - adress: 127.0.0.1:8080",
        &["g.yaml:2:5: listeners[0]: unknown field `adress`; did you mean `address`?"],
    ),
    (
        "127.0.0.1:8080",
        "localhost:8080",
        &[
            "g.yaml:2:14: listeners[0].address: `localhost:8080` is not an IP address with a port; \
         write for example 0.0.0.0:8080 or [::]:8080",
        ],
    ),
    (
        "  - address: 127.0.0.1:8080",
        "  - address: 127.0.0.1:8080\n  - address: 127.0.0.1:8080",
        &["g.yaml:3:14: listeners[1].address: 127.0.0.1:8080 is already the address of listeners[0]"],
    ),
    (
        "listeners:\n  - address: 127.0.0.1:8080",
        "listeners: []",
        &["g.yaml:1:12: listeners: at least one listener is needed"],
    ),
    (
        "listeners:\n  - address: 127.0.0.1:8080\n",
        "",
        &["g.yaml:1:1: missing field `listeners`"],
    ),
    (
        "127.0.0.1:8080",
        "127.0.0.1:9900",
        &["g.yaml:1:1: admin.address: 127.0.0.1:9900 clashes with the address of listeners[0]"],
    ),
    (
        "  - address: 127.0.0.1:8080",
        "  - { address: 127.0.0.1:8080, tls: { certificate: c.pem, key: k.pem } }",
        &[
            "g.yaml:2:37: listeners[0].tls: cannot read /nowhere/c.pem: No such file or directory (os error 2)",
        ],
    ),
    (
        "  - address: 127.0.0.1:8080",
        "  - { address: 127.0.0.1:8080, tls: yes }",
        &["g.yaml:2:37: listeners[0].tls: expected a map, found a single value"],
    ),
    (
        "http://10.0.0.1:8000",
        "10.0.0.1:8000",
        &[
            "g.yaml:6:17: providers.fleet.endpoints[0]: not a URL; write http://host[:port][/prefix] or https://…",
        ],
    ),
    (
        "http://10.0.0.1:8000",
        "http://a, http://A:80/",
        &["g.yaml:6:27: providers.fleet.endpoints[1]: the same endpoint as [0]"],
    ),
    (
        "    endpoints:",
        "    ca: ca.pem\n    endpoints:",
        &[
            "g.yaml:6:9: providers.fleet.ca: cannot read /nowhere/ca.pem: No such file or directory (os error 2)",
        ],
    ),
    (
        "    endpoints:",
        "    key: ${env:NOPE}\n    endpoints:",
        &["g.yaml:6:10: providers.fleet.key: environment variable `NOPE` is not set"],
    ),
    (
        "  openai:\n    kind: openai\n",
        "  open.ai:\n    kind: opnai\n",
        &["g.yaml:8:11: providers.`open.ai`.kind: unknown word `opnai`; did you mean `openai`?"],
    ),
    (
        "  - name: fast",
        "  - name: \"\"",
        &[
            "g.yaml:10:11: models[0].name: the name is empty",
            "g.yaml:20:14: keys[0].models[0]: unknown model `fast`; there is none",
            "g.yaml:22:35: limits[0].match.model: unknown model `fast`; there is none",
        ],
    ),
    (
        "  - name: search",
        "  - name: search\n  - name: search",
        &["g.yaml:16:11: teams[1].name: `search` is already the name of teams[0]"],
    ),
    (
        "  - name: search",
        "  - name: search\n  - name: \"a\\tb\"\n  - name: ' c'",
        &[
            "g.yaml:16:11: teams[1].name: the name has a control character",
            "g.yaml:17:11: teams[2].name: the name begins or ends with a space",
        ],
    ),
    (
        "sha256: 2bd8",
        "sha256: 2bd",
        &["g.yaml:18:13: keys[0].sha256: a SHA-256 has 64 hex digits, found 63"],
    ),
    (
        "sha256: 2bd8",
        "sha256: sk-gw-",
        &[
            "g.yaml:18:13: keys[0].sha256: not a SHA-256 of 64 hex digits; put the hash of the key here, not the key",
        ],
    ),
    (
        "    team: search\n",
        "    team: serch\n",
        &["g.yaml:19:11: keys[0].team: unknown team `serch`; did you mean `search`?"],
    ),
    (
        "limits:",
        "  - { name: bob, sha256: 2BD806c97f0e00af1a1fc3328fa763a9269723c8db8fac4f93af71db186d6e90 }\nlimits:",
        &["g.yaml:21:26: keys[1].sha256: the same key as keys[0]"],
    ),
    (
        "tokens: 1000",
        "tokens: 0",
        &["g.yaml:23:13: limits[0].tokens: 0 is too small; the least is 1"],
    ),
    (
        "    tokens: 1000\n",
        "",
        &[
            "g.yaml:22:5: limits[0]: a limit needs an amount: `requests`, `tokens`, `input_tokens`, `output_tokens`, `usd` or `parallel`",
        ],
    ),
    (
        "every: 1m",
        "every: 10ms",
        &["g.yaml:24:12: limits[0].every: 10ms is too short; the least is 1s"],
    ),
    (
        "every: 1m",
        "every: 2mo",
        &["g.yaml:24:12: limits[0].every: 2mo is too long; the most is 1mo"],
    ),
    (
        "every: 1m",
        "every: 60",
        &[
            "g.yaml:24:12: limits[0].every: `60` is not a duration; write for example 250ms, 30s, 5m, 1h, 1d or 1mo",
        ],
    ),
    (
        "    every: 1m\n",
        "",
        &["g.yaml:22:5: limits[0]: missing field `every`"],
    ),
    (
        "every: 1m",
        "every: 1m\n    every: 2m",
        &["g.yaml:25:5: limits[0]: field `every` is already set in line 24"],
    ),
    (
        "match: { team: search,",
        "match: { team: search, per: key,",
        &[
            "g.yaml:22:28: limits[0].match: unknown field `per`; known: client, header, key, model, organization, path, provider, team, user",
        ],
    ),
    (
        "teams:",
        "workers: { threads: 257, driver: iouring }\nteams:",
        &[
            "g.yaml:14:21: workers.threads: 257 is too large; the most is 256",
            "g.yaml:14:34: workers.driver: unknown word `iouring`; did you mean `io_uring`?",
        ],
    ),
    (
        "teams:",
        "http: { body_max: 2GiB, head_timeout: 0 }\nteams:",
        &[
            "g.yaml:14:7: http.bodies_max: 1GiB is less than `body_max`, which is 2GiB",
            "g.yaml:14:19: http.body_max: 2GiB is too large; the most is 1GiB",
            "g.yaml:14:39: http.head_timeout: 0 is too short; the least is 1ms",
        ],
    ),
    (
        "teams:",
        "log: { level: 'info,gateway=debgu', access: stdot }\nteams:",
        &[
            "g.yaml:14:15: log.level: unknown level `debgu`; did you mean `debug`?",
            "g.yaml:14:45: log.access: unknown word `stdot`; did you mean `stdout`?; a path has a slash",
        ],
    ),
    (
        "teams:",
        "kernel: { drop: { exempt: [10.0.0.1], for: 2d }, cgroup: a/b }\nteams:",
        &[
            "g.yaml:14:28: kernel.drop.exempt[0]: `10.0.0.1` is not a network; \
         write for example 10.0.0.0/8, 192.0.2.1/32 or fd00::/8",
        ],
    ),
    (
        "teams:",
        "kernel: { drop: { for: 2d }, cgroup: a/b }\nledger: { sync: 0 }\nteams:",
        &[
            "g.yaml:14:24: kernel.drop.for: 2d is too long; the most is 1d",
            "g.yaml:14:38: kernel.cgroup: not an absolute path; cgroup2 is mounted at /sys/fs/cgroup",
            "g.yaml:15:17: ledger.sync: 0 is too short; the least is 1ms",
        ],
    ),
    (
        "    targets:",
        "    timeouts: { connect: 0s, first_token: 1h, total: 10m }\n    targets:",
        &[
            "g.yaml:11:26: models[0].timeouts.connect: 0 is too short; the least is 1ms",
            "g.yaml:11:43: models[0].timeouts.first_token: 1h is longer than `total`, which is 10m",
        ],
    ),
    (
        "teams:",
        "limts: []\nteams:",
        &["g.yaml:14:1: unknown field `limts`; did you mean `limits`?"],
    ),
    (
        "teams:\n  - name: search\n",
        "teams:\n",
        &[
            "g.yaml:14:6: teams: expected a list, found nothing; write [] or leave the field out",
            "g.yaml:18:11: keys[0].team: unknown team `search`; there is none",
            "g.yaml:21:20: limits[0].match.team: unknown team `search`; there is none",
        ],
    ),
    (
        "kind: openai\n    endpoints",
        "kind: openai\n\tendpoints",
        &["g.yaml:5:11: while scanning a plain scalar, found a tab"],
    ),
    (
        "[http://10.0.0.1:8000]",
        "[http://10.0.0.1:8000",
        &["g.yaml:7:9: illegal placement of ':' indicator"],
    ),
    (
        "models: [fast]",
        "models: *fast",
        &["g.yaml:20:13: while parsing node, found unknown anchor"],
    ),
    (
        "limits:",
        "---\nlimits:",
        &["g.yaml:21:1: a second document (`---`) is not allowed"],
    ),
];

#[test]
fn every_error_says_what_is_wrong_and_where() {
    let mut different = Vec::new();
    for (from, to, expected) in WRONG {
        assert_eq!(GOOD.matches(from).count(), 1, "{from:?} must be there once");
        let found = match parse_text(&GOOD.replace(from, to)) {
            Ok(_) => String::from("no error"),
            Err(errors) => errors.to_string(),
        };
        if found != expected.join("\n") {
            different.push(format!("{to}\n  expected: {expected:#?}\n  found: {found}"));
        }
    }
    assert!(different.is_empty(), "{}", different.join("\n"));
}

#[test]
fn a_good_file_has_no_warning_and_its_defaults() {
    let config = parse_text(GOOD).unwrap();
    assert_eq!(config.warnings, []);
    assert_eq!(config.models[0].targets[0].weight, 80);
    assert_eq!(config.models[0].timeouts.connect, units::Span::secs(2));
    assert_eq!(config.drain, units::Span::secs(30));
    assert_eq!(config.admin.address.to_string(), "127.0.0.1:9900");
}

#[test]
fn doubtful_settings_are_warned_of() {
    let text = GOOD.replace(
        "teams:",
        "admin: { address: 0.0.0.0:9900 }\nteams:\n  - name: other",
    );
    let text = text
        .replace("match: { team: search", "match: { key: alice, team: other")
        .replace("8000]", "8000/v1]")
        .replace("models: [fast]", "models: []")
        .replace(
            "    kind: openai\nmodels",
            "    kind: openai\n    key: hunter2\nmodels",
        );
    let config = parse_text(&text).unwrap();
    let warnings: Vec<String> = config.warnings.iter().map(ToString::to_string).collect();
    assert_eq!(
        warnings,
        [
            "g.yaml:6:17: providers.fleet.endpoints[0]: the prefix ends with /v1, which the gateway adds itself: \
         requests go to /v1/v1/…",
            "g.yaml:9:10: providers.openai.key: a secret stands in the file; ${env:…}, ${file:…} or ${credential:…} \
         keeps it out",
            "g.yaml:15:19: admin.address: 0.0.0.0:9900 can be reached from other hosts, in plain HTTP; set `token` and \
         guard the network",
            "g.yaml:23:13: keys[0].models: the list is empty: the key may use no model",
            "g.yaml:25:12: limits[0].match: key `alice` is not in team `other`: the limit counts nothing",
        ]
    );
    assert_eq!(
        config.providers["openai"].key.as_ref().unwrap().expose(),
        "hunter2"
    );
    assert!(!format!("{config:?}").contains("hunter2"));
}

#[test]
fn anchors_and_merge_keys_work_and_keep_their_places() {
    let text = "\
listeners: [{ address: 127.0.0.1:0 }, { address: 127.0.0.1:0 }]
providers: { p: { kind: openai, key: '${env:SET}' } }
models:
  - { name: a, targets: &t [{ provider: p }], timeouts: &time { connect: 1s, total: 20s } }
  - { name: b, targets: *t, timeouts: { <<: *time, total: 500ms } }
";
    let errors = parse_text(text).unwrap_err().to_string();
    assert_eq!(
        errors,
        "g.yaml:4:74: models[1].timeouts.connect: 1s is longer than `total`, which is 500ms"
    );
    let config = parse_text(&text.replace("500ms", "5s")).unwrap();
    assert_eq!(config.models[1].timeouts.connect, units::Span::secs(1));
    assert_eq!(config.models[1].timeouts.total, units::Span::secs(5));
    assert_eq!(config.providers["p"].key.as_ref().unwrap().expose(), "value");
}

#[test]
fn only_so_many_errors_are_shown() {
    let keys: String = (0..500)
        .map(|n| format!("  - {{ name: k{n}, sha256: x{n} }}\n"))
        .collect();
    let text = format!("listeners: [{{ address: 127.0.0.1:80 }}]\nkeys:\n{keys}");
    let errors = parse_text(&text).unwrap_err();
    assert_eq!(errors.0.len(), 101);
    assert_eq!(errors.0[100].to_string(), "g.yaml: and 400 more errors");
}

/// Seconds of CPU time: far more than reading a file of this size takes, also in a debug build.
const QUICKLY_S: u64 = 20;

/// Seconds that this thread has been on a CPU: first field of its schedstat, in nanoseconds (proc(5)).
fn thread_cpu_s() -> u64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("schedstat");
    let ns: u64 = stat
        .split(' ')
        .next()
        .and_then(|ns| ns.parse().ok())
        .expect("a number");
    ns / 1_000_000_000
}

#[test]
fn bombs_are_refused_quickly() {
    let mut laughs = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    let mut merges = String::from("a0: &a0 { x0: 1 }\n");
    for n in 1..=24 {
        let before = n - 1;
        let list = vec![format!("*a{before}"); 10].join(", ");
        laughs += &format!("a{n}: &a{n} [{list}]\n");
        merges += &format!("a{n}: &a{n} {{ <<: [{list}], x{n}: 1 }}\n");
    }
    let inside = format!("listeners: [{{ address: 127.0.0.1:80 }}]\n{laughs}models: *a24\n");
    let merged = format!("{merges}http: {{ <<: *a24 }}\nlisteners: *a24\n");
    let wide = format!("listeners: [{}]\n", "{address: 127.0.0.1:80}, ".repeat(30_000));
    // In the form of the schema, so that only the bound on aliases stops it.
    let repeated = format!(
        "listeners: [{{ address: 127.0.0.1:80 }}]\nproviders: {{ p: {{ kind: openai }} }}\n\
         models:\n  - &m {{ name: m, targets: [{}] }}\n{}",
        "{ provider: p }, ".repeat(500),
        "  - *m\n".repeat(500),
    );
    let before = thread_cpu_s();
    for (what, text) in [
        ("laughs", inside),
        ("merges", merged),
        ("repeated", repeated),
        ("wide", wide),
        ("deep lists", "[".repeat(1_000_000)),
        ("deep maps", "{a: ".repeat(1_000_000)),
        (
            "deep blocks",
            (0..2000).map(|n| format!("{}a:\n", " ".repeat(n))).collect(),
        ),
        ("deep dashes", "- ".repeat(1_000_000)),
        ("large", " ".repeat(FILE_BYTES_MAX + 1)),
        (
            "long scalar",
            format!("log: {{ level: \"{}\" }}", "x".repeat(4_000_000)),
        ),
        ("itself", "models: &a [*a]".to_owned()),
    ] {
        let errors = parse_text(&text).map(drop).expect_err(what).to_string();
        if what == "repeated" {
            assert!(errors.contains("alias"), "{errors}");
        }
        assert!(errors.len() < 50_000, "{what}: {} bytes of errors", errors.len());
    }
    let used = thread_cpu_s() - before;
    assert!(used < QUICKLY_S, "{used} s");
}

#[test]
fn a_readable_file_with_secrets_is_warned_of() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("g.yaml");
    std::fs::write(
        &path,
        GOOD.replacen("kind: openai", "kind: openai\n    key: hunter2", 1),
    )
    .unwrap();
    for (mode, warnings) in [(0o600, 1), (0o640, 1), (0o644, 2)] {
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        let config = load(&path).unwrap();
        assert_eq!(config.warnings.len(), warnings, "{mode:o}: {:?}", config.warnings);
    }
    let absent = load(&dir.path().join("absent.yaml")).unwrap_err().to_string();
    assert!(
        absent.ends_with("absent.yaml: cannot read: No such file or directory (os error 2)"),
        "{absent}"
    );
    std::fs::write(&path, [0xff]).unwrap();
    assert!(
        load(&path)
            .unwrap_err()
            .to_string()
            .ends_with("g.yaml: not UTF-8 text")
    );
}

#[test]
fn the_examples_load() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let env = |name: &str| (name == "OPENAI_API_KEY").then(|| "sk-test".to_owned());
    for (name, keys) in [("gateway.yaml", 2), ("minimal.yaml", 1)] {
        let text = std::fs::read_to_string(examples.join(name)).unwrap();
        let config = parse(&text, name, &examples, &env).unwrap_or_else(|errors| panic!("{errors}"));
        assert_eq!(config.warnings, [], "{name}");
        assert_eq!(config.keys.len(), keys);
    }
}

/// Wrong pieces to put anywhere into a good file.
fn piece() -> impl Strategy<Value = String> {
    prop_oneof![
        prop::sample::select(vec![
            "{",
            "}",
            "[",
            "]",
            ":",
            "- ",
            "\n",
            "  ",
            "\t",
            "&a ",
            "*a",
            "<<: *a",
            "---\n",
            "? ",
            "!!int ",
            "|",
            ">",
            "'",
            "\"",
            "#",
            "null",
            "~",
            "\u{feff}",
            "\0",
            "${env:X}",
            "${file:/}",
            "99999999999999999999",
            "-1",
            "listeners: ",
            "%YAML 1.2\n",
            "...",
        ])
        .prop_map(str::to_owned),
        ".{0,8}",
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn a_mutated_file_never_panics(cuts in prop::collection::vec((0..GOOD.len(), 0..6usize, piece()), 1..6)) {
        let mut text = GOOD.to_owned();
        for (at, length, piece) in cuts {
            let at = at.min(text.len());
            let end = (at + length).min(text.len());
            if text.is_char_boundary(at) && text.is_char_boundary(end) {
                text.replace_range(at..end, &piece);
            }
        }
        if let Err(errors) = parse_text(&text) {
            prop_assert!(!errors.0.is_empty());
            let lines = text.lines().count() as u32 + 1;
            for problem in errors.0 {
                prop_assert!(problem.pos.is_none_or(|pos| pos.line >= 1 && pos.line <= lines));
                prop_assert!(!problem.message.contains('\n'));
            }
        }
    }

    #[test]
    fn any_text_never_panics(text in prop_oneof![".*", "[\\[\\]{}:,&*a\\n -]{0,64}"]) {
        let _ = parse_text(&text);
    }
}
