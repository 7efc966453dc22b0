//! Base URLs of upstreams: `http[s]://host[:port][/prefix]`.

use std::{fmt, net::Ipv6Addr};

/// Longest host name, bytes (RFC 1035, section 2.3.4).
const HOST_BYTES_MAX: usize = 253;

/// Longest path prefix, bytes. It stands in every request head to the upstream.
const PREFIX_BYTES_MAX: usize = 512;

/// Where an upstream listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// Speak TLS (`https`).
    pub tls: bool,
    /// Host name in lower case, IPv4 address, or IPv6 address without its brackets.
    pub host: String,
    /// TCP port; 80 or 443 when the URL names none. Never 0.
    pub port: u16,
    /// What stands before the API's own path: empty, or `/` and more, without a `/` at its end.
    pub prefix: String,
}

impl Endpoint {
    /// The value of the `Host` header (RFC 9110, section 7.2): the port is left out where it is the
    /// scheme's own, an IPv6 address has its brackets.
    pub fn authority(&self) -> String {
        let host = match self.host.contains(':') {
            true => format!("[{}]", self.host),
            false => self.host.clone(),
        };
        match self.port == default_port(self.tls) {
            true => host,
            false => format!("{host}:{}", self.port),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.authority(), self.prefix)
    }
}

fn default_port(tls: bool) -> u16 {
    if tls { 443 } else { 80 }
}

/// Parses the base URL of an upstream.
///
/// # Errors
/// Says what is wrong. A URL may carry a credential (`user:pass@host`), so the text never quotes
/// more than the scheme, the host or the port.
pub fn parse_endpoint(text: &str) -> Result<Endpoint, String> {
    let (scheme, rest) = text
        .split_once("://")
        .ok_or("not a URL; write http://host[:port][/prefix] or https://…")?;
    let tls = match scheme.to_ascii_lowercase().as_str() {
        "http" => false,
        "https" => true,
        _ => return Err(format!("unknown scheme `{scheme}`; write http or https")),
    };
    let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    if authority.contains('@') {
        return Err("credentials in the URL are not allowed; use the field `key`".into());
    }
    let (host, port) = split_port(authority)?;
    Ok(Endpoint {
        tls,
        host: parse_host(host)?,
        port: port.map_or(Ok(default_port(tls)), parse_port)?,
        prefix: parse_prefix(path)?,
    })
}

/// Splits `host:port`, minding that an IPv6 address has colons of its own.
fn split_port(authority: &str) -> Result<(&str, Option<&str>), String> {
    if !authority.starts_with('[') {
        return Ok(match authority.split_once(':') {
            Some((_, port)) if port.contains(':') => {
                return Err("an IPv6 address needs brackets, for example http://[::1]:8000".into());
            }
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        });
    }
    let end = authority
        .find(']')
        .ok_or("`[` of an IPv6 address is not closed")?;
    let (host, rest) = authority.split_at(end + 1);
    match rest.strip_prefix(':') {
        Some(port) => Ok((host, Some(port))),
        None if rest.is_empty() => Ok((host, None)),
        None => Err("only a port may follow the `]` of an IPv6 address".into()),
    }
}

fn parse_host(host: &str) -> Result<String, String> {
    if let Some(address) = host.strip_prefix('[') {
        let address = address.trim_end_matches(']');
        let address: Ipv6Addr = address
            .parse()
            .map_err(|_| format!("`{host}` is not an IPv6 address"))?;
        return Ok(address.to_string());
    }
    if host.is_empty() {
        return Err("the host is missing".into());
    }
    if host.len() > HOST_BYTES_MAX {
        return Err(format!("the host is longer than {HOST_BYTES_MAX} bytes"));
    }
    // `_` is no letter of a host name (RFC 952), but container networks resolve such names.
    let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    if !host.chars().all(known) || host.starts_with(['-', '.']) || host.contains("..") {
        return Err(format!("`{}` is not a host name", host.escape_debug()));
    }
    Ok(host.to_ascii_lowercase())
}

fn parse_port(port: &str) -> Result<u16, String> {
    let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    match port.parse() {
        Ok(number) if digits && number != 0 => Ok(number),
        _ => Err(format!(
            "`{}` is not a port; write 1 to 65535",
            port.escape_debug()
        )),
    }
}

fn parse_prefix(path: &str) -> Result<String, String> {
    if path.contains(['?', '#']) {
        return Err("a query or fragment is not allowed".into());
    }
    if path.len() > PREFIX_BYTES_MAX {
        return Err(format!("the path is longer than {PREFIX_BYTES_MAX} bytes"));
    }
    if path.bytes().any(|b| !b.is_ascii_graphic()) {
        return Err("a space, control or non-ASCII character in the path is not allowed".into());
    }
    Ok(path.trim_end_matches('/').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(tls: bool, host: &str, port: u16, prefix: &str) -> Endpoint {
        Endpoint {
            tls,
            host: host.into(),
            port,
            prefix: prefix.into(),
        }
    }

    #[test]
    fn urls_are_taken_apart() {
        for (text, expected, again) in [
            ("http://h", endpoint(false, "h", 80, ""), "http://h"),
            (
                "https://API.openai.com/",
                endpoint(true, "api.openai.com", 443, ""),
                "https://api.openai.com",
            ),
            (
                "HTTP://10.0.0.1:8000/a/b/",
                endpoint(false, "10.0.0.1", 8000, "/a/b"),
                "http://10.0.0.1:8000/a/b",
            ),
            (
                "https://[::1]:8443/x",
                endpoint(true, "::1", 8443, "/x"),
                "https://[::1]:8443/x",
            ),
            (
                "http://[2001:DB8::1]",
                endpoint(false, "2001:db8::1", 80, ""),
                "http://[2001:db8::1]",
            ),
            ("https://h:443", endpoint(true, "h", 443, ""), "https://h"),
            (
                "http://vllm_0.pods.:80",
                endpoint(false, "vllm_0.pods.", 80, ""),
                "http://vllm_0.pods.",
            ),
        ] {
            let parsed = parse_endpoint(text).unwrap();
            assert_eq!(parsed, expected);
            assert_eq!(parsed.to_string(), again);
            assert_eq!(parse_endpoint(again).unwrap(), expected);
        }
    }

    #[test]
    fn wrong_urls_are_refused() {
        for text in [
            "",
            "h",
            "h:80",
            "ftp://h",
            "http://",
            "http://:80",
            "http:///p",
            "http://h:",
            "http://h:0",
            "http://h:65536",
            "http://h:+80",
            "http://h:8a",
            "http://::1",
            "http://[::1",
            "http://[::1]x",
            "http://[::g]",
            "http://[fe80::1%eth0]",
            "http://u@h",
            "http://u:p@h/",
            "http://h?q",
            "http://h/?q",
            "http://h/#f",
            "http://h#f",
            "http://h/a b",
            "http://h/\u{e9}",
            "http://h\r\nx",
            "http://a..b",
            "http://-a",
            "http://h/\u{7f}",
            "http://é",
            "://h",
        ] {
            assert!(parse_endpoint(text).is_err(), "{text}");
        }
        assert!(parse_endpoint(&format!("http://{}", "a".repeat(254))).is_err());
        assert!(parse_endpoint(&format!("http://h/{}", "a".repeat(512))).is_err());
    }

    #[test]
    fn a_refused_url_does_not_tell_its_password() {
        let error = parse_endpoint("http://user:hunter2@host").unwrap_err();
        assert!(!error.contains("hunter2"), "{error}");
    }
}
