//! `gateway top`: who uses the gateway now, as a live table.

mod screen;
mod table;

use std::{
    io::IsTerminal,
    process::ExitCode,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::client::{AdminArgs, Client, exit, print, print_json};
use crate::{
    config::units::{Span, parse_span},
    control::admin::top::Sort,
};
use screen::{Key, Screen};
use table::Rates;

/// Shortest time between two looks: each walks the kernel's map of clients.
const EVERY_MIN: Duration = Duration::from_millis(200);

/// Rows that are asked for where nobody scrolls.
const ROWS: usize = 50;

/// Watch clients and keys: connections, requests, tokens, refusals, bytes, round trip times
///
/// While it runs: c connections, b bytes, t tokens, r requests, f refusals, l round trip time, space pauses, q ends.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  gateway top
  gateway top --sort refusals --every 5s
  gateway top --once | head -20
  gateway top --json | jq '.clients[0]'

Exit code: 0 it was ended, 1 no gateway answered.")]
pub struct Args {
    /// What stands first
    #[arg(long, value_enum, default_value_t)]
    sort: Sort,
    /// Time between two looks, at least 200ms
    #[arg(long, value_name = "SPAN", default_value = "2s", value_parser = parse_span)]
    every: Span,
    /// Rows of clients and of keys, 1 to 1000
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    rows: Option<u16>,
    /// Print the table once and end; so does an output that is no terminal
    #[arg(long)]
    once: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

/// Runs the command.
pub fn run(args: &Args) -> ExitCode {
    exit(show(args))
}

fn show(args: &Args) -> anyhow::Result<()> {
    let client = Client::new(&args.admin)?;
    let rows = args.rows.map_or(ROWS, usize::from);
    let state = look(&client, args.sort, rows)?;
    if args.admin.json {
        return print_json(&state);
    }
    if args.once || !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
        let mut text = table::render(&state, args.sort, &Rates::default(), None).join("\n");
        text.push('\n');
        return print(&text);
    }
    watch(args, &client, rows, state)
}

fn look(client: &Client, sort: Sort, rows: usize) -> anyhow::Result<Value> {
    client.get(&format!("/top?sort={}&limit={rows}", sort.name()))
}

/// Draws until it is ended. What a look fails with is shown in place of the table, and it goes on: the gateway may be
/// restarted meanwhile.
fn watch(args: &Args, client: &Client, rows: usize, first: Value) -> anyhow::Result<()> {
    let every = args.every.0.max(EVERY_MIN);
    let mut screen = Screen::enter()?;
    let (mut sort, mut paused) = (args.sort, false);
    let mut rates = Rates::default();
    rates.learn(&first);
    let mut shown = Ok(first);
    let mut due = Instant::now() + every;
    loop {
        let (width, height) = screen.size();
        let mut lines = match &shown {
            Ok(state) => table::render(state, sort, &rates, Some((width, height))),
            Err(error) => vec![format!("gateway top: {error:#}")],
        };
        if paused {
            lines.insert(0, "paused: space goes on".into());
        }
        screen.draw(&lines)?;
        let wait = if paused {
            every
        } else {
            due.saturating_duration_since(Instant::now())
        };
        let asked = match screen.key(wait)? {
            Some(Key::End) => return Ok(()),
            Some(Key::Pause) => {
                paused = !paused;
                !paused
            }
            Some(Key::Sort(wanted)) => {
                sort = wanted;
                true
            }
            Some(Key::Redraw) => false,
            None => !paused,
        };
        if asked {
            shown = look(client, sort, rows.max(usize::from(height)));
            if let Ok(state) = &shown {
                rates.learn(state);
            }
            due = Instant::now() + every;
        }
    }
}
