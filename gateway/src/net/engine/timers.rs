//! The timers of one core: a binary heap whose entries know their places, so that one can be taken out early.

use std::task::Waker;

/// The place of an entry that is not in the heap.
const NOWHERE: u32 = u32::MAX;

struct Entry {
    /// Where it stands in the heap; [`NOWHERE`] when it has fired or is free.
    place: u32,
    waker: Option<Waker>,
}

/// Timers in the order of their deadlines. Grows with the timers that run at the same time and never shrinks.
#[derive(Default)]
pub struct Timers {
    /// Deadlines (nanoseconds of the monotonic clock) and entries; each is no later than its two children.
    heap: Vec<(u64, u32)>,
    entries: Vec<Entry>,
    free: Vec<u32>,
}

impl Timers {
    /// Adds a timer; its number is valid until [`Timers::remove`].
    pub fn add(&mut self, deadline_ns: u64, waker: Waker) -> u32 {
        let entry = Entry {
            place: self.heap.len() as u32,
            waker: Some(waker),
        };
        let id = match self.free.pop() {
            Some(id) => {
                self.entries[id as usize] = entry;
                id
            }
            None => {
                self.entries.push(entry);
                (self.entries.len() - 1) as u32
            }
        };
        self.heap.push((deadline_ns, id));
        self.rise(self.heap.len() - 1);
        id
    }

    /// Takes a timer out, fired or not.
    pub fn remove(&mut self, id: u32) {
        let entry = &mut self.entries[id as usize];
        entry.waker = None;
        let place = std::mem::replace(&mut entry.place, NOWHERE);
        if place != NOWHERE {
            self.take_out(place as usize);
        }
        self.free.push(id);
    }

    /// Whether a timer has fired; otherwise notes who waits for it.
    pub fn has_fired(&mut self, id: u32, waker: &Waker) -> bool {
        let entry = &mut self.entries[id as usize];
        if entry.place == NOWHERE {
            return true;
        }
        match &mut entry.waker {
            Some(known) => known.clone_from(waker),
            None => entry.waker = Some(waker.clone()),
        }
        false
    }

    /// The next deadline.
    pub fn next_ns(&self) -> Option<u64> {
        self.heap.first().map(|&(deadline_ns, _)| deadline_ns)
    }

    /// Takes out one timer that is due, and tells whom to wake.
    pub fn fire(&mut self, now_ns: u64) -> Option<Waker> {
        while let Some(&(deadline_ns, id)) = self.heap.first() {
            if deadline_ns > now_ns {
                return None;
            }
            self.entries[id as usize].place = NOWHERE;
            self.take_out(0);
            if let Some(waker) = self.entries[id as usize].waker.take() {
                return Some(waker);
            }
        }
        None
    }

    /// Fills a place of the heap with its last element.
    fn take_out(&mut self, place: usize) {
        self.heap.swap_remove(place);
        if place < self.heap.len() {
            self.set(place);
            self.sink(place);
            self.rise(place);
        }
    }

    fn set(&mut self, place: usize) {
        let id = self.heap[place].1;
        self.entries[id as usize].place = place as u32;
    }

    fn swap(&mut self, a: usize, b: usize) {
        self.heap.swap(a, b);
        self.set(a);
        self.set(b);
    }

    fn rise(&mut self, mut place: usize) {
        while place > 0 {
            let parent = (place - 1) / 2;
            if self.heap[parent].0 <= self.heap[place].0 {
                return;
            }
            self.swap(parent, place);
            place = parent;
        }
    }

    fn sink(&mut self, mut place: usize) {
        loop {
            let (left, right) = (2 * place + 1, 2 * place + 2);
            let mut first = place;
            for child in [left, right] {
                if child < self.heap.len() && self.heap[child].0 < self.heap[first].0 {
                    first = child;
                }
            }
            if first == place {
                return;
            }
            self.swap(first, place);
            place = first;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever is added and removed, in whatever order: what fires is what a sorted list would give.
        #[test]
        fn fires_like_a_sorted_list(steps in prop::collection::vec((0..3_u8, 0..50_u64), 1..200)) {
            let mut timers = Timers::default();
            let mut model: Vec<(u64, u32)> = Vec::new();
            let mut fired: Vec<u32> = Vec::new();
            for (step, number) in steps {
                match step {
                    0 => model.push((number, timers.add(number, Waker::noop().clone()))),
                    1 if !model.is_empty() => {
                        let (_, id) = model.swap_remove(number as usize % model.len());
                        timers.remove(id);
                    }
                    _ => {
                        let due = model.iter().filter(|(deadline, _)| *deadline <= number).count();
                        let mut count = 0;
                        while timers.fire(number).is_some() {
                            count += 1;
                        }
                        prop_assert_eq!(count, due);
                        fired.extend(model.iter().filter(|(deadline, _)| *deadline <= number).map(|t| t.1));
                        model.retain(|(deadline, _)| *deadline > number);
                        for id in fired.drain(..) {
                            prop_assert!(timers.has_fired(id, Waker::noop()));
                            timers.remove(id);
                        }
                    }
                }
                prop_assert_eq!(timers.next_ns(), model.iter().map(|t| t.0).min());
                for &(_, id) in &model {
                    prop_assert!(!timers.has_fired(id, Waker::noop()));
                }
            }
        }
    }
}
