//! The JSON Schema says the same of a file as the loader, judged by another implementation of it.

#[path = "support/skip.rs"]
mod skip;

use std::{fs, path::Path, process::Command};

use gateway::config;
use serde_json::Value;

/// Reads the schema and files with instances; prints `ok` or `wrong` for each.
const VALIDATE: &str = "
import json, sys, jsonschema
schema = json.load(open(sys.argv[1]))
jsonschema.Draft202012Validator.check_schema(schema)
validator = jsonschema.Draft202012Validator(schema)
for name in sys.argv[2:]:
    print('ok' if validator.is_valid(json.load(open(name))) else 'wrong')
";

const WRONG: [&str; 8] = [
    "providers: {}",
    "listeners: []",
    "listeners: [{ address: '127.0.0.1:1', tsl: {} }]",
    "{ listeners: [{ address: '127.0.0.1:1' }], drain: 30 }",
    "{ listeners: [{ address: '127.0.0.1:1' }], drain: 1y }",
    "{ listeners: [{ address: '127.0.0.1:1' }], kernel: { mode: maybe } }",
    "{ listeners: [{ address: '127.0.0.1:1' }], workers: { threads: 0 } }",
    "{ listeners: [{ address: '127.0.0.1:1' }], keys: [{ name: a, sha256: abc }] }",
];

#[test]
fn the_schema_agrees_with_the_loader() {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/venv/bin/python");
    let has_validator = |python: &Path| {
        let import = Command::new(python).args(["-c", "import jsonschema"]).output();
        import.is_ok_and(|output| output.status.success())
    };
    let pythons = [own.as_path(), Path::new("python3")];
    let Some(python) = pythons.into_iter().find(|python| has_validator(python)) else {
        skip::skipped(
            "jsonschema",
            "no Python with jsonschema in target/venv (tests/setup.sh makes it)",
        );
        return;
    };
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let example = |name: &str| fs::read_to_string(examples.join(name)).unwrap();
    let mut texts = vec![example("gateway.yaml"), example("minimal.yaml")];
    texts.extend(WRONG.map(str::to_owned));

    let dir = tempfile::tempdir().unwrap();
    let schema = dir.path().join("schema.json");
    fs::write(&schema, config::json_schema().to_string()).unwrap();
    let mut command = Command::new(python);
    command.arg("-c").arg(VALIDATE).arg(&schema);
    let mut expected = Vec::new();
    for (index, text) in texts.iter().enumerate() {
        let env = |_: &str| Some("sk-test".to_owned());
        let loads = config::parse(text, "test", &examples, &env).is_ok();
        expected.push(if loads { "ok" } else { "wrong" });
        let instance: Value = serde_saphyr::from_str(text).unwrap();
        let file = dir.path().join(format!("{index}.json"));
        fs::write(&file, instance.to_string()).unwrap();
        command.arg(file);
    }
    assert_eq!(expected.iter().filter(|word| **word == "ok").count(), 2);
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let found = String::from_utf8(output.stdout).unwrap();
    assert_eq!(found.lines().collect::<Vec<_>>(), expected);
}
