//! Speaks to the admin API of a running gateway, for `status`, `kernel` and `reload`.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use serde_json::Value;

use super::common::{ConfigArg, beside};
use crate::{config::schema, control::admin::token_path};

/// Longest time for a whole answer. The slowest is a reload, which reads files.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(15);

/// Longest time to connect.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(3);

/// Largest answer that is read, bytes. A kernel plane with all its clients blocked is some MiB.
const ANSWER_BYTES_MAX: u64 = 64 << 20;

/// Where the gateway is, and how its answer is shown.
#[derive(Debug, Clone, clap::Args)]
pub struct AdminArgs {
    #[command(flatten)]
    config: ConfigArg,
    /// Address of the admin API, instead of the configuration's `admin.address`
    #[arg(long, value_name = "HOST:PORT", env = "GATEWAY_ADMIN")]
    admin: Option<String>,
    /// File with the admin token, instead of what the configuration says
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Print the answer as JSON
    #[arg(long)]
    pub json: bool,
}

/// The part of the configuration that is needed. The whole is not loaded: its other secrets may be
/// in the service's environment, which the caller's shell does not have.
#[derive(serde::Deserialize, Default)]
struct AdminOnly {
    #[serde(default)]
    admin: schema::Admin,
    #[serde(default)]
    ledger: schema::Ledger,
}

/// A running gateway's admin API.
#[derive(Debug)]
pub struct Client {
    agent: ureq::Agent,
    base: String,
    token: String,
}

impl Client {
    /// Finds the gateway from the command line and, for what that does not say, the configuration.
    ///
    /// # Errors
    /// The configuration or the token cannot be read.
    pub fn new(args: &AdminArgs) -> anyhow::Result<Client> {
        let config = match (&args.admin, &args.token_file) {
            (Some(_), Some(_)) => AdminOnly::default(),
            _ => read_config(&args.config.config)?,
        };
        let authority = match &args.admin {
            Some(address) => authority_of(address)?.to_owned(),
            None => reachable(config.admin.address).to_string(),
        };
        let token = match &args.token_file {
            Some(file) => read_token(file)?,
            None => configured_token(&config, &args.config.config)?,
        };
        Ok(Client::at(&authority, token))
    }

    fn at(authority: &str, token: String) -> Client {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            // The admin API is near; a proxy of the environment would be asked for its own loopback.
            .proxy(None)
            .max_redirects(0)
            .timeout_connect(Some(CONNECT_TIME_MAX))
            .timeout_global(Some(ANSWER_TIME_MAX))
            .build()
            .new_agent();
        Client {
            agent,
            base: format!("http://{authority}"),
            token,
        }
    }

    /// `GET path`.
    ///
    /// # Errors
    /// No gateway answers, or it answers with an error, whose message is the gateway's own.
    pub fn get(&self, path: &str) -> anyhow::Result<Value> {
        let request = self.agent.get(format!("{}{path}", self.base));
        self.read(request.header("authorization", self.bearer()).call())
    }

    /// All entries of a list that comes in pages, up to `max`; `filter` are its other parameters.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub fn pages(&self, path: &str, filter: &str, max: usize) -> anyhow::Result<Vec<Value>> {
        let mut entries = Vec::new();
        let mut after = String::new();
        loop {
            let mut page = self.get(&format!("{path}?{filter}{after}"))?;
            if let Value::Array(data) = page["data"].take() {
                entries.extend(data);
            }
            match page["next"].as_str() {
                Some(next) if entries.len() < max => after = format!("&after={next}"),
                _ => {
                    entries.truncate(max);
                    return Ok(entries);
                }
            }
        }
    }

    /// `DELETE path`.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub fn delete(&self, path: &str) -> anyhow::Result<()> {
        let request = self.agent.delete(format!("{}{path}", self.base));
        self.read(request.header("authorization", self.bearer()).call())
            .map(drop)
    }

    /// `PATCH path` with a JSON body.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub fn patch(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.send(self.agent.patch(format!("{}{path}", self.base)), body)
    }

    /// `PUT path` with a JSON body.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub fn put(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.send(self.agent.put(format!("{}{path}", self.base)), body)
    }

    /// `POST path` with a JSON body.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.send(self.agent.post(format!("{}{path}", self.base)), body)
    }

    fn send(
        &self,
        request: ureq::RequestBuilder<ureq::typestate::WithBody>,
        body: &Value,
    ) -> anyhow::Result<Value> {
        let request = request
            .header("authorization", self.bearer())
            .header("content-type", "application/json");
        self.read(request.send(body.to_string()))
    }

    fn bearer(&self) -> String {
        format!("Bearer {}", self.token)
    }

    fn read(&self, answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> anyhow::Result<Value> {
        let mut answer = answer.map_err(|error| self.explain(error))?;
        let status = answer.status();
        let body = answer
            .body_mut()
            .with_config()
            .limit(ANSWER_BYTES_MAX)
            .read_to_vec();
        let body = body.map_err(|error| self.explain(error))?;
        if status.as_u16() == 204 {
            return Ok(Value::Null);
        }
        let value: Option<Value> = serde_json::from_slice(&body).ok();
        if status.is_success() {
            return value
                .ok_or_else(|| anyhow!("what answers at {} is not a gateway's admin API", self.base));
        }
        let message = value
            .as_ref()
            .and_then(|value| value["error"]["message"].as_str());
        match message {
            Some(message) if status.as_u16() == 401 => {
                bail!(
                    "{message} (the gateway at {} has another token than was found here)",
                    self.base
                )
            }
            Some(message) => bail!("{message}"),
            None => bail!("{} answers with status {status}", self.base),
        }
    }

    /// Says what a failed connection means.
    fn explain(&self, error: ureq::Error) -> anyhow::Error {
        let at = self.base.trim_start_matches("http://");
        match &error {
            ureq::Error::Io(io) if io.kind() == std::io::ErrorKind::ConnectionRefused => {
                anyhow!("no gateway answers at {at}: is it running?")
            }
            ureq::Error::ConnectionFailed => anyhow!("no gateway answers at {at}: is it running?"),
            ureq::Error::Timeout(_) => anyhow!("the gateway at {at} does not answer in time"),
            ureq::Error::HostNotFound => anyhow!("there is no host {at}"),
            _ => anyhow::Error::new(error).context(format!("cannot talk to the gateway at {at}")),
        }
    }
}

/// A text as a part of a path or of a query (RFC 3986, section 2.1).
pub fn encoded(text: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(byte.into()),
            _ => drop(write!(out, "%{byte:02X}")),
        }
    }
    out
}

/// Rows in columns as wide as they must be.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([head[column].len()]).max().unwrap_or_default()
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |cells: &[&str]| {
        let padded: Vec<String> = cells
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        format!("{}\n", padded.join("  ").trim_end())
    };
    let mut text = line(head);
    for row in rows {
        text += &line(&row.iter().map(String::as_str).collect::<Vec<_>>());
    }
    text
}

/// `host:port`, also of `http://host:port/`.
fn authority_of(address: &str) -> anyhow::Result<&str> {
    let authority = address
        .strip_prefix("http://")
        .unwrap_or(address)
        .trim_end_matches('/');
    let has_port = authority
        .rsplit_once(':')
        .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    match has_port && !authority.contains('/') {
        true => Ok(authority),
        false => bail!("`{address}` is not an address; write for example 127.0.0.1:9900"),
    }
}

/// The address at which a listener of this host is reached: one that listens everywhere, at loopback.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::from(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::from(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

fn read_config(path: &Path) -> anyhow::Result<AdminOnly> {
    let text = std::fs::read_to_string(path).with_context(|| {
        format!(
            "cannot read {} (name one with -c, or the gateway with --admin and --token-file)",
            path.display()
        )
    })?;
    serde_saphyr::from_str(&text).with_context(|| format!("{} is not a configuration", path.display()))
}

/// The token as the gateway itself finds it: written out, by reference, or generated.
fn configured_token(config: &AdminOnly, path: &Path) -> anyhow::Result<String> {
    let Some(token) = &config.admin.token else {
        return read_token(&token_path(&beside(path, &config.ledger.path)));
    };
    let Some((kind, name)) = reference(token.expose()) else {
        return Ok(token.expose().to_owned());
    };
    match kind {
        "file" => read_token(&beside(path, Path::new(name))),
        "env" => std::env::var(name).ok().with_context(|| {
            format!(
                "the admin token is in the variable {name}, which is not set here (--token-file names a file)"
            )
        }),
        _ => bail!(
            "the admin token is a {kind} of the service, which only it can read (--token-file names a file)"
        ),
    }
}

/// The parts of `${kind:name}`.
fn reference(text: &str) -> Option<(&str, &str)> {
    text.strip_prefix("${")?.strip_suffix('}')?.split_once(':')
}

fn read_token(path: &Path) -> anyhow::Result<String> {
    let hint = "run this as the gateway's user or as root; a gateway makes it when it first starts";
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the admin token {} ({hint})", path.display()))?;
    match text.trim() {
        "" => bail!("the admin token {} is empty", path.display()),
        token => Ok(token.to_owned()),
    }
}

/// Ends a command: its error goes to stderr.
pub fn exit(result: anyhow::Result<()>) -> std::process::ExitCode {
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gateway: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

/// Prints without dying of a closed pipe, as of `gateway status | head -1`.
///
/// # Errors
/// Standard output cannot be written.
pub fn print(text: &str) -> anyhow::Result<()> {
    use std::io::Write;
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// Prints JSON for programs.
///
/// # Errors
/// As [`print`].
pub fn print_json(value: &Value) -> anyhow::Result<()> {
    print(&format!("{value:#}\n"))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::TcpListener,
    };

    use serde_json::json;

    use super::*;

    /// Answers one request with `answer`; gives the client and, at the end, what it sent.
    fn with_answer(answer: &'static str) -> (Client, std::thread::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("address").to_string();
        let served = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("accept");
            let mut request = [0; 4096];
            let mut len = 0;
            while !request[..len].windows(4).any(|end| end == b"\r\n\r\n") {
                len += stream.read(&mut request[len..]).expect("request");
            }
            stream.write_all(answer.as_bytes()).expect("answer");
            String::from_utf8_lossy(&request[..len]).into_owned()
        });
        (Client::at(&address, "s3cret".into()), served)
    }

    #[test]
    fn a_request_has_the_token() {
        let (client, served) = with_answer("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{\"ok\": 1}");
        assert_eq!(client.get("/status").expect("answer"), json!({ "ok": 1 }));
        let request = served.join().expect("served").to_ascii_lowercase();
        assert!(request.starts_with("get /status http/1.1\r\n"), "{request}");
        assert!(
            request.contains("\r\nauthorization: bearer s3cret\r\n"),
            "{request}"
        );
    }

    #[test]
    fn an_error_is_the_gateways_own_words() {
        let (client, served) = with_answer(
            "HTTP/1.1 422 X\r\ncontent-length: 44\r\n\r\n{\"error\": {\"message\": \"unknown field `x`\"}}  ",
        );
        let error = client.post("/reload", &json!({})).expect_err("422");
        assert_eq!(error.to_string(), "unknown field `x`");
        served.join().expect("served");
    }

    #[test]
    fn someone_else_at_the_address_is_told() {
        let (client, served) = with_answer("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello");
        let error = client.get("/status").expect_err("not JSON").to_string();
        assert!(error.contains("not a gateway's admin API"), "{error}");
        served.join().expect("served");
    }

    #[test]
    fn nobody_there_is_told() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("address").to_string();
        drop(listener);
        let error = Client::at(&address, String::new())
            .get("/status")
            .expect_err("nobody");
        assert_eq!(
            error.to_string(),
            format!("no gateway answers at {address}: is it running?")
        );
    }

    #[test]
    fn addresses_are_read() {
        assert_eq!(
            authority_of("http://127.0.0.1:9900/").expect("url"),
            "127.0.0.1:9900"
        );
        assert_eq!(authority_of("[::1]:9900").expect("address"), "[::1]:9900");
        for wrong in ["", "localhost", "https://a:1", "a:b", ":9900", "a:1/x"] {
            assert!(authority_of(wrong).is_err(), "{wrong}");
        }
        let everywhere = |text: &str| reachable(text.parse().expect("address")).to_string();
        assert_eq!(everywhere("0.0.0.0:1"), "127.0.0.1:1");
        assert_eq!(everywhere("[::]:1"), "[::1]:1");
        assert_eq!(everywhere("10.0.0.1:1"), "10.0.0.1:1");
    }

    #[test]
    fn the_token_is_found_where_the_gateway_finds_it() {
        let dir = tempfile::tempdir().expect("directory");
        let config = dir.path().join("gateway.yaml");
        let state = dir.path().join("state");
        std::fs::create_dir(&state).expect("state");
        std::fs::write(token_path(&state), "made\n").expect("token");
        std::fs::write(dir.path().join("own.token"), "own\n").expect("token");
        let cases = [
            (format!("ledger: {{ path: {} }}", state.display()), "made"),
            ("ledger: { path: state }".to_owned(), "made"),
            ("admin: { token: \"${file:own.token}\" }".to_owned(), "own"),
            ("admin: { token: written }".to_owned(), "written"),
            (
                "listeners: []\nproviders: { a: { key: \"${env:UNSET}\" } }\nadmin: { token: x }".to_owned(),
                "x",
            ),
        ];
        for (text, token) in cases {
            std::fs::write(&config, &text).expect("configuration");
            let read = read_config(&config).expect("configuration");
            assert_eq!(configured_token(&read, &config).expect("token"), token, "{text}");
        }
    }
}
