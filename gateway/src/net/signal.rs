//! A broadcast within one thread: tells all waiting tasks of a core something, once.

use std::{
    cell::{Cell, RefCell},
    future::Future,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
};

/// A level that only rises; tasks wait for it to reach a height. Not `Send`: one per core.
#[derive(Clone, Default)]
pub struct Signal {
    inner: Rc<Inner>,
}

#[derive(Default)]
struct Inner {
    level: Cell<u64>,
    waiting: RefCell<Vec<Option<Waker>>>,
    free: RefCell<Vec<u32>>,
}

impl Signal {
    /// The level now; starts at 0.
    pub fn level(&self) -> u64 {
        self.inner.level.get()
    }

    /// Raises the level and wakes everyone who waits. Lowering is ignored.
    pub fn raise(&self, level: u64) {
        if level <= self.inner.level.get() {
            return;
        }
        self.inner.level.set(level);
        // By place, since a task that is woken at once may wait anew. Allocates nothing: this runs at every tick.
        let mut place = 0;
        loop {
            let waker = match self.inner.waiting.borrow_mut().get_mut(place) {
                Some(slot) => slot.take(),
                None => return,
            };
            if let Some(waker) = waker {
                waker.wake();
            }
            place += 1;
        }
    }

    /// Waits until the level has risen from where it is now.
    pub fn next(&self) -> Reached {
        self.reached(self.level() + 1)
    }

    /// Waits until the level is at least `level`.
    pub fn reached(&self, level: u64) -> Reached {
        Reached {
            inner: self.inner.clone(),
            level,
            slot: NOWHERE,
        }
    }
}

/// See [`Signal::reached`]. Costs a slot in a list while it waits, nothing when never polled.
pub struct Reached {
    inner: Rc<Inner>,
    level: u64,
    /// [`NOWHERE`] before the first poll.
    slot: u32,
}

/// No slot. A stream has several of these waits, and an `Option<usize>` would make each eight bytes larger.
const NOWHERE: u32 = u32::MAX;

impl Future for Reached {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.inner.level.get() >= self.level {
            return Poll::Ready(());
        }
        let slot = match self.slot {
            NOWHERE => {
                let slot = self.inner.free.borrow_mut().pop().unwrap_or_else(|| {
                    let mut waiting = self.inner.waiting.borrow_mut();
                    waiting.push(None);
                    (waiting.len() - 1) as u32
                });
                self.slot = slot;
                slot
            }
            slot => slot,
        };
        let waiting = &mut self.inner.waiting.borrow_mut()[slot as usize];
        if !waiting.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            *waiting = Some(cx.waker().clone());
        }
        Poll::Pending
    }
}

impl Drop for Reached {
    fn drop(&mut self) {
        if self.slot != NOWHERE {
            self.inner.waiting.borrow_mut()[self.slot as usize] = None;
            self.inner.free.borrow_mut().push(self.slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;

    #[test]
    fn wakes_all_and_reuses_slots() {
        let signal = Signal::default();
        let mut cx = Context::from_waker(Waker::noop());
        {
            let mut first = pin!(signal.reached(1));
            let mut second = pin!(signal.reached(2));
            assert!(first.as_mut().poll(&mut cx).is_pending());
            assert!(second.as_mut().poll(&mut cx).is_pending());
            signal.raise(1);
            assert!(first.as_mut().poll(&mut cx).is_ready());
            assert!(second.as_mut().poll(&mut cx).is_pending());
        }
        assert_eq!(signal.inner.free.borrow().len(), 2);
        signal.raise(2);
        assert!(pin!(signal.reached(2)).poll(&mut cx).is_ready());
    }
}
