//! What several commands have in common.

use std::path::{Path, PathBuf};

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

/// A path of the configuration file `config`: a relative one begins at the file's directory, as it does for the gateway.
pub fn beside(config: &Path, path: &Path) -> PathBuf {
    config.parent().unwrap_or(Path::new("")).join(path)
}

/// Exit code of a configuration that is wrong, and of a wrong command line (clap's own).
pub const EXIT_USAGE: u8 = 2;

#[cfg(test)]
mod tests {
    use clap::{Args as _, Command};

    use crate::cli::{budgets, check, keys, schema};

    #[test]
    fn the_command_lines_are_sound() {
        for command in [
            check::Args::augment_args(Command::new("check")),
            schema::Args::augment_args(Command::new("schema")),
            keys::Args::augment_args(Command::new("keys")),
            budgets::Args::augment_args(Command::new("budgets")),
        ] {
            let mut command = command;
            command.build();
            command.clone().debug_assert();
            assert!(command.get_about().is_some());
        }
    }
}
