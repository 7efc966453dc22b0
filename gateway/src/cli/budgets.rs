//! `gateway budgets`: what may be spent, and prepaid credit.

use std::process::ExitCode;

use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::client::{AdminArgs, Client, encoded, exit, print, print_json, table};
use crate::config::{
    sha256_hex,
    units::{Span, parse_span},
};

/// Entries of `gateway budgets list` that are asked for at a time.
const PAGE: usize = 500;

/// List, set and delete budgets, and add prepaid credit
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  gateway budgets set team search --usd 500 --every 1mo --alerts 50,80,100
  gateway budgets set key alice
  gateway budgets topup key alice 25 --reference invoice-4711
  gateway budgets set gateway --usd 20000 --every 1mo --time-zone Europe/Berlin --on-exhausted error")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List budgets by name, those of the configuration file too, and how they stand
    List {
        /// Only budgets of this scope
        #[arg(long)]
        scope: Option<Scope>,
        /// Budgets at most
        #[arg(long, default_value_t = 1000)]
        max: usize,
        #[command(flatten)]
        admin: AdminArgs,
    },
    /// Make a budget, or change it to this
    Set {
        #[command(flatten)]
        subject: Subject,
        /// Dollars a period, for example 12.50; absent: prepaid credit
        #[arg(long, requires = "every")]
        usd: Option<String>,
        /// The period, for example 1d or 1mo
        #[arg(long, value_name = "SPAN", value_parser = parse_span, requires = "usd")]
        every: Option<Span>,
        /// Time zone of periods of the calendar (1h, 1d, 1w, 1mo), for example Europe/Berlin; absent: UTC
        #[arg(long, value_name = "ZONE", requires = "every")]
        time_zone: Option<String>,
        /// Percents of use at which somebody is told, separated by commas
        #[arg(long, value_delimiter = ',')]
        alerts: Vec<u16>,
        /// Only tell, and refuse nothing
        #[arg(long)]
        soft: bool,
        /// How a running stream ends when nothing is left: as though it had come to its length, or with an error
        #[arg(long, value_enum, default_value_t = OnExhausted::Finish)]
        on_exhausted: OnExhausted,
        /// What becomes of requests for a model without a price
        #[arg(long, value_enum, default_value_t = Unpriced::Refuse)]
        unpriced: Unpriced,
        #[command(flatten)]
        admin: AdminArgs,
    },
    /// Add prepaid credit, once for each reference
    Topup {
        /// Who has the budget
        scope: Scope,
        /// Name of the key, team or organization; `all` for the gateway
        name: String,
        /// Dollars, for example 25; negative takes credit back
        #[arg(allow_hyphen_values = true)]
        usd: String,
        /// A word for this top-up: again with it, nothing is added twice. Absent: a new one
        #[arg(long)]
        reference: Option<String>,
        #[command(flatten)]
        admin: AdminArgs,
    },
    /// Forget a budget and its credit
    Delete {
        #[command(flatten)]
        subject: Subject,
        #[command(flatten)]
        admin: AdminArgs,
    },
}

/// How a running stream ends when nothing is left.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum OnExhausted {
    Finish,
    Error,
}

/// What becomes of a request whose cost nobody knows.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Unpriced {
    Refuse,
    Allow,
}

/// The word of a choice, as the command line and the API have it.
fn word(choice: impl ValueEnum) -> String {
    let value = choice.to_possible_value();
    value.map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// Who has a budget.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Scope {
    Key,
    Team,
    Organization,
    Gateway,
}

impl Scope {
    fn name(self) -> &'static str {
        match self {
            Scope::Key => "key",
            Scope::Team => "team",
            Scope::Organization => "organization",
            Scope::Gateway => "gateway",
        }
    }
}

#[derive(Debug, clap::Args)]
struct Subject {
    /// Who has the budget
    scope: Scope,
    /// Name of the key, team or organization; the gateway needs none
    #[arg(default_value = "all", default_value_if("scope", "gateway", "all"))]
    name: String,
}

fn path_of(scope: Scope, name: &str) -> String {
    format!("/v1/budgets/{}/{}", scope.name(), encoded(name))
}

/// Runs the command.
pub fn run(args: &Args) -> ExitCode {
    exit(match &args.command {
        Command::List { scope, max, admin } => list(*scope, *max, admin),
        Command::Set {
            subject,
            usd,
            every,
            time_zone,
            alerts,
            soft,
            on_exhausted,
            unpriced,
            admin,
        } => {
            let mut body = json!({
                "alerts": alerts,
                "hard": !soft,
                "on_exhausted": word(*on_exhausted),
                "unpriced": word(*unpriced),
            });
            if let Some(zone) = time_zone {
                body["time_zone"] = zone.as_str().into();
            }
            if let Some(usd) = usd {
                body["usd"] = usd.as_str().into();
            }
            if let Some(every) = every {
                body["every"] = every.to_string().into();
            }
            let path = path_of(subject.scope, &subject.name);
            Client::new(admin).and_then(|client| show(admin, &client.put(&path, &body)?))
        }
        Command::Topup {
            scope,
            name,
            usd,
            reference,
            admin,
        } => top_up(*scope, name, usd, reference.as_deref(), admin),
        Command::Delete { subject, admin } => {
            let path = path_of(subject.scope, &subject.name);
            Client::new(admin).and_then(|client| {
                client.delete(&path)?;
                show(admin, &json!({ "deleted": subject.name }))
            })
        }
    })
}

fn top_up(
    scope: Scope,
    name: &str,
    usd: &str,
    reference: Option<&str>,
    admin: &AdminArgs,
) -> anyhow::Result<()> {
    let reference = match reference {
        Some(reference) => reference.to_owned(),
        None => {
            let mut random = [0; 32];
            getrandom::fill(&mut random).map_err(|error| anyhow::anyhow!("no random bytes: {error}"))?;
            sha256_hex(&random)[..32].to_owned()
        }
    };
    let body = json!({ "usd": usd, "reference": reference });
    let path = format!("{}/topups", path_of(scope, name));
    let answer = Client::new(admin)?.post(&path, &body).map_err(|error| {
        error.context(format!(
            "it may have been added or not: say it again with --reference {reference}"
        ))
    })?;
    show(admin, &answer)
}

fn list(scope: Option<Scope>, max: usize, admin: &AdminArgs) -> anyhow::Result<()> {
    let mut filter = format!("limit={}", max.clamp(1, PAGE));
    if let Some(scope) = scope {
        filter += &format!("&scope={}", scope.name());
    }
    let budgets = Client::new(admin)?.pages("/v1/budgets", &filter, max)?;
    if admin.json {
        return print_json(&budgets.into());
    }
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let row = |budget: &Value| {
        let hard = budget["hard"].as_bool().unwrap_or_default();
        vec![
            text(&budget["scope"]),
            text(&budget["name"]),
            text(&budget["source"]),
            text(&budget["usd"]),
            text(&budget["every"]),
            text(&budget["credit_usd"]),
            text(&budget["spent_usd"]),
            text(&budget["reserved_usd"]),
            text(&budget["left_usd"]),
            text(&budget["resets_at"]),
            percents(&budget["alerts_told"]),
            if hard { "hard" } else { "soft" }.to_owned(),
        ]
    };
    let head = [
        "SCOPE", "NAME", "SOURCE", "USD", "EVERY", "CREDIT", "SPENT", "RESERVED", "LEFT", "RESETS", "TOLD",
        "KIND",
    ];
    print(&table(&head, &budgets.iter().map(row).collect::<Vec<_>>()))
}

/// `50%,80%`, or `-` for none.
fn percents(list: &Value) -> String {
    let list = list.as_array().map(Vec::as_slice).unwrap_or_default();
    let words: Vec<String> = list.iter().map(|percent| format!("{percent}%")).collect();
    match words.is_empty() {
        true => "-".into(),
        false => words.join(","),
    }
}

fn show(admin: &AdminArgs, answer: &Value) -> anyhow::Result<()> {
    match admin.json {
        true => print_json(answer),
        false => print(&super::status::render(answer)),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn lines_are_read() {
        for line in [
            &["budgets", "list", "--scope", "team"][..],
            &["budgets", "set", "gateway"],
            &[
                "budgets",
                "set",
                "gateway",
                "--usd",
                "5",
                "--every",
                "1d",
                "--time-zone",
                "Asia/Tokyo",
                "--on-exhausted",
                "error",
                "--unpriced",
                "allow",
            ],
            &[
                "budgets", "set", "team", "search", "--usd", "5", "--every", "1mo", "--alerts", "50,80",
            ],
            &["budgets", "topup", "key", "alice", "-2.5"],
            &["budgets", "delete", "gateway"],
        ] {
            Line::try_parse_from(line).unwrap_or_else(|error| panic!("{error}"));
        }
        for line in [
            &["budgets", "set", "team", "search", "--every", "1mo"][..],
            &["budgets", "set", "team", "search", "--usd", "5"],
            &["budgets", "set", "team", "search", "--unpriced", "perhaps"],
            &["budgets", "set", "planet", "x"],
        ] {
            assert!(Line::try_parse_from(line).is_err(), "{line:?}");
        }
        assert_eq!(path_of(Scope::Team, "a/b c"), "/v1/budgets/team/a%2Fb%20c");
    }
}
