//! Files that one thread appends to by plain stores: a shared mapping of a file whose blocks all
//! exist already.
//!
//! What is stored is in the page cache at once and so survives the death of the process; it
//! survives a power cut after the file's next `fdatasync`. An append takes no system call and no
//! lock. The first store to a page after it was written back costs one minor fault (the kernel
//! marks written-back pages read-only to learn of new stores: `page_mkclean`, mm/rmap.c).

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::Path,
    ptr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use memmap2::{MmapOptions, MmapRaw};

/// Appends start at multiples of this, bytes: one cache line.
pub const UNIT_BYTES: usize = 64;

/// Bytes of the word at the start of an append, which is stored last.
pub const WORD_BYTES: usize = 8;

/// What making a file leaves free on its disk, bytes: for the databases' journals and the small files of state.
const DISK_RESERVE_BYTES: usize = 1024 * 1024;

/// What the two ends of a mapping share.
#[derive(Debug)]
struct Region {
    map: MmapRaw,
    /// Bytes from the start that are written and will never be written again.
    committed: AtomicUsize,
    /// Whether the appender is gone.
    sealed: AtomicBool,
}

/// The writing end: one per file.
#[derive(Debug)]
pub struct Appender {
    region: Arc<Region>,
    /// Where the next append goes; a multiple of [`UNIT_BYTES`].
    at: usize,
}

/// The reading end. Sees what the appender has committed.
#[derive(Debug, Clone)]
pub struct View {
    region: Arc<Region>,
}

/// Creates the file `path` (mode 0600; it must not exist) of `bytes` bytes, starting with `head`
/// and otherwise zero, writes it to the disk and maps it. The appender goes on behind `head`.
///
/// All blocks are allocated here, so that no later store can find the disk full (which would be a
/// SIGBUS). The caller must see to it that no other process truncates the file.
///
/// # Errors
/// What the file system says, out of space included; a partly made file is removed. `head` must
/// be whole units and `bytes` whole pages, or it is an `InvalidInput`.
pub fn create(path: &Path, bytes: usize, head: &[u8]) -> io::Result<(File, Appender, View)> {
    if !head.len().is_multiple_of(UNIT_BYTES) || !bytes.is_multiple_of(4096) || head.len() > bytes {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    let made = ensure_room(&file, bytes)
        .and_then(|()| fill(&file, bytes, head))
        .and_then(|()| map(&file, bytes));
    match made {
        Ok(map) => {
            let region = Arc::new(Region {
                map,
                committed: AtomicUsize::new(head.len()),
                sealed: AtomicBool::new(false),
            });
            let view = View {
                region: region.clone(),
            };
            let at = head.len();
            Ok((file, Appender { region, at }, view))
        }
        Err(error) => {
            // The error to report is the first one; what could not be removed is removed at start.
            let _ = std::fs::remove_file(path);
            Err(error)
        }
    }
}

/// Fails where the disk would be full afterwards. Filling a file until there is no room would take the room of everything
/// else for that moment: of the databases, of the state of limits.
fn ensure_room(file: &File, bytes: usize) -> io::Result<()> {
    // SAFETY: statvfs is plain data for which all zeroes is valid.
    let mut figures: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is the file's, and the figures live over the call, which only writes them.
    if unsafe { libc::fstatvfs(file.as_raw_fd(), &raw mut figures) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let free = figures.f_bavail.saturating_mul(figures.f_frsize);
    if free < (bytes + DISK_RESERVE_BYTES) as u64 {
        return Err(io::Error::from_raw_os_error(libc::ENOSPC));
    }
    Ok(())
}

/// Gives the file all its blocks and its first contents, on the disk.
fn fill(mut file: &File, bytes: usize, head: &[u8]) -> io::Result<()> {
    static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];
    allocate(file, bytes)?;
    file.write_all(head)?;
    // Zeros are written although `fallocate` gave zeros: it leaves extents "unwritten", and each
    // first write-back of one would change the file system's metadata.
    let mut left = bytes - head.len();
    while left > 0 {
        let now = left.min(ZEROS.len());
        file.write_all(&ZEROS[..now])?;
        left -= now;
    }
    file.sync_all()
}

/// `fallocate(2)`; file systems without it get their blocks from the writes that follow.
fn allocate(file: &File, bytes: usize) -> io::Result<()> {
    loop {
        // SAFETY: a system call on a descriptor that `file` keeps open; no memory is passed.
        let result = unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, bytes as libc::off_t) };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => return Ok(()),
            _ => return Err(error),
        }
    }
}

/// Maps the file, its pages entered into the page table now rather than by the appending thread.
fn map(file: &File, bytes: usize) -> io::Result<MmapRaw> {
    MmapOptions::new().len(bytes).populate().map_raw(file)
}

impl Appender {
    /// Where the next append will stand, bytes from the file's start.
    pub fn offset(&self) -> usize {
        self.at
    }

    /// Bytes that are left, a multiple of [`UNIT_BYTES`].
    pub fn remaining(&self) -> usize {
        self.region.map.len() - self.at
    }

    /// Appends `frame`, whose first [`WORD_BYTES`] bytes are stored after all others: whoever finds
    /// them in the file, also after this process was killed in between, finds the rest as well.
    /// Returns false, and does nothing, where `frame` is not whole units or does not fit.
    pub fn append(&mut self, frame: &[u8]) -> bool {
        if frame.is_empty() || !frame.len().is_multiple_of(UNIT_BYTES) || frame.len() > self.remaining() {
            return false;
        }
        let (word, body) = frame.split_at(WORD_BYTES);
        let word = word.try_into().map_or(0, u64::from_ne_bytes);
        // SAFETY: `at + frame.len() <= map.len()`, so the whole frame lies in the mapping, which
        // lives as long as `region`. The file was created by `create` alone, so this is its only
        // appender and `&mut self` the only writer; readers are given bytes below `committed` only,
        // and `at` is never below it. `at` is a multiple of 64 and the mapping is page-aligned, so
        // the word is aligned; it is accessed atomically here and by nobody else before `committed`
        // passes it.
        unsafe {
            let start = self.region.map.as_mut_ptr().add(self.at);
            ptr::copy_nonoverlapping(body.as_ptr(), start.add(WORD_BYTES), body.len());
            AtomicU64::from_ptr(start.cast()).store(word, Ordering::Release);
        }
        self.at += frame.len();
        self.region.committed.store(self.at, Ordering::Release);
        true
    }
}

impl Drop for Appender {
    fn drop(&mut self) {
        self.region.sealed.store(true, Ordering::Release);
    }
}

impl View {
    /// The file's bytes up to the end of the last append.
    pub fn committed(&self) -> &[u8] {
        let bytes = self.region.committed.load(Ordering::Acquire);
        // SAFETY: `committed` never exceeds the mapping's length; the bytes below it were written
        // before the release store that was just acquired and are not written again by this process
        // (see `Appender::append`); other processes are kept out by the directory's mode and lock.
        // The slice borrows `self`, which holds the mapping.
        unsafe { std::slice::from_raw_parts(self.region.map.as_ptr(), bytes) }
    }

    /// Bytes up to the end of the last append.
    pub fn committed_bytes(&self) -> usize {
        self.region.committed.load(Ordering::Acquire)
    }

    /// Whether the appender is gone. Once true, [`View::committed`] does not change any more.
    pub fn sealed(&self) -> bool {
        self.region.sealed.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn appends_are_seen_by_the_view_and_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let (_file, mut appender, view) = create(&path, 4096, &[7; 64]).unwrap();
        assert_eq!(view.committed(), [7; 64]);
        assert!(appender.append(&[9; 128]));
        assert_eq!(appender.offset(), 192);
        assert_eq!(&view.committed()[64..], [9; 128]);
        let file = std::fs::read(&path).unwrap();
        assert_eq!(file.len(), 4096);
        assert_eq!(&file[64..192], [9; 128]);
        assert!(file[192..].iter().all(|byte| *byte == 0));
        assert!(!view.sealed());
        drop(appender);
        assert!(view.sealed());
    }

    #[test]
    fn what_does_not_fit_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let (_file, mut appender, view) = create(&path, 4096, &[]).unwrap();
        assert!(!appender.append(&[1; 63]));
        assert!(!appender.append(&[]));
        assert!(appender.append(&[1; 4032]));
        assert!(!appender.append(&[1; 128]));
        assert!(appender.append(&[1; 64]));
        assert_eq!((appender.remaining(), view.committed_bytes()), (0, 4096));
    }

    #[test]
    fn an_existing_file_is_refused_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, "kept").unwrap();
        assert_eq!(
            create(&path, 4096, &[]).unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"kept");
    }

    #[test]
    fn the_file_is_private() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (file, ..) = create(&dir.path().join("a"), 4096, &[]).unwrap();
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }
}
