//! What stands before a client's own bytes: the PROXY header of a trusted proxy, before TLS.

use std::{rc::Rc, time::Duration};

use super::trust::Trust;
use crate::{
    bounds::PROXY_HEADER_BYTES_MAX,
    config::schema::ProxyProtocol,
    core::{Core, DRAIN},
    http::proxy::{self, Header, ProxyError},
    net::{Either, race, sleep, tcp::Sock},
    quota::refusals::{Origin, Via},
};

/// How long to wait for more of a header of which a part has come. The part stays in the socket, which is thus
/// readable all the time. Proxies send it in one piece, and others are not read at all.
const PART_REST: Duration = Duration::from_millis(5);

/// Who is at the other end of a connection. None: it is to be closed.
pub async fn hop(
    core: &Core,
    sock: &Rc<Sock>,
    peer: Origin,
    trust: &Trust,
    time: Duration,
) -> Option<Origin> {
    let (is_proxy, required) = match trust.proxy_protocol {
        ProxyProtocol::Off => return Some(peer),
        ProxyProtocol::Optional => (peer.via == Via::Proxy, false),
        ProxyProtocol::Required => (peer.via == Via::Proxy, true),
    };
    let header = match (is_proxy, required) {
        // What looks like a header is then the client's own bytes, and no HTTP.
        (false, false) => return Some(peer),
        (false, true) => Err(ProxyError::Absent),
        (true, _) => match race(receive(core, sock), race(sleep(time), core.drain.reached(DRAIN))).await {
            Either::First(header) => header?,
            Either::Second(_) => Err(ProxyError::Length),
        },
    };
    match header {
        Ok(Header {
            source: Some(source), ..
        }) => Some(trust.origin(source.ip().to_canonical(), true)),
        Ok(Header { source: None, .. }) => Some(peer),
        Err(ProxyError::Absent) if !required => Some(peer),
        Err(error) => {
            core.telemetry.counters().proxy_headers_refused.inc();
            if core.may_log() {
                tracing::warn!(peer = %peer.ip, %error, "a connection is closed for its PROXY header");
            }
            sock.reset_on_close();
            None
        }
    }
}

/// Takes the header, and nothing behind it: that is the client's. None: the peer is gone.
async fn receive(core: &Core, sock: &Rc<Sock>) -> Option<Result<Header, ProxyError>> {
    loop {
        let part = {
            let scratch = &mut core.scratch()[..PROXY_HEADER_BYTES_MAX];
            match sock.try_peek(scratch) {
                Ok(Some(0)) | Err(_) => return None,
                Ok(None) => false,
                Ok(Some(n)) => match proxy::parse(&scratch[..n]) {
                    Ok(Some(header)) => {
                        // All of it is there, so one read takes it.
                        let taken = sock.try_read(&mut scratch[..header.len]);
                        return matches!(taken, Ok(Some(n)) if n == header.len).then_some(Ok(header));
                    }
                    Ok(None) => true,
                    Err(error) => return Some(Err(error)),
                },
            }
        };
        match part {
            true => sleep(PART_REST).await,
            false => sock.readable().await,
        }
    }
}
