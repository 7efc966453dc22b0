//! HTTP/1.1 as RFC 9112 has it, strictly: heads, chunked bodies, and the framing of server-sent
//! events; and what proxies tell of a client. Pure functions over bytes; nothing here does I/O.

pub mod chunked;
pub mod forwarded;
pub mod head;
pub mod proxy;
pub mod sse;
