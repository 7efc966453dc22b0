//! The program's own log: `tracing` to standard error, as text or as JSON.
//!
//! Records of crates that use `log` (aya-log, rustls) come out the same way.

use std::{fmt, io, sync::OnceLock};

use tracing_subscriber::{EnvFilter, Registry, fmt::MakeWriter, layer::SubscriberExt, reload};

use crate::config::schema::{Log, LogFormat};

/// Changes the level of the running log; there is one after [`init`].
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Why the log could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// `log.level` is not a level or filter.
    #[error(
        "`{level}` is not a log level: {reason}; write error, warn, info, debug, trace or a filter such as info,gateway::kernel=debug"
    )]
    Level { level: String, reason: String },
    /// [`init`] was called before.
    #[error("the log is set up already")]
    Twice,
}

/// Starts the log. Call once, before any thread starts.
///
/// # Errors
/// The level is not understood, or a log was started before.
pub fn init(config: &Log) -> Result<(), LogError> {
    let (filter, handle) = reload::Layer::new(filter(&config.level)?);
    let registry = tracing_subscriber::registry().with(filter);
    match config.format {
        LogFormat::Text => install(registry.with(text_layer(io::stderr))),
        LogFormat::Json => install(registry.with(json_layer(io::stderr))),
    }?;
    log::set_logger(&BRIDGE).map_err(|_| LogError::Twice)?;
    // The filter decides; what is set here only spares the bridge records that nobody could want.
    log::set_max_level(log::LevelFilter::Debug);
    let _ = FILTER.set(handle);
    Ok(())
}

/// Sets the level of the running log, after a reload. The format stays what it was at start.
///
/// # Errors
/// The level is not understood; the old one stays.
pub fn set_level(level: &str) -> Result<(), LogError> {
    let filter = filter(level)?;
    if let Some(handle) = FILTER.get() {
        handle.reload(filter).map_err(|error| LogError::Level {
            level: level.to_owned(),
            reason: error.to_string(),
        })?;
    }
    Ok(())
}

/// Checks `log.level` of a configuration.
///
/// # Errors
/// The level is not understood.
pub fn check_level(level: &str) -> Result<(), LogError> {
    filter(level).map(drop)
}

fn filter(level: &str) -> Result<EnvFilter, LogError> {
    EnvFilter::try_new(level).map_err(|error| LogError::Level {
        level: level.to_owned(),
        reason: error.to_string(),
    })
}

fn install(subscriber: impl tracing::Subscriber + Send + Sync) -> Result<(), LogError> {
    tracing::subscriber::set_global_default(subscriber).map_err(|_| LogError::Twice)
}

fn text_layer<S, W>(writer: W) -> impl tracing_subscriber::Layer<S>
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + 'static,
{
    // Colours only for a person at a terminal; the journal keeps bytes as they are.
    let ansi = io::IsTerminal::is_terminal(&io::stderr());
    tracing_subscriber::fmt::layer()
        .with_ansi(ansi)
        .with_writer(writer)
}

fn json_layer<S, W>(writer: W) -> impl tracing_subscriber::Layer<S>
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + 'static,
{
    tracing_subscriber::fmt::layer()
        .json()
        .flatten_event(true)
        .with_current_span(false)
        .with_span_list(false)
        .with_writer(writer)
}

/// Passes records of the `log` crate on as tracing events.
struct Bridge;

static BRIDGE: Bridge = Bridge;

impl log::Log for Bridge {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        // tracing wants a call site for each target, and those are static; the check is made below.
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        forward(record.level(), record.target(), record.args());
    }

    fn flush(&self) {}
}

/// One static call site a level; the record's own target becomes a field.
fn forward(level: log::Level, source: &str, message: &fmt::Arguments<'_>) {
    match level {
        log::Level::Error => tracing::error!(target: "log", source, "{message}"),
        log::Level::Warn => tracing::warn!(target: "log", source, "{message}"),
        log::Level::Info => tracing::info!(target: "log", source, "{message}"),
        log::Level::Debug => tracing::debug!(target: "log", source, "{message}"),
        log::Level::Trace => tracing::trace!(target: "log", source, "{message}"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Memory(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Memory {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("memory").extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What is logged by `act`, as JSON lines, at this level.
    fn logged(level: &str, act: impl FnOnce()) -> Vec<serde_json::Value> {
        let memory = Memory::default();
        let writer = memory.clone();
        let layer = json_layer(move || writer.clone());
        let subscriber = tracing_subscriber::registry()
            .with(filter(level).expect("level"))
            .with(layer);
        tracing::subscriber::with_default(subscriber, act);
        let bytes = memory.0.lock().expect("memory").clone();
        String::from_utf8(bytes)
            .expect("utf-8")
            .lines()
            .map(|line| serde_json::from_str(line).expect("json"))
            .collect()
    }

    #[test]
    fn records_of_the_log_crate_are_passed_on() {
        let lines = logged("info", || {
            let record = log::Record::builder()
                .level(log::Level::Warn)
                .target("aya_log")
                .args(format_args!("dropped a client"))
                .build();
            log::Log::log(&BRIDGE, &record);
        });
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0]["level"], "WARN");
        assert_eq!(lines[0]["source"], "aya_log");
        assert_eq!(lines[0]["message"], "dropped a client");
    }

    #[test]
    fn the_filter_holds() {
        let lines = logged("warn", || {
            tracing::info!("not this");
            tracing::warn!(answer = 42, "this");
        });
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0]["answer"], 42);
    }

    #[test]
    fn a_level_that_is_none_is_an_error() {
        assert!(check_level("info,gateway::kernel=debug").is_ok());
        let error = check_level("gateway=loud")
            .expect_err("no such level")
            .to_string();
        assert!(error.contains("gateway=loud"), "{error}");
    }
}
