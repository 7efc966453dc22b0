//! `gateway limits`: the limit policies in force, and how those of a key stand.

use std::{net::IpAddr, process::ExitCode};

use serde_json::Value;

use super::client::{AdminArgs, Client, encoded, exit, print, print_json, table};

/// Entries that are asked for at a time.
const PAGE: usize = 500;

/// List limit policies in their order; with --key those that may bind its requests, and what they have left
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  gateway limits
  gateway limits --key alice
  gateway limits --key alice --model fast --user bob")]
pub struct Args {
    /// Name of a key
    #[arg(long)]
    key: Option<String>,
    /// Virtual model of its requests
    #[arg(long, requires = "key")]
    model: Option<String>,
    /// User that its requests name
    #[arg(long, requires = "key")]
    user: Option<String>,
    /// Provider that they are sent to
    #[arg(long, requires = "key")]
    provider: Option<String>,
    /// Path of its requests, for example /v1/embeddings
    #[arg(long, requires = "key")]
    path: Option<String>,
    /// Address that they come from
    #[arg(long, requires = "key")]
    client: Option<IpAddr>,
    /// Limits at most
    #[arg(long, default_value_t = 1000)]
    max: usize,
    #[command(flatten)]
    admin: AdminArgs,
}

/// Runs the command.
pub fn run(args: &Args) -> ExitCode {
    exit(list(args))
}

fn list(args: &Args) -> anyhow::Result<()> {
    let mut filter = format!("limit={}", args.max.clamp(1, PAGE));
    let client = args.client.map(|client| client.to_string());
    for (name, value) in [
        ("key", &args.key),
        ("model", &args.model),
        ("user", &args.user),
        ("provider", &args.provider),
        ("path", &args.path),
        ("client", &client),
    ] {
        if let Some(value) = value {
            filter += &format!("&{name}={}", encoded(value));
        }
    }
    let limits = Client::new(&args.admin)?.pages("/v1/limits", &filter, args.max)?;
    if args.admin.json {
        return print_json(&limits.into());
    }
    let head = [
        "NAME", "SOURCE", "COUNTS", "AMOUNT", "EVERY", "PER", "MATCH", "LEFT", "RESETS",
    ];
    print(&table(&head, &limits.iter().map(row).collect::<Vec<_>>()))
}

fn row(limit: &Value) -> Vec<String> {
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let per = limit["per"].as_array().map(Vec::as_slice).unwrap_or_default();
    let per: Vec<&str> = per.iter().filter_map(Value::as_str).collect();
    let matches = limit["match"].as_object().into_iter().flatten();
    let matches: Vec<String> = matches
        .filter(|(_, wanted)| !wanted.is_null())
        .map(|(name, wanted)| match wanted.as_str() {
            Some(wanted) => format!("{name}={wanted}"),
            None => format!("{name}={wanted}"),
        })
        .collect();
    vec![
        text(&limit["name"]),
        text(&limit["source"]),
        text(&limit["counts"]),
        text(&limit["amount"]),
        text(&limit["every"]),
        per.join(","),
        if matches.is_empty() {
            "all".to_owned()
        } else {
            matches.join(" ")
        },
        text(&limit["standing"]["left"]),
        text(&limit["standing"]["resets_at"]),
    ]
}
