//! The text is read back by a reader that takes nothing but what the format allows.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::telemetry::CoreTelemetry;

type Labels = Vec<(String, String)>;

/// One metric as it was read back.
#[derive(Default)]
struct Read {
    kind: String,
    samples: Vec<(String, Labels, f64)>,
}

fn is_name(name: &str) -> bool {
    let first = |c: char| c.is_ascii_alphabetic() || c == '_' || c == ':';
    name.starts_with(first) && name.chars().all(|c| first(c) || c.is_ascii_digit())
}

/// Reads `name{a="b"} 1`.
fn read_sample(line: &str) -> (String, Labels, f64) {
    let end = line.find(['{', ' ']).expect("name and value");
    let (name, mut rest) = line.split_at(end);
    assert!(is_name(name), "{line}");
    let mut labels = Labels::new();
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner;
        loop {
            let (label, value) = rest.split_once("=\"").expect("label");
            assert!(is_name(label), "{line}");
            let (text, after) = read_quoted(value);
            labels.push((label.to_owned(), text));
            rest = after;
            match rest.chars().next() {
                Some(',') => rest = &rest[1..],
                Some('}') => break,
                _ => panic!("{line}"),
            }
        }
        rest = &rest[1..];
    }
    let value = rest.strip_prefix(' ').expect("one space");
    (name.to_owned(), labels, value.parse().expect("a number"))
}

/// Reads up to the closing quote; gives the text and what follows.
fn read_quoted(text: &str) -> (String, &str) {
    let mut out = String::new();
    let mut chars = text.char_indices();
    while let Some((place, c)) = chars.next() {
        match c {
            '"' => return (out, &text[place + 1..]),
            '\\' => match chars.next().expect("escaped").1 {
                'n' => out.push('\n'),
                c @ ('\\' | '"') => out.push(c),
                c => panic!("\\{c}"),
            },
            c => out.push(c),
        }
    }
    panic!("no closing quote: {text}");
}

fn read(text: &str) -> BTreeMap<String, Read> {
    assert!(text.ends_with('\n'));
    let mut metrics: BTreeMap<String, Read> = BTreeMap::new();
    let (mut current, mut helped) = (String::new(), String::new());
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            helped = help.split_once(' ').expect("name and help").0.to_owned();
        } else if let Some(declared) = line.strip_prefix("# TYPE ") {
            let (name, kind) = declared.split_once(' ').expect("name and type");
            assert_eq!(name, helped, "HELP stands before TYPE");
            current = name.to_owned();
            let read = Read {
                kind: kind.to_owned(),
                samples: Vec::new(),
            };
            assert!(metrics.insert(current.clone(), read).is_none(), "{name} twice");
        } else {
            let (name, labels, value) = read_sample(line);
            let metric = metrics.get_mut(&current).expect("TYPE stands before samples");
            let suffix = name
                .strip_prefix(&current)
                .expect("samples of one metric stand together");
            let suffixes: &[&str] = match metric.kind.as_str() {
                "histogram" => &["_bucket", "_sum", "_count"],
                _ => &[""],
            };
            assert!(suffixes.contains(&suffix), "{line}");
            metric.samples.push((name, labels, value));
        }
    }
    metrics
}

fn check(metrics: &BTreeMap<String, Read>) {
    for (name, metric) in metrics {
        assert!(name.starts_with("gateway_"), "{name}");
        assert_eq!(metric.kind == "counter", name.ends_with("_total"), "{name}");
        let series: BTreeSet<_> = metric
            .samples
            .iter()
            .map(|(name, labels, _)| (name, labels))
            .collect();
        assert_eq!(series.len(), metric.samples.len(), "{name} has a series twice");
        if metric.kind == "histogram" {
            check_histogram(name, metric);
        }
    }
}

fn check_histogram(name: &str, metric: &Read) {
    let buckets: Vec<(f64, f64)> = metric
        .samples
        .iter()
        .filter(|(sample, ..)| sample.ends_with("_bucket"))
        .map(|(_, labels, count)| (labels[0].1.parse().expect("le"), *count))
        .collect();
    assert!(
        buckets.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1),
        "{name} {buckets:?}"
    );
    let (last_bound, last_count) = buckets.last().expect("buckets");
    assert!(last_bound.is_infinite());
    let count = metric.samples.last().expect("count");
    assert_eq!(count.0, format!("{name}_count"));
    assert_eq!(count.2, *last_count);
}

fn value(metrics: &BTreeMap<String, Read>, name: &str, labels: &[(&str, &str)]) -> f64 {
    let metric = metrics
        .iter()
        .filter(|(family, _)| name.starts_with(family.as_str()))
        .max_by_key(|(family, _)| family.len())
        .unwrap_or_else(|| panic!("no {name}"))
        .1;
    let wanted: Labels = labels
        .iter()
        .map(|(a, b)| ((*a).to_owned(), (*b).to_owned()))
        .collect();
    metric
        .samples
        .iter()
        .find(|(sample, labels, _)| sample == name && *labels == wanted)
        .unwrap_or_else(|| panic!("no {name} {labels:?}"))
        .2
}

#[test]
fn what_was_counted_can_be_read_back() {
    let cores = [CoreTelemetry::new(0), CoreTelemetry::new(1)];
    for core in &cores {
        core.counters().requests.add(2);
        core.counters().response(429);
        core.counters().refuse(Refusal::RateLimited);
        core.counters().tokens_prompt.add(7);
        core.beat(1_000);
    }
    let mut latencies = Latencies::default();
    latencies.ttft.record(20_000, 3);
    latencies.ttft.record(30_000_000, 1);
    let shared: Vec<_> = cores.iter().map(|core| core.shared().clone()).collect();
    let text = render(&Sources {
        version: "1.2.3",
        start_unix_s: 1_769_860_800,
        now_ms: 1_500,
        cores: &shared,
        latencies: &latencies,
    });
    let metrics = read(&text);
    check(&metrics);
    assert_eq!(
        value(&metrics, "gateway_build_info", &[("version", "1.2.3")]),
        1.0
    );
    assert_eq!(value(&metrics, "gateway_requests_total", &[]), 4.0);
    assert_eq!(
        value(&metrics, "gateway_responses_total", &[("code", "429")]),
        2.0
    );
    assert_eq!(
        value(&metrics, "gateway_refusals_total", &[("reason", "rate_limited")]),
        2.0
    );
    assert_eq!(
        value(&metrics, "gateway_tokens_total", &[("type", "input")]),
        14.0
    );
    assert_eq!(
        value(&metrics, "gateway_core_requests_total", &[("core", "1")]),
        2.0
    );
    assert_eq!(
        value(&metrics, "gateway_core_heartbeat_age_seconds", &[("core", "0")]),
        0.5
    );
    let bucket = "gateway_time_to_first_token_seconds_bucket";
    assert_eq!(value(&metrics, bucket, &[("le", "0.01")]), 0.0);
    assert_eq!(value(&metrics, bucket, &[("le", "0.02")]), 3.0);
    assert_eq!(value(&metrics, bucket, &[("le", "10")]), 3.0);
    assert_eq!(value(&metrics, bucket, &[("le", "+Inf")]), 4.0);
    assert_eq!(
        value(&metrics, "gateway_time_to_first_token_seconds_sum", &[]),
        30.06
    );
    assert!(value(&metrics, "gateway_resident_memory_bytes", &[]) > 0.0);
}

#[test]
fn a_label_may_hold_anything() {
    let odd = "a\\b\"c\nd,e}f";
    let mut out = Exposition::default();
    out.gauge("gateway_odd", "Two\nlines.")
        .sample(&[("name", odd), ("other", "")], 1)
        .sample(&[("name", "plain"), ("other", odd)], 2.5);
    let metrics = read(&out.finish());
    assert_eq!(
        value(&metrics, "gateway_odd", &[("name", odd), ("other", "")]),
        1.0
    );
    assert_eq!(
        value(&metrics, "gateway_odd", &[("name", "plain"), ("other", odd)]),
        2.5
    );
}

#[test]
fn all_bounds_ascend() {
    assert!(TTFT_BOUNDS_US.is_sorted());
    assert!(INTER_TOKEN_BOUNDS_US.is_sorted());
    assert!(TOTAL_BOUNDS_US.is_sorted());
    assert!(OVERHEAD_BOUNDS_US.is_sorted());
}
