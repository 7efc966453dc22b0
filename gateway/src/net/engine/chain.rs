//! Which received buffers belong to whom: chains through two arrays, without allocation. Pure bookkeeping; the bytes are
//! in [`super::buffers`].

/// No buffer.
const NONE: u16 = u16::MAX;

/// The buffers of one socket, in the order in which they came.
#[derive(Debug, Clone, Copy)]
pub struct Chain {
    head: u16,
    tail: u16,
    /// Bytes of the first buffer that have been taken.
    offset: u32,
}

impl Default for Chain {
    fn default() -> Chain {
        Chain {
            head: NONE,
            tail: NONE,
            offset: 0,
        }
    }
}

impl Chain {
    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.head == NONE
    }
}

/// What is known of each buffer that somebody holds.
pub struct Links {
    next: Vec<u16>,
    bytes: Vec<u32>,
}

impl Links {
    /// For buffers numbered from 0 to `count` − 1; at most 65,535.
    pub fn new(count: u16) -> Links {
        Links {
            next: vec![NONE; count.into()],
            bytes: vec![0; count.into()],
        }
    }

    /// Puts a buffer that holds `bytes`, at least one, behind a chain.
    pub fn push(&mut self, chain: &mut Chain, buffer: u16, bytes: u32) {
        self.next[usize::from(buffer)] = NONE;
        self.bytes[usize::from(buffer)] = bytes;
        if chain.head == NONE {
            chain.head = buffer;
            chain.offset = 0;
        } else {
            self.next[usize::from(chain.tail)] = buffer;
        }
        chain.tail = buffer;
    }

    /// The first buffer and which of its bytes are left.
    pub fn first(&self, chain: &Chain) -> Option<(u16, std::ops::Range<usize>)> {
        (chain.head != NONE).then(|| {
            let end = self.bytes[usize::from(chain.head)];
            (chain.head, chain.offset as usize..end as usize)
        })
    }

    /// Bytes of a chain that have not been taken.
    pub fn bytes(&self, chain: &Chain) -> usize {
        let (mut buffer, mut bytes) = (chain.head, 0);
        while buffer != NONE {
            bytes += self.bytes[usize::from(buffer)] as usize;
            buffer = self.next[usize::from(buffer)];
        }
        bytes - chain.offset as usize
    }

    /// Takes `bytes` of the first buffer. Returns the buffer when nothing is left of it.
    pub fn consume(&mut self, chain: &mut Chain, bytes: usize) -> Option<u16> {
        let buffer = chain.head;
        chain.offset += bytes as u32;
        if chain.offset < self.bytes[usize::from(buffer)] {
            return None;
        }
        chain.offset = 0;
        chain.head = self.next[usize::from(buffer)];
        if chain.head == NONE {
            chain.tail = NONE;
        }
        Some(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    const BUFFERS: u16 = 16;

    proptest! {
        /// Three sockets share sixteen buffers: each reads exactly what came for it, in order, and every buffer is
        /// either free or in one chain.
        #[test]
        fn chains_keep_bytes_and_buffers(steps in prop::collection::vec((0..3_usize, any::<bool>(), 1..9_usize), 1..300)) {
            let mut links = Links::new(BUFFERS);
            let mut chains = [Chain::default(); 3];
            let mut model: [VecDeque<(u16, usize)>; 3] = Default::default();
            let mut free: Vec<u16> = (0..BUFFERS).collect();
            for (who, comes, n) in steps {
                if comes {
                    let Some(buffer) = free.pop() else { continue };
                    links.push(&mut chains[who], buffer, n as u32);
                    model[who].extend((0..n).map(|byte| (buffer, byte)));
                } else if let Some((buffer, range)) = links.first(&chains[who]) {
                    let take = n.min(range.len());
                    for place in range.clone().take(take) {
                        prop_assert_eq!(model[who].pop_front(), Some((buffer, place)));
                    }
                    let done = links.consume(&mut chains[who], take);
                    prop_assert_eq!(done.is_some(), take == range.len());
                    free.extend(done);
                }
                for (chain, bytes) in chains.iter().zip(&model) {
                    prop_assert_eq!(chain.is_empty(), bytes.is_empty());
                    prop_assert_eq!(links.bytes(chain), bytes.len());
                }
            }
            for chain in &mut chains {
                while let Some((_, range)) = links.first(chain) {
                    free.extend(links.consume(chain, range.len()));
                }
            }
            free.sort_unstable();
            prop_assert_eq!(free, (0..BUFFERS).collect::<Vec<_>>());
        }
    }
}
