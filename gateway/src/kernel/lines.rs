//! The programs' log lines, told on to `tracing`.

use log::{Level, Log, Metadata, Record};

/// A `log` sink, because aya-log writes to one; its lines then stand among the gateway's own.
#[derive(Debug, Default)]
pub struct ToTracing;

impl Log for ToTracing {
    fn enabled(&self, _: &Metadata) -> bool {
        true
    }

    fn log(&self, record: &Record) {
        let program = record.target();
        match record.level() {
            Level::Error => tracing::error!(target: "gateway::kernel", program, "{}", record.args()),
            Level::Warn => tracing::warn!(target: "gateway::kernel", program, "{}", record.args()),
            Level::Info => tracing::info!(target: "gateway::kernel", program, "{}", record.args()),
            Level::Debug => tracing::debug!(target: "gateway::kernel", program, "{}", record.args()),
            Level::Trace => tracing::trace!(target: "gateway::kernel", program, "{}", record.args()),
        }
    }

    fn flush(&self) {}
}
