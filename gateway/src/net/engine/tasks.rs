//! The tasks of one core: a slab of futures, a queue of those that are ready, and wakers that are just their numbers.
//!
//! A waker holds a task's place and generation and nothing else: cloning and dropping it are free, and one that
//! outlives its task wakes nobody. It works on the thread of its engine only; elsewhere it does nothing. Nothing in the
//! data plane is woken from another thread: what others have to say, a core looks for at its ticks.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::Future,
    pin::Pin,
    ptr,
    task::{Context, Poll, RawWaker, RawWakerVTable, Waker},
};

/// A task's generation (upper half) and place (lower half).
type Id = u64;

/// The place of the future that [`super::run`] was given: it has no slot.
const MAIN: u32 = u32::MAX;

type Boxed = Pin<Box<dyn Future<Output = ()>>>;

struct Slot {
    generation: u32,
    /// It stands in the ready queue.
    scheduled: bool,
    /// `None` while it is being polled, and in a free slot.
    future: Option<Boxed>,
}

/// See the module.
#[derive(Default)]
pub struct Tasks {
    slots: RefCell<Vec<Slot>>,
    free: RefCell<Vec<u32>>,
    ready: RefCell<VecDeque<Id>>,
    main_is_ready: Cell<bool>,
}

thread_local! {
    static TASKS: Tasks = Tasks::default();
}

/// Calls `f` with this thread's tasks. Nothing is called while the thread ends.
pub fn with<R>(f: impl FnOnce(&Tasks) -> R) -> Option<R> {
    TASKS.try_with(f).ok()
}

impl Tasks {
    /// Takes a task in, ready to run.
    pub fn spawn(&self, future: Boxed) {
        let index = self.free.borrow_mut().pop().unwrap_or_else(|| {
            let mut slots = self.slots.borrow_mut();
            slots.push(Slot {
                generation: 0,
                scheduled: false,
                future: None,
            });
            (slots.len() - 1) as u32
        });
        let generation = {
            let slot = &mut self.slots.borrow_mut()[index as usize];
            slot.future = Some(future);
            slot.generation
        };
        self.schedule(id(index, generation));
    }

    /// Puts a task into the ready queue, where it is not there already.
    fn schedule(&self, id: Id) {
        let (index, generation) = parts(id);
        if index == MAIN {
            return self.main_is_ready.set(true);
        }
        let mut slots = self.slots.borrow_mut();
        let Some(slot) = slots.get_mut(index as usize) else {
            return;
        };
        if slot.generation == generation && !std::mem::replace(&mut slot.scheduled, true) {
            self.ready.borrow_mut().push_back(id);
        }
    }

    /// Whether anything wants to run.
    pub fn any_ready(&self) -> bool {
        self.main_is_ready.get() || !self.ready.borrow().is_empty()
    }

    /// Whether the main future has been woken since this was last asked.
    pub fn take_main(&self) -> bool {
        self.main_is_ready.replace(false)
    }

    /// Runs the tasks that are ready now; those that become ready meanwhile wait for the next turn.
    pub fn run_ready(&self) {
        let count = self.ready.borrow().len();
        for _ in 0..count {
            let Some(id) = self.ready.borrow_mut().pop_front() else {
                return;
            };
            self.run(id);
        }
    }

    fn run(&self, id: Id) {
        let (index, generation) = parts(id);
        let future = {
            let mut slots = self.slots.borrow_mut();
            let slot = &mut slots[index as usize];
            if slot.generation != generation {
                return;
            }
            slot.scheduled = false;
            slot.future.take()
        };
        let Some(mut future) = future else {
            return;
        };
        // Ended also when it panics: the slot is then never used again, which is harmless.
        let waker = waker(id);
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Pending => self.slots.borrow_mut()[index as usize].future = Some(future),
            Poll::Ready(()) => {
                // Dropping it may spawn, wake and close sockets.
                drop(future);
                self.retire(index);
            }
        }
    }

    fn retire(&self, index: u32) {
        let slot = &mut self.slots.borrow_mut()[index as usize];
        slot.generation = slot.generation.wrapping_add(1);
        slot.scheduled = false;
        self.free.borrow_mut().push(index);
    }

    /// Drops all tasks, also those that are spawned by that.
    pub fn clear(&self) {
        let mut index = 0;
        loop {
            let future = match self.slots.borrow_mut().get_mut(index) {
                Some(slot) => slot.future.take(),
                None => break,
            };
            drop(future);
            index += 1;
        }
        self.ready.borrow_mut().clear();
        self.free.borrow_mut().clear();
        let slots = std::mem::take(&mut *self.slots.borrow_mut());
        drop(slots);
    }
}

/// The waker of the main future.
pub fn main_waker() -> Waker {
    waker(id(MAIN, 0))
}

fn id(index: u32, generation: u32) -> Id {
    u64::from(generation) << 32 | u64::from(index)
}

fn parts(id: Id) -> (u32, u32) {
    (id as u32, (id >> 32) as u32)
}

// An id must fit into a waker's pointer.
const _: () = assert!(size_of::<usize>() >= size_of::<Id>());

static VTABLE: RawWakerVTable = RawWakerVTable::new(|data| RawWaker::new(data, &VTABLE), wake, wake, |_| {});

fn waker(id: Id) -> Waker {
    let data = ptr::without_provenance(id as usize);
    // SAFETY: the data is a number, never dereferenced; all four functions are safe to call with any number from any
    // thread: they reach only the calling thread's own tasks.
    unsafe { Waker::from_raw(RawWaker::new(data, &VTABLE)) }
}

fn wake(data: *const ()) {
    with(|tasks| tasks.schedule(data.addr() as Id));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::rc::Rc;

    /// Polls to end after so many.
    struct Steps {
        left: u32,
        polled: Rc<Cell<u32>>,
        kept: Rc<RefCell<Option<Waker>>>,
    }

    impl Future for Steps {
        type Output = ();

        fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
            self.polled.set(self.polled.get() + 1);
            *self.kept.borrow_mut() = Some(cx.waker().clone());
            if self.left == 0 {
                return Poll::Ready(());
            }
            self.left -= 1;
            cx.waker().wake_by_ref();
            cx.waker().wake_by_ref();
            Poll::Pending
        }
    }

    #[test]
    fn a_task_runs_once_for_many_wakes_and_old_wakers_wake_nobody() {
        with(|tasks| {
            let (polled, kept) = (Rc::new(Cell::new(0)), Rc::new(RefCell::new(None)));
            let steps = |left| {
                Box::pin(Steps {
                    left,
                    polled: polled.clone(),
                    kept: kept.clone(),
                })
            };
            tasks.spawn(steps(2));
            let mut turns = 0;
            while tasks.any_ready() {
                tasks.run_ready();
                turns += 1;
            }
            assert_eq!((turns, polled.get()), (3, 3));
            // The next task takes the same slot; the first one's waker is not its.
            let old: Waker = kept.borrow_mut().take().expect("a waker");
            tasks.spawn(Box::pin(std::future::pending()));
            tasks.run_ready();
            old.wake();
            assert!(!tasks.any_ready());
            tasks.clear();
        });
    }

    #[test]
    fn a_waker_on_another_thread_is_harmless() {
        let waker = main_waker();
        std::thread::spawn(move || waker.wake()).join().expect("no panic");
    }
}
