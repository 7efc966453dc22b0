//! What several commands have in common.

use std::path::PathBuf;

use clap::Args;

/// Where the package installs the configuration.
pub const CONFIG_PATH: &str = "/etc/gateway/gateway.yaml";

/// Which configuration file a command reads.
#[derive(Debug, Clone, Args)]
pub struct ConfigArg {
    /// The configuration file
    #[arg(short = 'c', long = "config", env = "GATEWAY_CONFIG", value_name = "FILE", default_value = CONFIG_PATH)]
    pub config: PathBuf,
}

/// Exit code of a configuration that is wrong, and of a wrong command line (clap's own).
pub const EXIT_USAGE: u8 = 2;
