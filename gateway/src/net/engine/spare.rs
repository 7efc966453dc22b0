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
}

impl Spare {
    /// An empty buffer.
    pub fn take(&mut self) -> Vec<u8> {
        match self.buffers.pop() {
            Some(buffer) => {
                self.bytes -= buffer.capacity();
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
}
