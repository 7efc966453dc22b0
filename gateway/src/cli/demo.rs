//! `gateway demo`: a small simulated fleet, the gateway in front of it, and a client that walks through what the gateway
//! is for. The gateway is `gateway run` with a configuration of the demo's own, the fleet is `gateway-bench upstream`;
//! both are processes of their own, all traffic goes through sockets on loopback.

mod client;
mod stage;
mod walk;

use std::process::ExitCode;

use stage::Stage;

/// See the gateway work: a simulated fleet, real sockets, no accounts
///
/// Shows a streamed answer, its usage, what the key has left, the ledger's record, what a refused client gets, and,
/// where BPF may be loaded, that the kernel then drops it. Then serves until Ctrl-C.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  gateway demo
  gateway demo --once      end after the walk; exit code 0 only if every step did what it says")]
pub struct Args {
    /// End after the walk
    #[arg(long)]
    once: bool,
    /// Port of the gateway on 127.0.0.1; 0 picks a free one
    #[arg(long, default_value_t = 8080, value_name = "PORT")]
    port: u16,
}

/// Runs the command.
pub fn run(args: &Args) -> ExitCode {
    match play(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn play(args: &Args) -> anyhow::Result<()> {
    let mut stage = Stage::set(args.port)?;
    let walked = walk::walk(&stage);
    if args.once || walked.is_err() {
        if walked.is_err() {
            stage.show_log();
        }
        stage.strike();
        walked?;
        println!("demo: ok");
        return Ok(());
    }
    println!("\nThe gateway serves until Ctrl-C. Try:\n");
    println!("  endpoint  http://{}/v1", stage.gateway);
    println!("  key       {}\n", stage.key);
    println!(
        "  curl -N http://{}/v1/chat/completions -H 'Authorization: Bearer {}' \\",
        stage.gateway, stage.key
    );
    println!("    -d '{}'\n", walk::request_body(20));
    println!(
        "  {} status -c {}",
        stage.program.display(),
        stage.config.display()
    );
    println!(
        "  {} usage -c {}\n",
        stage.program.display(),
        stage.config.display()
    );
    stage.wait()
}
