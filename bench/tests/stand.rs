//! The commands from end to end: the built program with its upstream as a process of its own.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("bench/ has a parent")
}

fn bench(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gateway-bench"))
        .args(arguments)
        .current_dir(root())
        .output()
        .expect("the program runs")
}

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// A small scenario in a folder of its own.
fn scenario(folder: &Path) -> PathBuf {
    let path = folder.join("small.yaml");
    let text = "about: a few streams\nfigure: event\nconnections: 4\nwarm_up: 100ms\nwindow: 300ms\nparts:\n  \
                - { name: stream, behaviour: \"tokens=10,pace=5ms,first=0,stamp\" }\n";
    std::fs::write(&path, text).unwrap();
    path
}

#[test]
fn targets_take_turns_and_what_is_missing_is_skipped() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing.yaml");
    std::fs::write(
        &missing,
        "about: x\nneeds: no-such-program\ncommand: [no-such-program]\n",
    )
    .unwrap();
    let broken = folder.path().join("broken.yaml");
    std::fs::write(
        &broken,
        "about: x\nneeds: sh\ncommand: [sh, -c, \"echo bad configuration; exit 1\"]\n",
    )
    .unwrap();
    let out = folder.path().join("out");
    let output = bench(&[
        "compare",
        "--targets",
        &format!("direct,nginx,{},{}", missing.display(), broken.display()),
        "--scenarios",
        &scenario(folder.path()).to_string_lossy(),
        "--rounds",
        "2",
        "--out",
        &out.to_string_lossy(),
    ]);
    let told = text(&output);
    assert_eq!(output.status.code(), Some(0), "{told}");
    assert!(told.contains("no-such-program is not installed"), "{told}");
    assert!(told.contains("bad configuration"), "{told}");
    let page = std::fs::read_to_string(out.join("compare.html")).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.contains("a few streams"));
    let results: serde_json::Value =
        serde_json::from_slice(&std::fs::read(out.join("compare.json")).unwrap()).unwrap();
    let direct = &results["cells"][0];
    assert_eq!(direct["reports"].as_array().unwrap().len(), 2);
    assert!(
        direct["reports"][0]["delay"]["count"].as_u64().unwrap() > 0,
        "{told}"
    );
    if results["targets"][1]["missing"].is_null() {
        let nginx = &results["cells"][1]["reports"][0];
        assert!(
            nginx["processes"].as_array().unwrap().len() >= 2,
            "master and worker are measured: {told}"
        );
    } else {
        println!("skipped: nginx is not installed");
    }
}

#[test]
fn the_capacity_of_the_upstream_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("capacity.json");
    let output = bench(&[
        "capacity",
        "--target",
        "direct",
        "--scenario",
        &scenario(folder.path()).to_string_lossy(),
        "--p99",
        "total=10s",
        "--from",
        "20",
        "--most",
        "40",
        "--window",
        "500ms",
        "--json",
        &json.to_string_lossy(),
    ]);
    let told = text(&output);
    assert!(told.contains("capacity:"), "{told}");
    let found: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert!(!found["steps"].as_array().unwrap().is_empty(), "{told}");
}

#[test]
fn a_soak_tells_memory_and_descriptors() {
    let folder = tempfile::tempdir().unwrap();
    let output = bench(&[
        "soak",
        "--target",
        "direct",
        "--scenario",
        &scenario(folder.path()).to_string_lossy(),
        "--duration",
        "1s",
        "--every",
        "100ms",
    ]);
    let told = text(&output);
    assert!(told.contains("descriptors") && told.contains("memory"), "{told}");
    assert_eq!(output.status.code(), Some(0), "{told}");
}

/// A simulated upstream as a process of its own.
struct Upstream(std::process::Child, String);

impl Upstream {
    fn start(arguments: &[&str]) -> Self {
        use std::io::BufRead;
        let mut child = Command::new(env!("CARGO_BIN_EXE_gateway-bench"))
            .args(["upstream", "--listen", "127.0.0.1:0"])
            .args(arguments)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("the program runs");
        let mut line = String::new();
        std::io::BufReader::new(child.stdout.take().expect("it is piped"))
            .read_line(&mut line)
            .expect("it tells its address");
        let url = line.trim().rsplit_once("on ").expect("it tells its address").1;
        Self(child, format!("{url}/v1/chat/completions"))
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn stages_run_as_long_as_they_say() {
    let upstream = Upstream::start(&["--behaviour", "tokens=1,first=0"]);
    let output = bench(&[
        "load",
        "--url",
        &upstream.1,
        "--plain",
        "--stages",
        "0-100:400ms,100-100:400ms,100-0:400ms",
        "--json",
        "-",
    ]);
    let told = text(&output);
    assert_eq!(output.status.code(), Some(0), "{told}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let elapsed = report["elapsed_s"].as_f64().unwrap();
    assert!((1.15..2.0).contains(&elapsed), "{told}");
    assert_eq!(
        (&report["due"], &report["ok"]),
        (&80.into(), &80.into()),
        "{told}"
    );
}

#[test]
fn a_run_in_which_nothing_worked_says_so() {
    let upstream = Upstream::start(&["--behaviour", "status=401"]);
    let load = |further: &[&str]| {
        let mut arguments = vec!["load", "--url", &upstream.1, "-n", "3"];
        arguments.extend(further);
        bench(&arguments)
    };
    let output = load(&[]);
    let told = text(&output);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(
        told.contains("unexpected status: 3") && told.contains("first answer not wanted: 401 {"),
        "{told}"
    );
    assert_eq!(load(&["--any-status"]).status.code(), Some(0));
}

#[test]
fn a_port_that_another_simulator_has_is_not_shared() {
    let first = Upstream::start(&["--threads", "2"]);
    let address = first.1.trim_start_matches("http://").split('/').next().unwrap();
    for threads in ["1", "2"] {
        let output = bench(&["upstream", "--listen", address, "--threads", threads]);
        assert_eq!(output.status.code(), Some(2));
        assert!(text(&output).contains("in use"), "{}", text(&output));
    }
}

#[test]
fn an_interrupted_run_reports_what_it_has() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("report.json");
    let upstream = Upstream::start(&["--behaviour", "tokens=2,first=0,pace=1ms"]);
    let load = Command::new(env!("CARGO_BIN_EXE_gateway-bench"))
        .args([
            "load",
            "--url",
            &upstream.1,
            "--duration",
            "60s",
            "--progress",
            "--json",
        ])
        .arg(&json)
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // It tells how it goes once a second: by then it listens to signals.
    let mut load = load;
    let mut told = std::io::BufReader::new(load.stderr.take().unwrap());
    std::io::BufRead::read_line(&mut told, &mut String::new()).unwrap();
    let killed = Command::new("kill")
        .args(["-INT", &load.id().to_string()])
        .status();
    assert!(killed.unwrap().success());
    // Who reads nothing more must not hold it up.
    std::io::copy(&mut told, &mut std::io::sink()).unwrap();
    let output = load.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", text(&output));
    assert!(text(&output).contains("INTERRUPTED"), "{}", text(&output));
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert!(report["ok"].as_u64().unwrap() > 0 && report["interrupted"] == true);
}

#[test]
fn a_scenario_says_how_it_is_sent() {
    let folder = tempfile::tempdir().unwrap();
    let (json, html) = (folder.path().join("a.json"), folder.path().join("a.html"));
    let upstream = Upstream::start(&[]);
    let path = scenario(folder.path());
    let mut arguments = vec![
        "load",
        "--url",
        &upstream.1,
        "--key",
        "sk-secret",
        "--max-tokens",
        "3",
    ];
    let (path, json_path, html_path) = (
        path.to_string_lossy(),
        json.to_string_lossy(),
        html.to_string_lossy(),
    );
    arguments.extend(["--scenario", &path, "--json", &json_path, "--html", &html_path]);
    let output = bench(&arguments);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    // The file's four connections and its window, the option's tokens.
    assert_eq!(report["connections_opened"], 4, "{}", text(&output));
    assert!((0.25..0.6).contains(&report["elapsed_s"].as_f64().unwrap()));
    assert_eq!(
        report["tokens"].as_u64().unwrap(),
        3 * report["ok"].as_u64().unwrap()
    );
    let page = std::fs::read_to_string(&html).unwrap();
    assert!(page.contains("--key …") && !page.contains("sk-secret"));
    arguments.push("--plain");
    assert_eq!(bench(&arguments).status.code(), Some(2));
}

#[test]
fn a_soak_of_a_process_that_is_not_there_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = Command::new("true").spawn().unwrap();
    child.wait().unwrap();
    let output = bench(&[
        "soak",
        "--url",
        "http://127.0.0.1:9",
        "--model",
        "sim",
        "--scenario",
        &scenario(folder.path()).to_string_lossy(),
        "--pid",
        &child.id().to_string(),
    ]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("is not there"), "{}", text(&output));
}

#[test]
fn a_capacity_of_which_nothing_is_answered_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    drop(listener);
    let output = bench(&[
        "capacity",
        "--url",
        &format!("http://{addr}"),
        "--model",
        "sim",
        "--scenario",
        &scenario(folder.path()).to_string_lossy(),
        "--p99",
        "total=1s",
        "--window",
        "500ms",
    ]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(
        text(&output).contains("no connection came about"),
        "{}",
        text(&output)
    );
}

#[test]
fn wrong_words_are_told() {
    for (arguments, part) in [
        (&["compare", "--targets", "no-such"][..], "no-such"),
        (&["capacity", "--p99", "speed=1s"], "ttft="),
        (&["load", "--stages", "5"], "FROM-TO:TIME"),
        (&["load", "--trace", "/no/such/file"], "/no/such/file"),
        (&["upstream", "--behaviour", "colour=red"], "colour=red"),
        (&["load", "--html", "/no/such/page"], "/no/such/page"),
        (&["load", "--keys", "/dev/null"], "no key"),
        (&["load", "--pid", "4194305"], "4194305"),
        (&["load", "--system-calls"], "--pid"),
        (&["load", "--trace", "x", "--speed", "0"], "above 0"),
        (
            &[
                "load",
                "--url",
                "http://h/models/a:generateContent",
                "--model",
                "b",
            ],
            "names the model a",
        ),
    ] {
        let output = bench(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(text(&output).contains(part), "{arguments:?}: {}", text(&output));
    }
}
