//! ClickHouse's side of the export: how it is spoken to, and the table.

use std::time::Duration;

use anyhow::bail;

use crate::config::{schema::ClickHouse, units::Secret};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A server that merges may take its time; a batch is sent again when it takes longer.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// The server's HTTP interface (clickhouse.com/docs/interfaces/http).
pub struct Server {
    agent: ureq::Agent,
    url: String,
    table: String,
    user: Option<String>,
    password: Option<Secret>,
    /// For the whole of a request.
    pub answer_timeout: Duration,
}

impl Server {
    pub fn new(config: &ClickHouse) -> Server {
        let agent = ureq::Agent::config_builder()
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .http_status_as_error(false)
            // The password must not follow to another server.
            .max_redirects(0)
            .build();
        Server {
            agent: agent.into(),
            url: config.url.trim_end_matches('/').to_owned(),
            table: config.table.clone(),
            user: config.user.clone(),
            password: config.password.clone(),
            answer_timeout: ANSWER_TIMEOUT,
        }
    }

    pub fn create_table(&self) -> anyhow::Result<()> {
        self.post(&[], create_table(&self.table).as_bytes())
    }

    pub fn insert(&self, json: &[u8]) -> anyhow::Result<()> {
        let query = format!("INSERT INTO {} FORMAT JSONEachRow", self.table);
        let settings = [
            ("query", query.as_str()),
            // A table that the operator made may have fewer columns.
            ("input_format_skip_unknown_fields", "1"),
            ("date_time_input_format", "best_effort"),
        ];
        self.post(&settings, json)
    }

    fn post(&self, query: &[(&str, &str)], body: &[u8]) -> anyhow::Result<()> {
        let mut request = self.agent.post(format!("{}/", self.url));
        for (name, value) in query {
            request = request.query(name, value);
        }
        if let Some(user) = &self.user {
            request = request.header("x-clickhouse-user", user);
        }
        if let Some(password) = &self.password {
            request = request.header("x-clickhouse-key", password.expose());
        }
        let mut answer = request
            .config()
            .timeout_global(Some(self.answer_timeout))
            .build()
            .send(body)
            .map_err(|error| anyhow::anyhow!("{}: {error}", self.url))?;
        let status = answer.status();
        let text = answer
            .body_mut()
            .with_config()
            .limit(2048)
            .lossy_utf8(true)
            .read_to_string();
        if !status.is_success() {
            let text = text.unwrap_or_default();
            let first = text.lines().next().unwrap_or_default();
            bail!("{} answers {status}: {first}", self.url);
        }
        Ok(())
    }
}

/// The statement that makes the table. Duplicates have the same time and id: `SELECT … FINAL` leaves them out.
pub fn create_table(table: &str) -> String {
    const NAMES: [&str; 10] = [
        "key",
        "team",
        "organization",
        "model",
        "provider",
        "upstream_model",
        "endpoint",
        "api",
        "outcome",
        "finish_reason",
    ];
    const FLAGS: [&str; 9] = [
        "stream",
        "estimated",
        "retried",
        "fallback",
        "cut",
        "upstream_error",
        "cache_hit",
        "drained",
        "clamped",
    ];
    const NUMBERS: [&str; 10] = [
        "prompt_tokens",
        "cached_tokens",
        "cache_write_5m_tokens",
        "cache_write_1h_tokens",
        "completion_tokens",
        "reasoning_tokens",
        "ttft_us",
        "duration_us",
        "bytes_in",
        "bytes_out",
    ];
    let columns = |names: &[&str], kind: &str| -> String {
        names.iter().map(|name| format!("    {name} {kind},\n")).collect()
    };
    format!(
        "CREATE TABLE IF NOT EXISTS {table} (\n    time DateTime64(3, 'UTC'),\n    id String,\n    user String,\n    \
         tags String,\n    tier LowCardinality(String),\n{}{}{}    status UInt16,\n    attempts UInt8,\n    \
         fallback_index UInt8,\n    cost_nano_usd Nullable(UInt64)\n) ENGINE = ReplacingMergeTree ORDER BY (time, id)",
        columns(&NAMES, "LowCardinality(String)"),
        columns(&FLAGS, "Bool"),
        columns(&NUMBERS, "UInt64"),
    )
}
