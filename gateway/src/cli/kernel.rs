//! `gateway kernel`: what the kernel drops, and blocks by hand.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;

use serde_json::{Value, json};

use super::{
    client::{AdminArgs, Client, exit, print, print_json},
    status::render,
};
use crate::{
    config::units::{Span, parse_span},
    control::admin::kernel::Target,
    kernel,
};

/// See and change what the kernel drops
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  gateway kernel status
  gateway kernel clients --max 10
  gateway kernel block 203.0.113.7 --for 1h
  gateway kernel block 198.51.100.0/24
  gateway kernel unblock 203.0.113.7
  gateway kernel clear")]
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
    /// Show the clients with the most open connections, as the kernel counts them
    Clients {
        /// How many, at most 1000
        #[arg(long, value_name = "COUNT", default_value_t = 20)]
        max: usize,
        #[command(flatten)]
        admin: AdminArgs,
    },
    /// Drop new connections of a client or a network in the kernel; open ones go on
    Block {
        /// Address of a client, of which all of its prefix is blocked (IPv6: its /64), or a network: 203.0.113.0/24
        #[arg(value_name = "ADDRESS|NETWORK", value_parser = parse_target)]
        client: Text,
        /// How long, from 1s to 30d
        #[arg(long = "for", value_name = "SPAN", default_value = "10m", value_parser = parse_span)]
        hold: Span,
        #[command(flatten)]
        admin: AdminArgs,
    },
    /// Let a blocked client or network connect again
    Unblock {
        /// Address of the client, or the network as it was blocked
        #[arg(value_name = "ADDRESS|NETWORK", value_parser = parse_target)]
        client: Text,
        #[command(flatten)]
        admin: AdminArgs,
    },
    /// Remove the blocks and counts that gateways which run no more left in the kernel; for root, without the admin API
    Clear {
        /// Only those of this instance (`kernel.instance`, or the folder's name)
        #[arg(long)]
        instance: Option<String>,
        /// Where the BPF file system is mounted
        #[arg(long, value_name = "PATH", default_value = "/sys/fs/bpf")]
        bpffs: PathBuf,
    },
}

/// A target that was found to be one, as it was written.
type Text = String;

fn parse_target(text: &str) -> Result<Text, String> {
    text.parse::<Target>().map(|_| text.to_owned())
}

/// Runs the command.
pub fn run(args: &Args) -> ExitCode {
    exit(match &args.command {
        Command::Status { admin } => status(admin),
        Command::Clients { max, admin } => clients(*max, admin),
        Command::Block { client, hold, admin } => block(client, *hold, admin),
        Command::Unblock { client, admin } => unblock(client, admin),
        Command::Clear { instance, bpffs } => clear(instance.as_deref(), bpffs),
    })
}

fn status(admin: &AdminArgs) -> anyhow::Result<()> {
    let kernel = Client::new(admin)?.get("/kernel")?;
    show(admin, &kernel, render)
}

fn clients(max: usize, admin: &AdminArgs) -> anyhow::Result<()> {
    let clients = Client::new(admin)?.get(&format!("/kernel/clients?max={max}"))?;
    show(admin, &clients, |answer| {
        let mut answer = answer.clone();
        for client in answer["clients"].as_array_mut().into_iter().flatten() {
            // A histogram is no cell of a table; `--json` has it.
            client.as_object_mut().map(|client| client.remove("life_log2_ms"));
        }
        render(&answer)
    })
}

fn block(client: &str, hold: Span, admin: &AdminArgs) -> anyhow::Result<()> {
    let body = json!({ "client": client, "for": hold.to_string() });
    let answer = Client::new(admin)?.post("/kernel/block", &body)?;
    show(admin, &answer, |answer| {
        format!("{} is blocked for {hold}\n", net(answer, client))
    })
}

fn unblock(client: &str, admin: &AdminArgs) -> anyhow::Result<()> {
    let answer = Client::new(admin)?.post("/kernel/unblock", &json!({ "client": client }))?;
    show(admin, &answer, |answer| {
        let net = net(answer, client);
        match answer["was_blocked"].as_bool() {
            Some(false) => format!("{net} was not blocked\n"),
            _ => format!("{net} may connect again\n"),
        }
    })
}

/// The network that an answer is about.
fn net<'a>(answer: &'a Value, client: &'a str) -> &'a str {
    answer["net"].as_str().unwrap_or(client)
}

fn clear(instance: Option<&str>, bpffs: &Path) -> anyhow::Result<()> {
    let removed = kernel::remove_pins(bpffs, instance);
    let removed = removed.with_context(|| format!("cannot read {}", bpffs.display()))?;
    if removed.is_empty() {
        return print("nothing is left by gateways that do not run\n");
    }
    print(&format!("removed: {}\n", removed.join(", ")))
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
