//! What ends a request from outside: the gateway's end, its key's, or that its client is turned away.

use std::{
    future::Future,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use super::keys::Life;
use crate::{
    core::{
        Core, STOP,
        seats::{Blocked, Seat},
    },
    error::{Error, Kind},
    net::signal::Reached,
};

/// Why a running request is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The gateway stops.
    Stop,
    /// The key was revoked.
    Revoked,
    /// The client was blocked.
    Blocked,
}

impl End {
    /// What the client is told.
    pub fn error(self) -> Error {
        match self {
            End::Stop => Error::new(Kind::Stopping, "the gateway is being stopped"),
            End::Revoked => Error {
                code: Some("key_revoked"),
                ..Error::new(Kind::Unauthenticated, "this API key has been revoked")
            },
            End::Blocked => blocked(None),
        }
    }
}

/// What a client is told that is turned away, with the time that is left where it is known.
pub fn blocked(left: Option<Duration>) -> Error {
    let message = "too many requests of this client were refused; it is not served for a while";
    Error {
        code: Some("client_blocked"),
        retry_after_s: left.map(|left| left.as_secs() + 1),
        ..Error::new(Kind::RateLimited, message)
    }
}

/// Waits for any of these. Two slots in the core's lists while it waits; woken for a revocation of any key, which is rare.
pub struct Ends {
    core: Rc<Core>,
    life: Arc<Life>,
    seat: Blocked,
    stop: Reached,
    revocation: Reached,
    /// The key's state was looked at since the last revocation.
    looked: bool,
}

impl Ends {
    /// For a request with this key.
    pub fn new(core: &Rc<Core>, life: &Arc<Life>, seat: &Rc<Seat>) -> Ends {
        Ends {
            core: core.clone(),
            life: life.clone(),
            seat: seat.blocked(),
            stop: core.drain.reached(STOP),
            revocation: core.revocations.next(),
            looked: false,
        }
    }

    /// As polling, without waiting.
    pub fn now(&self) -> Option<End> {
        if self.core.drain.level() >= STOP {
            return Some(End::Stop);
        }
        if self.seat.now() {
            return Some(End::Blocked);
        }
        self.life.is_ended().then_some(End::Revoked)
    }
}

impl Future for Ends {
    type Output = End;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<End> {
        if Pin::new(&mut self.stop).poll(cx).is_ready() {
            return Poll::Ready(End::Stop);
        }
        if Pin::new(&mut self.seat).poll(cx).is_ready() {
            return Poll::Ready(End::Blocked);
        }
        loop {
            if !self.looked {
                // The key may have been revoked between its look-up and this wait.
                self.looked = true;
                if self.life.is_ended() {
                    return Poll::Ready(End::Revoked);
                }
            }
            if Pin::new(&mut self.revocation).poll(cx).is_pending() {
                return Poll::Pending;
            }
            self.revocation = self.core.revocations.next();
            self.looked = false;
        }
    }
}
