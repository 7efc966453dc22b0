//! A simulated fleet of servers that speak OpenAI's, Anthropic's and Google's APIs.
//!
//! What it does with a call is said by the model's name ([`Behaviour::apply`] lists the words), so that one server plays
//! every part that a test needs. Each thread runs one `epoll` loop over all endpoints; timers stand in a wheel, and an
//! event costs one write and no allocation.

mod answer;
pub mod behaviour;
mod conn;
mod limits;
mod reactor;
mod request;
mod socket;
mod stats;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Release};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;

use socket2::{Domain, Protocol, Socket, Type};

pub use behaviour::Behaviour;
pub use socket::Tls;
pub use stats::{LastRequest, Stats};

use crate::load::Trace;
use conn::Shared;
use stats::{Counters, Last};

/// Connections that may wait to be accepted; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// How to start a [`Server`].
#[derive(Clone, Debug)]
pub struct Options {
    /// Address of the first endpoint; port 0 takes free ports.
    pub listen: SocketAddr,
    /// Endpoints, on consecutive ports. At least 1.
    pub endpoints: u16,
    /// Threads, each with its own listeners (`SO_REUSEPORT`). At least 1.
    pub threads: usize,
    /// What calls get whose model's name does not say otherwise.
    pub behaviour: Behaviour,
    /// Serve TLS on all endpoints.
    pub tls: Option<Tls>,
    /// Play a recorded fleet: each call gets the next row's length and times.
    pub trace: Option<Trace>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            endpoints: 1,
            threads: 1,
            behaviour: Behaviour::default(),
            tls: None,
            trace: None,
        }
    }
}

/// A running fleet. Dropping it closes all its connections and waits for its threads.
pub struct Server {
    addrs: Vec<SocketAddr>,
    shared: Arc<Shared>,
    stop: Arc<AtomicBool>,
    threads: Vec<(mio::Waker, JoinHandle<()>)>,
}

impl Server {
    /// Binds all endpoints and starts the threads. Connections are accepted from the moment this returns.
    ///
    /// # Errors
    /// Those of binding a socket, of `epoll` and of starting a thread.
    pub fn start(options: Options) -> io::Result<Self> {
        let mut addrs: Vec<SocketAddr> = Vec::new();
        let mut listeners = Vec::new();
        let shared_ports = options.threads > 1;
        if shared_ports && options.listen.port() != 0 {
            // With SO_REUSEPORT a port that another simulator has would be shared with it without a word.
            for endpoint in 0..options.endpoints.max(1) {
                bind(endpoint_addr(options.listen, endpoint)?, false)?;
            }
        }
        for thread in 0..options.threads.max(1) {
            let mut own = Vec::new();
            for endpoint in 0..options.endpoints.max(1) {
                let wanted = match addrs.get(usize::from(endpoint)) {
                    Some(addr) => *addr,
                    None => endpoint_addr(options.listen, endpoint)?,
                };
                let listener = bind(wanted, shared_ports)?;
                if thread == 0 {
                    addrs.push(listener.local_addr()?);
                }
                own.push(mio::net::TcpListener::from_std(listener));
            }
            listeners.push(own);
        }
        let shared = Arc::new(Shared {
            counters: Counters::new(addrs.len()),
            last: Last::default(),
            behaviour: RwLock::new(options.behaviour),
            models: RwLock::default(),
            provider: limits::Provider::default(),
            tls: options.tls,
            trace: options.trace,
            next_row: AtomicUsize::new(0),
        });
        let mut server = Self {
            addrs,
            shared,
            stop: Arc::default(),
            threads: Vec::new(),
        };
        for (index, own) in listeners.into_iter().enumerate() {
            server.start_thread(index, own)?;
        }
        Ok(server)
    }

    fn start_thread(&mut self, index: usize, listeners: Vec<mio::net::TcpListener>) -> io::Result<()> {
        let (reactor, waker) = reactor::Reactor::new(listeners, self.shared.clone(), self.stop.clone())?;
        let thread = std::thread::Builder::new().name(format!("sim-{index}"));
        let handle = thread.spawn(move || {
            if let Err(error) = reactor.run() {
                eprintln!("simulated upstream stopped: {error}");
            }
        })?;
        self.threads.push((waker, handle));
        Ok(())
    }

    /// Address of the first endpoint.
    pub fn addr(&self) -> SocketAddr {
        self.addrs[0]
    }

    /// Addresses of all endpoints.
    pub fn addrs(&self) -> &[SocketAddr] {
        &self.addrs
    }

    /// `http://ADDRESS`, or with `https`, of the first endpoint.
    pub fn url(&self) -> String {
        let scheme = if self.shared.tls.is_some() {
            "https"
        } else {
            "http"
        };
        format!("{scheme}://{}", self.addr())
    }

    /// The counters, as `GET /sim/stats` answers them.
    pub fn stats(&self) -> Stats {
        self.shared.counters.read()
    }

    /// The last call, or an empty one.
    pub fn last(&self) -> LastRequest {
        self.shared.last.read()
    }

    /// Changes what calls get from now on whose model's name does not say otherwise.
    pub fn set_behaviour(&self, behaviour: Behaviour) {
        *self
            .shared
            .behaviour
            .write()
            .unwrap_or_else(PoisonError::into_inner) = behaviour;
    }

    /// Sets what calls of `model` get from now on, as `PUT /sim/models/NAME` does.
    ///
    /// # Errors
    /// A text for people: words that are none, or too many models.
    pub fn set_model(&self, model: &str, words: &str) -> Result<(), String> {
        self.shared.set_model(model, words)
    }

    /// Waits until the fleet ends, which it does only by itself where a thread fails.
    pub fn join(mut self) {
        for (_, handle) in self.threads.drain(..) {
            let _ = handle.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Release);
        for (waker, handle) in self.threads.drain(..) {
            // A thread that cannot be woken has ended already.
            let _ = waker.wake();
            let _ = handle.join();
        }
    }
}

fn endpoint_addr(first: SocketAddr, endpoint: u16) -> io::Result<SocketAddr> {
    if first.port() == 0 {
        return Ok(first);
    }
    let port = first.port().checked_add(endpoint);
    let port = port.ok_or_else(|| io::Error::other("the endpoints do not fit below port 65536"))?;
    Ok(SocketAddr::new(first.ip(), port))
}

fn bind(addr: SocketAddr, shared: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    socket.set_nonblocking(true)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}
