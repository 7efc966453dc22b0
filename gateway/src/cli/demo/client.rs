//! The demo's client: HTTP/1.1 over a blocking socket, from an address of its choice.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, bail};
use socket2::{Domain, Socket, Type};

use crate::http::{
    chunked::ChunkedDecoder,
    head::{Method, ResponseFraming, ResponseHead},
};

/// How long the client waits for anything.
const PATIENCE: Duration = Duration::from_secs(10);

/// An answer.
pub struct Answer {
    pub status: u16,
    head: ResponseHead,
    head_bytes: Vec<u8>,
    pub body: Vec<u8>,
}

impl Answer {
    /// A header field's value.
    pub fn field(&self, name: &str) -> Option<&str> {
        std::str::from_utf8(self.head.field(&self.head_bytes, name)?).ok()
    }
}

/// Connects from `source`.
pub fn connect(source: Ipv4Addr, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((source, 0)).into())?;
    socket.connect_timeout(&to.into(), PATIENCE)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket.into())
}

/// Sends one request on a connection of its own. `each` sees the body's parts as they arrive.
pub fn request(
    source: Ipv4Addr,
    to: SocketAddr,
    key: &str,
    method: &str,
    path: &str,
    body: &str,
    mut each: impl FnMut(&[u8]),
) -> anyhow::Result<Answer> {
    let mut socket = connect(source, to)?;
    let length = body.len();
    write!(
        socket,
        "{method} {path} HTTP/1.1\r\nhost: {to}\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\nconnection: close\r\n\r\n{body}"
    )?;
    let mut received = Vec::new();
    let mut head = ResponseHead::new();
    while !head.parse(&received, Method::Post)? {
        if read(&mut socket, &mut received)? == 0 {
            bail!("the connection ended before the answer");
        }
    }
    let mut rest = received.split_off(head.len);
    let mut answer = Answer {
        status: head.status,
        head,
        head_bytes: received,
        body: Vec::new(),
    };
    let mut decoder = ChunkedDecoder::new();
    loop {
        match answer.head.framing {
            ResponseFraming::Chunked => {
                let decoded = decoder.decode(&mut rest).context("a chunk is malformed")?;
                each(&rest[decoded.payload.clone()]);
                answer.body.extend_from_slice(&rest[decoded.payload]);
                rest.drain(..decoded.consumed);
                if decoded.done {
                    return Ok(answer);
                }
            }
            _ => answer.body.append(&mut rest),
        }
        if read(&mut socket, &mut rest)? == 0 {
            let whole = answer.head.framing != ResponseFraming::Chunked;
            return if whole {
                Ok(answer)
            } else {
                bail!("the stream was cut")
            };
        }
    }
}

fn read(socket: &mut TcpStream, into: &mut Vec<u8>) -> io::Result<usize> {
    let mut buffer = [0; 16 * 1024];
    let n = socket.read(&mut buffer)?;
    into.extend_from_slice(&buffer[..n]);
    Ok(n)
}
