//! What ends a request from outside: the gateway's end, or its key's.

use std::{
    future::Future,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
};

use super::keys::Life;
use crate::{
    core::{Core, STOP},
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
        }
    }
}

/// Waits for either. Two slots in the core's lists while it waits; woken for a revocation of any key, which is rare.
pub struct Ends {
    core: Rc<Core>,
    life: Arc<Life>,
    stop: Reached,
    revocation: Reached,
    /// The key's state was looked at since the last revocation.
    looked: bool,
}

impl Ends {
    /// For a request with this key.
    pub fn new(core: &Rc<Core>, life: &Arc<Life>) -> Ends {
        Ends {
            core: core.clone(),
            life: life.clone(),
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
        self.life.is_ended().then_some(End::Revoked)
    }
}

impl Future for Ends {
    type Output = End;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<End> {
        if Pin::new(&mut self.stop).poll(cx).is_ready() {
            return Poll::Ready(End::Stop);
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
