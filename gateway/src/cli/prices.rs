//! `gateway prices`: what models cost.

use std::{
    io::{self, BufWriter, Write},
    process::ExitCode,
};

use super::common::ConfigArg;
use crate::{
    config::{self, units::Dollars},
    ledger::prices::{self, Book, Price, Rates, list},
    net::clock,
};

/// List the prices that are built in, or those in force for a configuration
///
/// US dollars per million tokens. Without a configuration to ask about it lists the built-in list prices.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  gateway prices gpt-4.1                  built-in prices of models whose name has this in it
  gateway prices --vendors                whose list prices are built in
  gateway prices --in-force -c gateway.yaml   what each target of the configuration costs now")]
pub struct Args {
    #[command(flatten)]
    config: ConfigArg,
    /// Only models whose name has this text in it
    #[arg(value_name = "TEXT")]
    text: Option<String>,
    /// The names of the vendors in the built-in list
    #[arg(long, conflicts_with_all = ["text", "in_force"])]
    vendors: bool,
    /// The targets of the configuration, with the prices that count for them now
    #[arg(long)]
    in_force: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> ExitCode {
    let mut out = BufWriter::new(io::stdout().lock());
    let printed = if args.vendors {
        list::vendors()
            .iter()
            .try_for_each(|name| writeln!(out, "{name}"))
    } else if args.in_force {
        match config::load(&args.config.config) {
            Ok(config) => print(&mut out, &in_force(args, &config)),
            Err(errors) => {
                eprintln!("{errors}");
                return ExitCode::from(super::common::EXIT_USAGE);
            }
        }
    } else {
        print(&mut out, &built_in(args))
    };
    match printed.and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            eprintln!("gateway prices: {error}");
            ExitCode::FAILURE
        }
        _ => ExitCode::SUCCESS,
    }
}

/// A line: who, which model, at what price.
type Row = (String, String, Option<Price>);

fn is_asked(args: &Args, model: &str) -> bool {
    args.text
        .as_ref()
        .is_none_or(|text| model.contains(text.as_str()))
}

fn built_in(args: &Args) -> Vec<Row> {
    let all = list::all().into_iter().filter(|(_, model)| is_asked(args, model));
    all.map(|(vendor, model)| (vendor.to_owned(), model.to_owned(), list::find(vendor, model)))
        .collect()
}

fn in_force(args: &Args, config: &config::Config) -> Vec<Row> {
    let book = Book::new(config);
    let mut rows = Vec::new();
    for model in &config.models {
        for target in &model.targets {
            let name = target.model.as_deref().unwrap_or(&model.name);
            let vendor = config
                .providers
                .get(&target.provider)
                .and_then(|provider| prices::vendor(&target.provider, provider));
            let price = book.find(&target.provider, vendor.as_deref(), name, clock::unix_ms());
            if is_asked(args, name) {
                rows.push((
                    target.provider.clone(),
                    name.to_owned(),
                    price.map(|price| (*price).clone()),
                ));
            }
        }
    }
    rows.sort();
    rows.dedup();
    rows
}

fn print(out: &mut impl Write, rows: &[Row]) -> io::Result<()> {
    writeln!(
        out,
        "US dollars per million tokens; built-in list of {}",
        list::DATE
    )?;
    let width = |of: fn(&Row) -> &String| rows.iter().map(|row| of(row).len()).max().unwrap_or(0).max(8);
    let (first, second) = (width(|row| &row.0), width(|row| &row.1));
    writeln!(
        out,
        "{:first$}  {:second$}  {:>10} {:>10} {:>10} {:>10} {:>10}  also",
        "provider", "model", "input", "cached", "write 5m", "write 1h", "output"
    )?;
    for (provider, model, price) in rows {
        write!(out, "{provider:first$}  {model:second$}  ")?;
        match price {
            Some(price) => {
                let Rates {
                    input,
                    output,
                    cached,
                    write_5m,
                    write_1h,
                } = price.base;
                for rate in [input, cached, write_5m, write_1h, output] {
                    write!(out, "{:>10} ", Dollars(rate).to_string())?;
                }
                writeln!(out, " {}", also(price))?;
            }
            None => writeln!(out, "{:>10} {:>43}  unknown: no price, cost null", "-", "-")?,
        }
    }
    Ok(())
}

/// Names of the further prices.
fn also(price: &Price) -> String {
    let parts = [
        (price.over.is_some(), "over 200k"),
        (price.priority.is_some(), "priority"),
        (price.flex.is_some(), "flex"),
        (price.batch.is_some(), "batch"),
    ];
    let names: Vec<&str> = parts
        .iter()
        .filter(|(is, _)| *is)
        .map(|(_, name)| *name)
        .collect();
    names.join(", ")
}
