//! Buffers for what is sent, and for what nobody has read yet: used again, so that a streamed event allocates nothing.

use super::slot::QUEUE_BYTES_MAX;

/// First capacity of a buffer, bytes: a streamed event and a small answer fit.
const FIRST_BYTES: usize = 1024;

/// Capacity of all that are kept, bytes.
const KEPT_BYTES_MAX: usize = 1024 * 1024;

/// Empty buffers, the last used on top, where it is still in the CPU's cache.
#[derive(Default)]
pub struct Spare {
    buffers: Vec<Vec<u8>>,
    /// Their capacity.
    bytes: usize,
    /// The fewest that were here since [`Spare::release`]: so many were not used.
    least: usize,
}

impl Spare {
    /// An empty buffer.
    pub fn take(&mut self) -> Vec<u8> {
        match self.buffers.pop() {
            Some(buffer) => {
                self.bytes -= buffer.capacity();
                self.least = self.least.min(self.buffers.len());
                buffer
            }
            None => Vec::with_capacity(FIRST_BYTES),
        }
    }

    /// Takes a buffer back, whatever it holds. Large ones are freed.
    pub fn give(&mut self, mut buffer: Vec<u8>) {
        let bytes = buffer.capacity();
        if bytes > 0 && bytes <= QUEUE_BYTES_MAX && self.bytes + bytes <= KEPT_BYTES_MAX {
            buffer.clear();
            self.bytes += bytes;
            self.buffers.push(buffer);
        }
    }

    /// To be called every few seconds: frees those that a burst has left and that nobody has used since the last call. One
    /// stays, for a stream that sends now and then.
    pub fn release(&mut self) {
        let unused = self.least.min(self.buffers.len().saturating_sub(1));
        for buffer in self.buffers.drain(..unused) {
            self.bytes -= buffer.capacity();
        }
        self.least = self.buffers.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_no_more_than_it_may() {
        let mut spare = Spare::default();
        spare.give(vec![1; QUEUE_BYTES_MAX + 1]);
        spare.give(Vec::new());
        assert_eq!(spare.bytes, 0);
        for _ in 0..1000 {
            spare.give(vec![1; QUEUE_BYTES_MAX]);
        }
        assert_eq!(spare.bytes, KEPT_BYTES_MAX);
        let kept = KEPT_BYTES_MAX / QUEUE_BYTES_MAX;
        for _ in 0..kept {
            let buffer = spare.take();
            assert!(buffer.is_empty() && buffer.capacity() == QUEUE_BYTES_MAX);
        }
        assert_eq!((spare.bytes, spare.take().capacity()), (0, FIRST_BYTES));
    }

    #[test]
    fn frees_what_is_not_used() {
        let mut spare = Spare::default();
        for _ in 0..10 {
            spare.give(Vec::with_capacity(FIRST_BYTES));
        }
        // All came since the last call.
        spare.release();
        assert_eq!(spare.buffers.len(), 10);
        for _ in 0..100 {
            let used = [spare.take(), spare.take(), spare.take()];
            used.into_iter().for_each(|buffer| spare.give(buffer));
        }
        spare.release();
        assert_eq!((spare.buffers.len(), spare.bytes), (3, 3 * FIRST_BYTES));
        spare.release();
        spare.release();
        assert_eq!((spare.buffers.len(), spare.bytes), (1, FIRST_BYTES));
    }
}
