//! A blocking HTTP/1.1 client that hides nothing.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
};

use gateway::http::{
    chunked::ChunkedDecoder,
    head::{Method, ResponseFraming, ResponseHead},
};
use serde_json::Value;
use socket2::{Domain, Socket, Type};

use super::{KEY, PATIENCE};

/// A connection to the gateway.
pub struct Client {
    pub socket: TcpStream,
    received: Vec<u8>,
}

/// An answer that was received whole.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub fields: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub keep_alive: bool,
}

impl Answer {
    /// A header field, by its name in lower case.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields
            .iter()
            .find(|(field, _)| field == name)
            .map(|(_, value)| value.as_str())
    }

    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {:?}", self.text()))
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The data of each event.
    pub fn events(&self) -> Vec<String> {
        let text = self.text().replace("\r\n", "\n");
        let data = |event: &str| {
            let lines = event.lines().filter_map(|line| line.strip_prefix("data:"));
            lines
                .map(|line| line.trim_start().to_string())
                .collect::<Vec<_>>()
                .join("\n")
        };
        text.split("\n\n")
            .map(data)
            .filter(|data| !data.is_empty())
            .collect()
    }

    /// The content of a chat stream, put together.
    pub fn content(&self) -> String {
        let chunks = self
            .events()
            .into_iter()
            .filter_map(|data| serde_json::from_str::<Value>(&data).ok());
        chunks
            .filter_map(|chunk| Some(chunk["choices"][0]["delta"]["content"].as_str()?.to_string()))
            .collect()
    }
}

/// What the simulator's stream of `tokens` tokens says.
pub fn expected_content(tokens: usize) -> String {
    (0..tokens).map(|token| format!("t{token} ")).collect()
}

/// A whole request with the usual key, its header lines (each with its end) and its body as they are.
pub fn raw(fields: &str, body: &str) -> Vec<u8> {
    let mut request =
        format!("POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {KEY}\r\n");
    request.push_str(fields);
    request.push_str("\r\n");
    request.push_str(body);
    request.into_bytes()
}

/// A chat request as [`Client::post`] sends it.
pub fn chat_request(model: &str, stream: bool) -> Vec<u8> {
    let body = chat(model, stream);
    raw(&format!("content-length: {}\r\n", body.len()), &body)
}

/// A chat request's body.
pub fn chat(model: &str, stream: bool) -> String {
    format!(
        r#"{{"model":"{model}","stream":{stream},"messages":[{{"role":"user","content":"hello there"}}]}}"#
    )
}

impl Client {
    /// Connects.
    pub fn connect(to: SocketAddr) -> Client {
        Client::try_connect(to, None).expect("a connection")
    }

    /// Connects from an address.
    pub fn try_connect(to: SocketAddr, source: Option<IpAddr>) -> io::Result<Client> {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        if let Some(source) = source {
            socket.bind(&SocketAddr::new(source, 0).into())?;
        }
        socket.connect_timeout(&to.into(), PATIENCE)?;
        let socket: TcpStream = socket.into();
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_nodelay(true)?;
        Ok(Client {
            socket,
            received: Vec::new(),
        })
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.socket
            .write_all(bytes.as_ref())
            .expect("the gateway takes bytes");
    }

    /// Sends a POST with the usual key.
    pub fn post(&mut self, path: &str, body: &str) {
        self.post_with(path, body, &format!("authorization: Bearer {KEY}\r\n"));
    }

    /// Sends bytes to a gateway that may be gone.
    pub fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.socket.write_all(bytes.as_ref())
    }

    /// Sends a POST with these header lines.
    pub fn post_with(&mut self, path: &str, body: &str, fields: &str) {
        let length = body.len();
        self.send(format!(
            "POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n{fields}content-length: {length}\r\n\r\n{body}"
        ));
    }

    /// Sends a GET with the usual key.
    pub fn get(&mut self, path: &str) {
        self.send(format!(
            "GET {path} HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {KEY}\r\n\r\n"
        ));
    }

    /// Receives one answer.
    pub fn answer(&mut self) -> Answer {
        self.try_answer().expect("a whole answer")
    }

    /// Receives one answer; an error says how it was cut.
    pub fn try_answer(&mut self) -> io::Result<Answer> {
        let mut head = ResponseHead::new();
        while !head
            .parse(&self.received, Method::Post)
            .map_err(io::Error::other)?
        {
            self.more()?;
        }
        let bytes: Vec<u8> = self.received.drain(..head.len).collect();
        if head.status == 100 {
            return self.try_answer();
        }
        let text = |span: gateway::http::head::Span| String::from_utf8_lossy(span.of(&bytes)).into_owned();
        let fields = head
            .fields
            .iter()
            .map(|f| (text(f.name).to_lowercase(), text(f.value)))
            .collect();
        let mut answer = Answer {
            status: head.status,
            fields,
            body: Vec::new(),
            keep_alive: head.keep_alive,
        };
        let mut decoder = ChunkedDecoder::new();
        loop {
            match head.framing {
                ResponseFraming::None => return Ok(answer),
                ResponseFraming::Length(length) => {
                    let take = self.received.len().min(length as usize - answer.body.len());
                    answer.body.extend(self.received.drain(..take));
                    if answer.body.len() == length as usize {
                        return Ok(answer);
                    }
                }
                ResponseFraming::Chunked => {
                    let decoded = decoder.decode(&mut self.received).map_err(io::Error::other)?;
                    answer.body.extend_from_slice(&self.received[decoded.payload]);
                    self.received.drain(..decoded.consumed);
                    if decoded.done {
                        return Ok(answer);
                    }
                }
                ResponseFraming::UntilClose => answer.body.append(&mut self.received),
            }
            match self.more() {
                Err(error)
                    if error.kind() == io::ErrorKind::UnexpectedEof
                        && head.framing == ResponseFraming::UntilClose =>
                {
                    return Ok(answer);
                }
                other => other?,
            }
        }
    }

    /// Receives until `bytes` have come, and returns all that came until then, framing included.
    pub fn receive_until(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.try_receive_until(bytes).expect("more bytes")
    }

    /// As [`Client::receive_until`], from a gateway that may be gone.
    pub fn try_receive_until(&mut self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut seen: usize = 0;
        loop {
            let from = seen.saturating_sub(bytes.len());
            if let Some(at) = memchr::memmem::find(&self.received[from..], bytes) {
                return Ok(self.received.drain(..from + at + bytes.len()).collect());
            }
            seen = self.received.len();
            self.more()?;
        }
    }

    /// Receives until the gateway closes, and returns what came; a reset or the gateway's silence is an error.
    pub fn rest(&mut self) -> io::Result<Vec<u8>> {
        loop {
            match self.more() {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return Ok(std::mem::take(&mut self.received));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// What has been received and not taken yet.
    pub fn pending(&self) -> &[u8] {
        &self.received
    }

    /// Whether the gateway has closed the connection; waits for that or for bytes, which would be a "no".
    pub fn is_closed(&mut self) -> bool {
        match self.more() {
            Ok(()) => false,
            Err(error) => {
                matches!(
                    error.kind(),
                    io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
                )
            }
        }
    }

    fn more(&mut self) -> io::Result<()> {
        let mut buffer = [0; 64 * 1024];
        let read = loop {
            match self.socket.read(&mut buffer) {
                // A read with a time limit is not begun again when the process was stopped and goes on (signal(7)).
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read?,
            }
        };
        match read {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            n => {
                self.received.extend_from_slice(&buffer[..n]);
                Ok(())
            }
        }
    }
}
