//! `gateway keys`: virtual keys of a running gateway, or lines for its configuration.

mod offline;

use std::process::ExitCode;

use anyhow::bail;
use clap::{Subcommand, builder::NonEmptyStringValueParser};
use ipnet::IpNet;
use serde_json::{Map, Value, json};

use super::client::{AdminArgs, Client, encoded, exit, print, print_json, table};
use crate::config::{
    check_name,
    units::{Span, parse_span},
};

/// Entries of `gateway keys list` that are asked for at a time.
const PAGE: usize = 500;

/// Make, list, change and end virtual keys
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Create(Create),
    /// Print the SHA-256 of a secret on standard input, for `sha256` of the configuration
    Hash,
    List(List),
    /// Show a key
    Show {
        #[command(flatten)]
        key: KeyArg,
        #[command(flatten)]
        admin: AdminArgs,
    },
    Update(Update),
    Rotate(Rotate),
    Revoke(Revoke),
    /// Forget a key; it ends as if revoked, and its name is free again
    Delete {
        #[command(flatten)]
        key: KeyArg,
        #[command(flatten)]
        admin: AdminArgs,
    },
}

/// Which key.
#[derive(Debug, clap::Args)]
struct KeyArg {
    /// Name or id of the key
    #[arg(value_name = "KEY")]
    key: String,
}

/// What a key may.
#[derive(Debug, clap::Args)]
struct Settings {
    /// Team that the key belongs to
    #[arg(long, value_parser = parse_name)]
    team: Option<String>,
    /// Models that the key may use, separated by commas; all if absent
    #[arg(long, value_delimiter = ',', value_parser = NonEmptyStringValueParser::new())]
    models: Vec<String>,
    /// Organization of a key without a team
    #[arg(long, value_parser = parse_name, conflicts_with = "team")]
    organization: Option<String>,
    /// Networks from which the key may be used, separated by commas; any if absent
    #[arg(long, value_delimiter = ',', value_name = "CIDR")]
    networks: Vec<IpNet>,
    /// Words for people and scripts, separated by commas
    #[arg(long, value_delimiter = ',', value_parser = NonEmptyStringValueParser::new())]
    tags: Vec<String>,
    /// Anything else to note, as NAME=VALUE; may be given several times
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_pair)]
    metadata: Vec<(String, String)>,
    /// A limit of the key's own, for example requests=60,every=1m; amounts: requests, tokens, input_tokens, output_tokens,
    /// usd, parallel; may be given several times, and replaces all that there were
    #[arg(long, value_name = "AMOUNT=N,every=SPAN", value_parser = parse_limit)]
    limit: Vec<Value>,
    /// How long the key lives from now on, for example 30d
    #[arg(long, value_name = "SPAN", value_parser = parse_span)]
    expires_in: Option<Span>,
    /// When the key ends, for example 2027-01-31T00:00:00Z
    #[arg(long, value_name = "MOMENT", conflicts_with = "expires_in")]
    expires_at: Option<String>,
}

/// Make a key in the running gateway, good at once, and print it this once
///
/// With --offline nothing is asked or kept: the key is printed with a line for `keys:` of the
/// configuration, which holds only its SHA-256.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  gateway keys create --name alice
  gateway keys create --name search-prod --team search --models fast,embed --expires-in 90d
  gateway keys create --name alice --json | jq -r .secret
  gateway keys create --name batch --limit requests=60,every=1m --limit parallel=4
  gateway keys create --name alice --offline")]
struct Create {
    /// Unique name of the key, seen in logs and in the ledger
    #[arg(long, value_parser = parse_name)]
    name: String,
    #[command(flatten)]
    settings: Settings,
    /// SHA-256 of a secret that exists already (`gateway keys hash`); none is made then
    #[arg(long, value_name = "HEX", conflicts_with = "offline")]
    sha256: Option<String>,
    /// Print a line for the configuration instead of asking a gateway; takes team and models alone
    #[arg(long, conflicts_with_all = ["organization", "networks", "tags", "metadata", "limit", "expires_in", "expires_at"])]
    offline: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

/// List keys by name, those of the configuration file too
#[derive(Debug, clap::Args)]
struct List {
    /// Only keys of this team
    #[arg(long)]
    team: Option<String>,
    /// Only keys in this state
    #[arg(long, value_parser = ["active", "disabled", "expired", "revoked"])]
    state: Option<String>,
    /// Keys at most
    #[arg(long, default_value_t = 1000)]
    max: usize,
    #[command(flatten)]
    admin: AdminArgs,
}

/// Change a key: what is not named stays
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  gateway keys update alice --disable
  gateway keys update alice --models fast,embed --networks 10.0.0.0/8
  gateway keys update alice --clear team,expires_at")]
struct Update {
    #[command(flatten)]
    key: KeyArg,
    /// A new name; the ledger's records keep the old one
    #[arg(long, value_parser = parse_name)]
    name: Option<String>,
    #[command(flatten)]
    settings: Settings,
    /// Refuse requests with the key; running ones go on
    #[arg(long, conflicts_with = "enable")]
    disable: bool,
    /// Serve requests with the key again
    #[arg(long)]
    enable: bool,
    /// What to take away, separated by commas
    #[arg(long, value_delimiter = ',', value_parser = ["team", "organization", "models", "networks", "tags", "metadata", "limits", "expires_at"])]
    clear: Vec<String>,
    #[command(flatten)]
    admin: AdminArgs,
}

/// Give a key a new secret, and print it this once
#[derive(Debug, clap::Args)]
struct Rotate {
    #[command(flatten)]
    key: KeyArg,
    /// How long the old secret stays good
    #[arg(long, value_name = "SPAN", default_value = "0", value_parser = parse_span)]
    overlap: Span,
    /// SHA-256 of a secret that exists already; none is made then
    #[arg(long, value_name = "HEX")]
    sha256: Option<String>,
    #[command(flatten)]
    admin: AdminArgs,
}

/// End a key for ever, and the requests that run with it
#[derive(Debug, clap::Args)]
struct Revoke {
    #[command(flatten)]
    key: KeyArg,
    /// Let running requests go on to their end
    #[arg(long)]
    finish: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

/// A name that the configuration would take.
pub(super) fn parse_name(text: &str) -> Result<String, String> {
    check_name(text).map(|()| text.to_owned())
}

fn parse_pair(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("write NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

/// `requests=60,every=1m` as the admin API takes it.
fn parse_limit(text: &str) -> Result<Value, String> {
    let mut limit = Map::new();
    for part in text.split(',') {
        let (name, value) = parse_pair(part)?;
        let value: Value = match name.as_str() {
            "usd" => value.into(),
            "every" => parse_span(&value)?.to_string().into(),
            "requests" | "tokens" | "input_tokens" | "output_tokens" | "parallel" => {
                let amount: u64 = value
                    .parse()
                    .map_err(|_| format!("`{name}` is a number, for example {name}=60"))?;
                amount.into()
            }
            _ => return Err(format!("`{name}` is nothing that a limit has")),
        };
        limit.insert(name, value);
    }
    Ok(limit.into())
}

/// Runs the command.
pub fn run(args: &Args) -> ExitCode {
    exit(match &args.command {
        Command::Create(args) if args.offline => offline::create(args),
        Command::Create(args) => create(args),
        Command::Hash => offline::hash(),
        Command::List(args) => list(args),
        Command::Show { key, admin } => {
            Client::new(admin).and_then(|client| show(admin, &find(&client, key)?))
        }
        Command::Update(args) => update(args),
        Command::Rotate(args) => rotate(args),
        Command::Revoke(args) => revoke(args),
        Command::Delete { key, admin } => delete(key, admin),
    })
}

impl Settings {
    /// What was said, as the admin API takes it.
    fn fields(&self) -> Map<String, Value> {
        let mut fields = Map::new();
        let mut put = |name: &str, value: Value| drop(fields.insert(name.to_owned(), value));
        if let Some(team) = &self.team {
            put("team", team.as_str().into());
        }
        if let Some(organization) = &self.organization {
            put("organization", organization.as_str().into());
        }
        if !self.models.is_empty() {
            put("models", json!(self.models));
        }
        if !self.networks.is_empty() {
            put("networks", json!(self.networks));
        }
        if !self.tags.is_empty() {
            put("tags", json!(self.tags));
        }
        if !self.metadata.is_empty() {
            let pairs = self.metadata.iter();
            let object: Map<String, Value> = pairs
                .map(|(name, value)| (name.clone(), value.as_str().into()))
                .collect();
            put("metadata", object.into());
        }
        if !self.limit.is_empty() {
            put("limits", json!(self.limit));
        }
        if let Some(span) = self.expires_in {
            put("expires_in", span.to_string().into());
        }
        if let Some(moment) = &self.expires_at {
            put("expires_at", moment.as_str().into());
        }
        fields
    }
}

/// The key that a command line names: by its name, else by its id.
fn find(client: &Client, key: &KeyArg) -> anyhow::Result<Value> {
    let named = client.get(&format!("/v1/keys?name={}", encoded(&key.key)))?;
    match named["data"].as_array().map(Vec::as_slice).unwrap_or_default() {
        [one] => Ok(one.clone()),
        [] if key.key.starts_with("key_") => client.get(&format!("/v1/keys/{}", encoded(&key.key))),
        [] => bail!("there is no key `{}`", key.key),
        several => {
            let ids: Vec<&str> = several.iter().filter_map(|key| key["id"].as_str()).collect();
            bail!(
                "several keys are called so: name one by its id ({})",
                ids.join(", ")
            )
        }
    }
}

fn path_of(key: &Value) -> String {
    format!("/v1/keys/{}", key["id"].as_str().unwrap_or_default())
}

fn create(args: &Create) -> anyhow::Result<()> {
    let mut body = args.settings.fields();
    body.insert("name".into(), args.name.as_str().into());
    if let Some(sha256) = &args.sha256 {
        body.insert("sha256".into(), sha256.as_str().into());
    }
    let made = Client::new(&args.admin)?.post("/v1/keys", &body.into())?;
    show_secret(&args.admin, &made)
}

fn rotate(args: &Rotate) -> anyhow::Result<()> {
    let client = Client::new(&args.admin)?;
    let path = path_of(&find(&client, &args.key)?);
    let mut body = json!({ "overlap": args.overlap.to_string() });
    if let Some(sha256) = &args.sha256 {
        body["sha256"] = sha256.as_str().into();
    }
    show_secret(&args.admin, &client.post(&format!("{path}/rotate"), &body)?)
}

fn show_secret(admin: &AdminArgs, answer: &Value) -> anyhow::Result<()> {
    if admin.json {
        return print_json(answer);
    }
    match answer["secret"].as_str() {
        Some(secret) => print(&format!(
            "{secret}\n\nIt is good at once, and shown only this once.\n"
        )),
        None => print("The key is good at once with the secret that you have.\n"),
    }
}

fn list(args: &List) -> anyhow::Result<()> {
    let client = Client::new(&args.admin)?;
    let mut filter = format!("limit={}", args.max.clamp(1, PAGE));
    for (name, value) in [("team", &args.team), ("state", &args.state)] {
        if let Some(value) = value {
            filter += &format!("&{name}={}", encoded(value));
        }
    }
    let keys = client.pages("/v1/keys", &filter, args.max)?;
    if args.admin.json {
        return print_json(&keys.into());
    }
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let row = |key: &Value| {
        let models = key["models"].as_array().map_or("all".to_owned(), |models| {
            models
                .iter()
                .filter_map(Value::as_str)
                .collect::<Vec<_>>()
                .join(",")
        });
        vec![
            text(&key["name"]),
            text(&key["state"]),
            text(&key["source"]),
            text(&key["team"]),
            models,
            text(&key["secrets"][0]["hint"]),
            text(&key["expires_at"]),
            text(&key["last_used_at"]),
        ]
    };
    let head = [
        "NAME",
        "STATE",
        "SOURCE",
        "TEAM",
        "MODELS",
        "SECRET",
        "EXPIRES",
        "LAST USED",
    ];
    print(&table(&head, &keys.iter().map(row).collect::<Vec<_>>()))
}

fn update(args: &Update) -> anyhow::Result<()> {
    let client = Client::new(&args.admin)?;
    let path = path_of(&find(&client, &args.key)?);
    let mut body = args.settings.fields();
    for name in &args.clear {
        let empty = match name.as_str() {
            "networks" | "tags" | "limits" => json!([]),
            "metadata" => json!({}),
            _ => Value::Null,
        };
        if body.insert(name.clone(), empty).is_some() {
            bail!("--clear {name} and a new value contradict each other");
        }
    }
    if let Some(name) = &args.name {
        body.insert("name".into(), name.as_str().into());
    }
    if args.disable || args.enable {
        body.insert("disabled".into(), args.disable.into());
    }
    if body.is_empty() {
        bail!("nothing to change was said");
    }
    show(&args.admin, &client.patch(&path, &body.into())?)
}

fn revoke(args: &Revoke) -> anyhow::Result<()> {
    let client = Client::new(&args.admin)?;
    let path = path_of(&find(&client, &args.key)?);
    let running = if args.finish { "finish" } else { "end" };
    let key = client.post(&format!("{path}/revoke"), &json!({ "running": running }))?;
    match args.admin.json {
        true => print_json(&key),
        false => print(&format!("{} is revoked\n", args.key.key)),
    }
}

fn delete(key: &KeyArg, admin: &AdminArgs) -> anyhow::Result<()> {
    let client = Client::new(admin)?;
    client.delete(&path_of(&find(&client, key)?))?;
    match admin.json {
        true => print_json(&json!({ "deleted": key.key })),
        false => print(&format!("{} is gone\n", key.key)),
    }
}

fn show(admin: &AdminArgs, key: &Value) -> anyhow::Result<()> {
    match admin.json {
        true => print_json(key),
        false => print(&super::status::render(key)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read() {
        let limit = parse_limit("requests=60,usd=0.5,every=60s").expect("a limit");
        assert_eq!(limit, json!({ "requests": 60, "usd": "0.5", "every": "1m" }));
        for wrong in ["requests", "requests=x", "colour=1", "requests=1,every=x", ""] {
            assert!(parse_limit(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn names_are_checked_before_a_key_is_made() {
        assert!(parse_name("alice").is_ok());
        for wrong in ["", " a", "a\n", "a\u{7}b", &"x".repeat(129)] {
            assert!(parse_name(wrong).is_err());
        }
    }
}
