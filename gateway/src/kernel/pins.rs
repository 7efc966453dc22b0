//! Where maps outlive the process: a directory of the BPF file system, one for each gateway of the host.
//!
//! `<bpffs>/gateway/<instance>/<layout>/<map>`. The instance's directory is locked (flock(2)) while a gateway uses it. The
//! layout is a hash of the shared types and the clients' prefixes: maps of another one are removed, not read. A link
//! `owner` in the instance's directory names the state directory that it was made for; when that is gone, so is the
//! gateway, and the next one on the host removes what it left.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd,
        unix::{
            ffi::OsStrExt,
            fs::{DirBuilderExt, symlink},
        },
    },
    path::{Path, PathBuf},
    time::Duration,
};

use aya::maps::{MapInfo, MapType};
use gateway_common::{
    BLOCKS_MAX, Block, CLIENTS_MAX, Client, ClientKey, LAYOUT, NETS_MAX, PORTS_MAX, Port, Prefixes, Totals,
    names,
};

use super::off::Off;

/// Magic number of a BPF file system (BPF_FS_MAGIC, include/uapi/linux/magic.h).
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// The folder of all gateways in a BPF file system.
const FOLDER: &str = "gateway";

/// The link to the state directory.
const OWNER: &str = "owner";

/// Tries to lock an instance and the pause between them: another gateway may be looking whether it is abandoned.
const LOCK_TRIES: u32 = 10;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// A map that is pinned, as it must be to be taken over.
struct Pinned {
    name: &'static str,
    kind: MapType,
    key_bytes: usize,
    value_bytes: usize,
    entries: u32,
}

/// Blocks and counts. What belongs to sockets or to the configuration is made anew at each start.
const PINNED: [Pinned; 6] = [
    pinned::<ClientKey, Block>(names::BLOCKS, MapType::LruHash, BLOCKS_MAX),
    Pinned {
        name: names::NETS,
        kind: MapType::LpmTrie,
        key_bytes: size_of::<u32>() + size_of::<ClientKey>(),
        value_bytes: size_of::<Block>(),
        entries: NETS_MAX,
    },
    pinned::<ClientKey, Client>(names::CLIENTS, MapType::LruHash, CLIENTS_MAX),
    pinned::<u32, Totals>(names::TOTALS, MapType::PerCpuArray, 1),
    pinned::<u32, u32>(names::PORTS, MapType::Hash, PORTS_MAX),
    pinned::<u32, Port>(names::PORT_COUNTS, MapType::PerCpuArray, PORTS_MAX + 1),
];

const fn pinned<K, V>(name: &'static str, kind: MapType, entries: u32) -> Pinned {
    Pinned {
        name,
        kind,
        key_bytes: size_of::<K>(),
        value_bytes: size_of::<V>(),
        entries,
    }
}

/// A locked instance.
#[derive(Debug)]
pub struct Pins {
    directory: PathBuf,
    /// True when maps of an earlier run are there.
    found: bool,
    /// Held open for its lock.
    _lock: File,
}

impl Pins {
    /// Finds or makes the place of an instance, and locks it.
    ///
    /// # Errors
    /// Says what is missing: the mount, the right to write there, or that another gateway has the instance.
    pub fn open(bpffs: &Path, instance: &Instance, prefixes: Prefixes) -> Result<Pins, Off> {
        mounted(bpffs)?;
        let folder = bpffs.join(FOLDER);
        let home = folder.join(&instance.name);
        make(&folder)?;
        make(&home)?;
        let shown = home.display();
        let lock = lock(&home).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => Off::new(format!(
                "another gateway is running as {shown}; give this one its own kernel.instance"
            )),
            _ => Off::failed(&format!("locking {shown}"), &error),
        })?;
        remove_abandoned(&folder, &home);
        if let Some(owner) = &instance.owner {
            own(&home, owner);
        }
        let layout = format!("{LAYOUT:016x}-{}-{}", prefixes.v4, prefixes.v6);
        remove_other_layouts(&home, &layout);
        let directory = home.join(layout);
        make(&directory)?;
        let mut found = false;
        for map in &PINNED {
            found |= is_usable(&directory.join(map.name), map);
        }
        Ok(Pins {
            directory,
            found,
            _lock: lock,
        })
    }

    /// The maps that are pinned, each with its path.
    pub fn paths(&self) -> impl Iterator<Item = (&'static str, PathBuf)> {
        PINNED.iter().map(|map| (map.name, self.directory.join(map.name)))
    }

    /// Whether an earlier run left maps that are taken over.
    pub fn found(&self) -> bool {
        self.found
    }

    /// Where they are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}

/// Under which name maps are kept, and for whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    pub name: String,
    /// The state directory from which the name was made; None for a name of the configuration.
    pub owner: Option<PathBuf>,
}

impl Instance {
    /// The configured name, or one made of the state directory: its last part, and a hash of all of it.
    pub fn new(configured: Option<&str>, state: &Path) -> Instance {
        if let Some(name) = configured {
            return Instance {
                name: name.to_string(),
                owner: None,
            };
        }
        let state = fs::canonicalize(state).unwrap_or_else(|_| state.to_path_buf());
        let last = state.file_name().unwrap_or_default().to_string_lossy();
        // bpffs forbids dots in names (bpf_lookup, kernel/bpf/inode.c).
        let known = |c: &char| c.is_ascii_alphanumeric() || *c == '-' || *c == '_';
        let last: String = last.chars().filter(known).take(32).collect();
        let hash = fnv(state.as_os_str().as_bytes());
        Instance {
            name: format!("{last}-{hash:016x}"),
            owner: Some(state),
        }
    }
}

/// FNV-1a: stable over versions of Rust, as a name on disk must be.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Removes what gateways that do not run left in a BPF file system: those of this name, or all. Returns the names.
///
/// # Errors
/// The folder cannot be read.
pub fn remove(bpffs: &Path, only: Option<&str>) -> io::Result<Vec<String>> {
    let mut removed = Vec::new();
    for home in folders(&bpffs.join(FOLDER))? {
        let name = home
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if only.is_some_and(|only| only != name) {
            continue;
        }
        let Ok(_lock) = try_lock(&home) else { continue };
        if remove_all(&home).is_ok() {
            removed.push(name);
        }
    }
    Ok(removed)
}

/// Makes sure that a BPF file system is mounted there.
fn mounted(bpffs: &Path) -> Result<(), Off> {
    if is_bpffs(bpffs) {
        return Ok(());
    }
    let shown = bpffs.display();
    let mount = || -> io::Result<()> {
        let (kind, target) = (c"bpf", path_of(bpffs)?);
        let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
        let options = c"mode=0700";
        // SAFETY: four strings that end in a null byte and live for the call.
        let done = unsafe {
            libc::mount(
                kind.as_ptr(),
                target.as_ptr(),
                kind.as_ptr(),
                flags,
                options.as_ptr().cast(),
            )
        };
        match done {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    mount().map_err(|error| {
        Off::new(format!(
            "no BPF file system is mounted at {shown}, and it cannot be mounted ({error}): mount -t bpf bpf {shown}"
        ))
    })?;
    tracing::info!("mounted a BPF file system at {shown}");
    Ok(())
}

fn is_bpffs(path: &Path) -> bool {
    let Ok(path) = path_of(path) else { return false };
    // SAFETY: statfs is plain data, for which all zero is valid.
    let mut status: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: a string that ends in a null byte, and a structure to write to.
    let done = unsafe { libc::statfs(path.as_ptr(), &mut status) };
    // The field's type differs by architecture.
    #[allow(clippy::unnecessary_cast)]
    let kind = status.f_type as i64;
    done == 0 && kind & 0xffff_ffff == BPF_FS_MAGIC
}

fn path_of(path: &Path) -> io::Result<std::ffi::CString> {
    Ok(std::ffi::CString::new(path.as_os_str().as_bytes())?)
}

fn make(directory: &Path) -> Result<(), Off> {
    let mut builder = fs::DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(directory);
    made.map_err(|e| Off::failed(&format!("making {}", directory.display()), &e))
}

fn lock(home: &Path) -> io::Result<File> {
    for _ in 1..LOCK_TRIES {
        match try_lock(home) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(LOCK_PAUSE),
            locked => return locked,
        }
    }
    try_lock(home)
}

/// Locks a directory until the file is closed, also by the end of the process.
fn try_lock(home: &Path) -> io::Result<File> {
    let directory = File::open(home)?;
    // SAFETY: flock takes an open descriptor.
    match unsafe { libc::flock(directory.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } {
        0 => Ok(directory),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Notes for whom an instance was made.
fn own(home: &Path, owner: &Path) {
    let link = home.join(OWNER);
    if fs::read_link(&link).is_ok_and(|target| target == owner) {
        return;
    }
    let _ = fs::remove_file(&link);
    if let Err(error) = symlink(owner, &link) {
        tracing::debug!(%error, "cannot note whose maps these are; they stay until they are removed by hand");
    }
}

/// Removes instances whose state directory is gone, and which no gateway uses.
fn remove_abandoned(folder: &Path, own: &Path) {
    for home in folders(folder).unwrap_or_default() {
        let owner = fs::read_link(home.join(OWNER));
        let is_gone = |owner: PathBuf| matches!(fs::symlink_metadata(&owner), Err(e) if e.kind() == io::ErrorKind::NotFound);
        if home == own || !owner.is_ok_and(is_gone) {
            continue;
        }
        if let Ok(_lock) = try_lock(&home)
            && remove_all(&home).is_ok()
        {
            tracing::info!(
                "removed the kernel maps of a gateway whose state directory is gone: {}",
                home.display()
            );
        }
    }
}

fn remove_other_layouts(home: &Path, layout: &str) {
    for other in folders(home).unwrap_or_default() {
        if other.file_name().is_some_and(|name| name == layout) {
            continue;
        }
        match remove_all(&other) {
            Ok(()) => tracing::warn!(
                "the kernel maps in {} have another layout: blocks and counts start anew",
                other.display()
            ),
            Err(error) => tracing::warn!(%error, "cannot remove the old kernel maps in {}", other.display()),
        }
    }
}

/// Whether a pinned map is there and can be taken over. What is there and cannot be is removed.
fn is_usable(path: &Path, wanted: &Pinned) -> bool {
    if fs::symlink_metadata(path).is_err() {
        return false;
    }
    let fits = MapInfo::from_pin(path).is_ok_and(|info| {
        info.map_type()
            .is_ok_and(|kind| kind as u32 == wanted.kind as u32)
            && info.key_size() as usize == wanted.key_bytes
            && info.value_size() as usize == wanted.value_bytes
            && info.max_entries() == wanted.entries
    });
    if !fits {
        let shown = path.display();
        match fs::remove_file(path) {
            Ok(()) => tracing::warn!("{shown} is not the map it should be: it starts anew"),
            Err(error) => {
                tracing::warn!(%error, "{shown} is not the map it should be, and cannot be removed")
            }
        }
    }
    fits
}

/// The folders in a folder; none when it is not there.
fn folders(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut folders = Vec::new();
    for entry in entries.filter_map(Result::ok) {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            folders.push(entry.path());
        }
    }
    Ok(folders)
}

/// Unpins all in a folder, and removes it.
fn remove_all(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)?.filter_map(Result::ok) {
        match entry.file_type()?.is_dir() {
            true => remove_all(&entry.path())?,
            false => fs::remove_file(entry.path())?,
        }
    }
    fs::remove_dir(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_are_told_apart_by_their_state() {
        let at = |path: &str| Instance::new(None, Path::new(path)).name;
        assert!(at("/var/lib/gate.way").starts_with("gateway-"), "no dots");
        assert_ne!(at("/a/gateway"), at("/b/gateway"));
        assert_eq!(at("/a/gateway"), at("/a/gateway"));
        let named = Instance::new(Some("blue"), Path::new("/a"));
        assert_eq!((named.name.as_str(), named.owner), ("blue", None));
    }

    #[test]
    fn what_is_no_bpffs_is_not_taken_for_one() {
        assert!(!is_bpffs(Path::new("/proc")));
        assert!(!is_bpffs(Path::new("/nonexistent")));
    }
}
