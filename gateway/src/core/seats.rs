//! The open connections of a core, so that those of a client that is turned away can be told.

use std::{
    cell::{Cell, RefCell},
    future::Future,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
};

use crate::quota::refusals::Origin;

/// A connection's place among those of its core.
#[derive(Default)]
pub struct Seat {
    /// Whom the connection serves now. None: a proxy's, between two requests.
    client: Cell<Option<Origin>>,
    blocked: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Seat {
    /// Says whom the connection serves from now on.
    pub fn serve(&self, client: Option<Origin>) {
        if self.client.replace(client) != client {
            self.blocked.set(false);
        }
    }

    /// Whether the client has been turned away since the connection began to serve it.
    pub fn is_blocked(&self) -> bool {
        self.blocked.get()
    }

    /// Waits for the client to be turned away. One waits at a time: the connection's own task.
    pub fn blocked(self: &Rc<Self>) -> Blocked {
        Blocked(self.clone())
    }
}

/// See [`Seat::blocked`].
pub struct Blocked(Rc<Seat>);

impl Blocked {
    /// Whether it is so, without waiting.
    pub fn now(&self) -> bool {
        self.0.is_blocked()
    }
}

impl Future for Blocked {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.0.blocked.get() {
            return Poll::Ready(());
        }
        let mut waker = self.0.waker.borrow_mut();
        // A task's waker stays the same: this is written once for a wait, not once for an event.
        if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }
}

/// All seats of a core.
#[derive(Default)]
pub struct Seats {
    taken: RefCell<Vec<Option<Rc<Seat>>>>,
    free: RefCell<Vec<usize>>,
}

/// A seat that is given back when it is dropped.
pub struct Sitting<'a> {
    seats: &'a Seats,
    place: usize,
    pub seat: Rc<Seat>,
}

impl Drop for Sitting<'_> {
    fn drop(&mut self) {
        self.seats.taken.borrow_mut()[self.place] = None;
        self.seats.free.borrow_mut().push(self.place);
    }
}

impl Seats {
    /// Takes a seat for a connection.
    pub fn take(&self) -> Sitting<'_> {
        let seat = Rc::new(Seat::default());
        let mut taken = self.taken.borrow_mut();
        let place = self.free.borrow_mut().pop().unwrap_or_else(|| {
            taken.push(None);
            taken.len() - 1
        });
        taken[place] = Some(seat.clone());
        Sitting {
            seats: self,
            place,
            seat,
        }
    }

    /// Tells the connections whose client `is_blocked`. Walks them all: some ten nanoseconds each.
    pub fn tell(&self, is_blocked: impl Fn(Origin) -> bool) {
        let mut place = 0;
        loop {
            // Not borrowed over a wake: a task may run at once and give its seat back.
            let seat = match self.taken.borrow().get(place) {
                Some(seat) => seat.clone(),
                None => return,
            };
            place += 1;
            let Some(seat) = seat else { continue };
            if seat.blocked.get() || !seat.client.get().is_some_and(&is_blocked) {
                continue;
            }
            seat.blocked.set(true);
            let waker = seat.waker.borrow_mut().take();
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;
    use crate::quota::refusals::Via;

    #[test]
    fn tells_whom_it_concerns_and_uses_seats_again() {
        let seats = Seats::default();
        let client = |n| Origin {
            ip: std::net::IpAddr::from([10, 0, 0, n]),
            via: Via::Direct,
        };
        let mut cx = Context::from_waker(Waker::noop());
        let (one, two, idle) = (seats.take(), seats.take(), seats.take());
        one.seat.serve(Some(client(1)));
        two.seat.serve(Some(client(2)));
        let mut wait = pin!(one.seat.blocked());
        assert!(wait.as_mut().poll(&mut cx).is_pending());
        seats.tell(|origin| origin == client(1));
        assert!(wait.poll(&mut cx).is_ready());
        assert!(!two.seat.is_blocked() && !idle.seat.is_blocked());
        drop((one, two, idle));
        assert_eq!(seats.taken.borrow().len(), 3);
        let again = seats.take();
        assert!(!again.seat.is_blocked());
        assert_eq!(seats.taken.borrow().len(), 3);
    }
}
