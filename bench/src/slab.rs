//! Connections by index: a freed index is used again.

/// Values at stable indices.
pub(crate) struct Slab<T> {
    entries: Vec<Option<T>>,
    free: Vec<usize>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<T> Slab<T> {
    /// The index that the next [`Self::insert`] uses.
    pub fn vacant(&self) -> usize {
        self.free.last().copied().unwrap_or(self.entries.len())
    }

    /// Stores `value` and returns its index.
    pub fn insert(&mut self, value: T) -> usize {
        let index = self.vacant();
        if self.free.pop().is_some() {
            self.entries[index] = Some(value);
        } else {
            self.entries.push(Some(value));
        }
        index
    }

    pub fn get_mut(&mut self, index: usize) -> Option<&mut T> {
        self.entries.get_mut(index)?.as_mut()
    }

    /// Takes a value out; its index is free then.
    pub fn remove(&mut self, index: usize) -> Option<T> {
        let value = self.entries.get_mut(index)?.take()?;
        self.free.push(index);
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_are_used_again() {
        let mut slab = Slab::default();
        assert_eq!((slab.insert('a'), slab.insert('b')), (0, 1));
        assert_eq!(slab.remove(0), Some('a'));
        assert_eq!(slab.remove(0), None);
        assert_eq!((slab.vacant(), slab.insert('c')), (0, 0));
        assert_eq!(slab.get_mut(0), Some(&mut 'c'));
    }
}
