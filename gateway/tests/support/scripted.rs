//! An upstream that answers exactly the bytes that a test wants, for what the simulator is too well-behaved for.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use socket2::{Domain, SockRef, Socket, Type};

use super::PATIENCE;

/// What the script does after its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// Waits for the next request.
    Keep,
    /// Closes in good order.
    Close,
    /// Resets.
    Reset,
    /// Says nothing more until the gateway goes.
    Hold,
}

/// A running script. Dropping it closes the listener.
pub struct Scripted {
    addr: SocketAddr,
    requests: Arc<Mutex<Vec<Vec<u8>>>>,
    stop: Arc<AtomicBool>,
}

impl Scripted {
    /// Answers every request, whole with its body, by `script`, which gets the connection and the number of the request.
    pub fn start(script: impl Fn(&mut TcpStream, usize) -> Then + Send + Sync + 'static) -> Scripted {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let addr = listener.local_addr().expect("an address");
        let (requests, stop) = (Arc::default(), Arc::new(AtomicBool::new(false)));
        let scripted = Scripted {
            addr,
            requests: Arc::clone(&requests),
            stop: stop.clone(),
        };
        let script = Arc::new(script);
        thread::spawn(move || {
            for socket in listener.incoming().map_while(Result::ok) {
                if stop.load(Ordering::Acquire) {
                    return;
                }
                let (script, requests) = (script.clone(), requests.clone());
                thread::spawn(move || serve(socket, &*script, &requests));
            }
        });
        scripted
    }

    /// Answers every request with the same bytes.
    pub fn saying(bytes: impl Into<Vec<u8>>, then: Then) -> Scripted {
        let bytes = bytes.into();
        Scripted::start(move |socket, _| {
            let _ = socket.write_all(&bytes);
            then
        })
    }

    /// Its base URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// The requests that it got, heads and bodies.
    pub fn requests(&self) -> Vec<Vec<u8>> {
        self.requests.lock().expect("no panic while locked").clone()
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Wakes the accepting thread.
        let _ = TcpStream::connect(self.addr);
    }
}

fn serve(
    mut socket: TcpStream,
    script: &dyn Fn(&mut TcpStream, usize) -> Then,
    requests: &Mutex<Vec<Vec<u8>>>,
) {
    let _ = socket.set_nodelay(true);
    let _ = socket.set_read_timeout(Some(PATIENCE));
    while let Some(request) = receive(&mut socket) {
        let number = {
            let mut requests = requests.lock().expect("no panic while locked");
            requests.push(request);
            requests.len() - 1
        };
        match script(&mut socket, number) {
            Then::Keep => {}
            Then::Close => return,
            Then::Reset => {
                let _ = SockRef::from(&socket).set_linger(Some(std::time::Duration::ZERO));
                return;
            }
            Then::Hold => {
                let _ = socket.read(&mut [0]);
                return;
            }
        }
    }
}

/// One request with a `content-length`, as the gateway sends them; `None` at the connection's end.
fn receive(socket: &mut TcpStream) -> Option<Vec<u8>> {
    let mut request = Vec::new();
    let mut buffer = [0; 64 * 1024];
    loop {
        if let Some(end) = memchr::memmem::find(&request, b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&request[..end]).to_lowercase();
            let length = head
                .lines()
                .find_map(|line| line.strip_prefix("content-length: "))?;
            if request.len() >= end + 4 + length.trim().parse::<usize>().ok()? {
                return Some(request);
            }
        }
        match socket.read(&mut buffer) {
            Ok(n @ 1..) => request.extend_from_slice(&buffer[..n]),
            // As in `Client`: the process was stopped for a moment.
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            _ => return None,
        }
    }
}

/// An address at which connections are refused as long as the socket lives: it is bound and does not listen.
pub fn refusing() -> (Socket, String) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    let any: SocketAddr = ([127, 0, 0, 1], 0).into();
    socket.bind(&any.into()).expect("a port");
    let addr = socket
        .local_addr()
        .ok()
        .and_then(|addr| addr.as_socket())
        .expect("an address");
    (socket, format!("http://{addr}"))
}

/// The head of a stream's answer in chunks.
pub const STREAM_HEAD: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

/// A chunk of a chunked body.
pub fn chunk(payload: &str) -> String {
    format!("{:x}\r\n{payload}\r\n", payload.len())
}

/// A chat chunk's event with this content.
pub fn token(text: &str) -> String {
    format!("data: {{\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{text}\"}}}}]}}\n\n")
}
