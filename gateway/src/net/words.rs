//! A block of atomic words that all threads share, kept in a mapped file or in memory.
//!
//! What is stored in a mapped block is in the page cache at once and so survives the death of the process; the
//! kernel brings it to the disk within its own time (vm.dirty_expire_centisecs, 30 s), or [`Words::sync`] does.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::atomic::AtomicU64,
};

use memmap2::{MmapOptions, MmapRaw};

/// Where the words are.
#[derive(Debug)]
enum Home {
    Memory(Box<[AtomicU64]>),
    Mapped { map: MmapRaw, words: usize },
}

/// A fixed number of atomic words, all zero at first.
#[derive(Debug)]
pub struct Words(Home);

impl Words {
    /// Words that live as long as the process.
    pub fn in_memory(words: usize) -> Words {
        Words(Home::Memory((0..words).map(|_| AtomicU64::new(0)).collect()))
    }

    /// Creates the file `path` (mode 0600) with `words` words in place of what was there, and maps it.
    ///
    /// All its blocks are written here, so that no later store can find the disk full (which would be a SIGBUS). The
    /// caller must see to it that no other process truncates the file.
    ///
    /// # Errors
    /// What the file system says.
    pub fn create(path: &Path, words: usize) -> io::Result<Words> {
        let _ = std::fs::remove_file(path);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        fill(&mut file, words * size_of::<AtomicU64>())?;
        let map = MmapOptions::new()
            .len(words * size_of::<AtomicU64>())
            .map_raw(&file)?;
        Ok(Words(Home::Mapped { map, words }))
    }

    /// The words.
    pub fn all(&self) -> &[AtomicU64] {
        match &self.0 {
            Home::Memory(words) => words,
            // SAFETY: the mapping is page-aligned, `words` words long and lives as long as `self`, whose borrow the
            // slice keeps. Every access to it in this process goes through these atomics; other processes are kept
            // out by the file's mode and the state directory's lock. Any bits are a valid word.
            Home::Mapped { map, words } => unsafe {
                std::slice::from_raw_parts(map.as_ptr().cast::<AtomicU64>(), *words)
            },
        }
    }

    /// Asks the kernel to bring a mapped block to the disk, without waiting for it.
    pub fn sync(&self) -> io::Result<()> {
        match &self.0 {
            Home::Memory(_) => Ok(()),
            Home::Mapped { map, .. } => map.flush_async(),
        }
    }
}

fn fill(file: &mut File, bytes: usize) -> io::Result<()> {
    static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];
    let mut left = bytes;
    while left > 0 {
        let now = left.min(ZEROS.len());
        file.write_all(&ZEROS[..now])?;
        left -= now;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn what_is_stored_is_in_the_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("words");
        let words = Words::create(&path, 1024).expect("a file");
        words.all()[1023].store(0x0102_0304_0506_0708, Ordering::Relaxed);
        let bytes = std::fs::read(&path).expect("the file");
        assert_eq!(bytes.len(), 8192);
        assert_eq!(bytes[8184..], 0x0102_0304_0506_0708_u64.to_ne_bytes());
        drop(words);
        let words = Words::create(&path, 8).expect("a new file");
        assert!(words.all().iter().all(|word| word.load(Ordering::Relaxed) == 0));
    }
}
