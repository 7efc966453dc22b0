//! `gateway kernel`: what the kernel drops, and blocks by hand.

use std::{net::IpAddr, process::ExitCode};

use serde_json::{Value, json};

use super::{
    client::{AdminArgs, Client, exit, print, print_json},
    status::render,
};
use crate::config::units::{Span, parse_span};

/// See and change what the kernel drops
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  gateway kernel status
  gateway kernel block 203.0.113.7 --for 1h
  gateway kernel unblock 203.0.113.7")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Show whether the eBPF programs are loaded, what they dropped, and who is blocked
    Status {
        #[command(flatten)]
        admin: AdminArgs,
    },
    /// Drop a client's new connections in the kernel; open ones go on
    Block {
        /// Address of the client; of an IPv6 client its whole /64 is blocked
        client: IpAddr,
        /// How long, from 1s to 30d
        #[arg(long = "for", value_name = "SPAN", default_value = "10m", value_parser = parse_span)]
        hold: Span,
        #[command(flatten)]
        admin: AdminArgs,
    },
    /// Let a blocked client connect again
    Unblock {
        /// Address of the client
        client: IpAddr,
        #[command(flatten)]
        admin: AdminArgs,
    },
}

/// Runs the command.
pub fn run(args: &Args) -> ExitCode {
    exit(match &args.command {
        Command::Status { admin } => status(admin),
        Command::Block { client, hold, admin } => block(*client, *hold, admin),
        Command::Unblock { client, admin } => unblock(*client, admin),
    })
}

fn status(admin: &AdminArgs) -> anyhow::Result<()> {
    let kernel = Client::new(admin)?.get("/kernel")?;
    show(admin, &kernel, render)
}

fn block(client: IpAddr, hold: Span, admin: &AdminArgs) -> anyhow::Result<()> {
    let body = json!({ "client": client, "for": hold.to_string() });
    let answer = Client::new(admin)?.post("/kernel/block", &body)?;
    show(admin, &answer, |_| format!("{client} is blocked for {hold}\n"))
}

fn unblock(client: IpAddr, admin: &AdminArgs) -> anyhow::Result<()> {
    let answer = Client::new(admin)?.post("/kernel/unblock", &json!({ "client": client }))?;
    show(admin, &answer, |answer| match answer["was_blocked"].as_bool() {
        Some(false) => format!("{client} was not blocked\n"),
        _ => format!("{client} may connect again\n"),
    })
}

fn show(admin: &AdminArgs, answer: &Value, words: impl FnOnce(&Value) -> String) -> anyhow::Result<()> {
    match admin.json {
        true => print_json(answer),
        false => print(&words(answer)),
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
    fn a_block_is_for_ten_minutes_unless_said() {
        let line = Line::try_parse_from(["kernel", "block", "203.0.113.7"]).expect("line");
        let Command::Block { hold, .. } = line.args.command else {
            panic!("not a block");
        };
        assert_eq!(hold, Span::secs(600));
        assert_eq!(
            parse_span(&hold.to_string()),
            Ok(hold),
            "what is sent is understood"
        );
    }

    #[test]
    fn what_is_no_address_or_span_is_refused() {
        assert!(Line::try_parse_from(["kernel", "block", "example.org"]).is_err());
        assert!(Line::try_parse_from(["kernel", "block", "203.0.113.7", "--for", "soon"]).is_err());
        assert!(Line::try_parse_from(["kernel"]).is_err());
    }
}
