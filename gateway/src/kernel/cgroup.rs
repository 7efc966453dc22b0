//! Which cgroup2 directory is this process's own.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The process's own cgroup2 directory, on pure and on hybrid hosts (where cgroup2 is mounted elsewhere than at
/// `/sys/fs/cgroup`). The error says what is missing, without a subject.
pub fn own() -> Result<PathBuf, String> {
    let cgroup = fs::read_to_string("/proc/self/cgroup").map_err(|e| format!("/proc/self/cgroup: {e}"))?;
    let mounts =
        fs::read_to_string("/proc/self/mountinfo").map_err(|e| format!("/proc/self/mountinfo: {e}"))?;
    let path = path_of(&cgroup).ok_or("this process is in no cgroup2")?;
    directory(&mounts, path).ok_or_else(|| "no cgroup2 mount shows this process's cgroup".to_string())
}

/// The cgroup2 path in `/proc/self/cgroup`: the line with hierarchy 0 (cgroups(7)).
fn path_of(cgroup: &str) -> Option<&Path> {
    cgroup
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .map(Path::new)
}

/// Where `path` is to be seen, by `/proc/self/mountinfo` (proc_pid_mountinfo(5)): fields 4 and 5 are the mount's root
/// within the file system and the mount point; the type follows a lone `-`.
fn directory(mounts: &str, path: &Path) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        if filesystem.split(' ').next() != Some("cgroup2") {
            return None;
        }
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (unescape(fields.next()?), unescape(fields.next()?));
        // A path outside of the mount's root (`/../…` in a container) has no directory here.
        let below = path.strip_prefix(&root).ok()?;
        let inside = below
            .components()
            .all(|part| matches!(part, std::path::Component::Normal(_)));
        inside.then(|| {
            if below.as_os_str().is_empty() {
                PathBuf::from(&point)
            } else {
                Path::new(&point).join(below)
            }
        })
    })
}

/// Undoes `\040` and the like, with which mountinfo writes spaces, tabs, newlines and backslashes.
fn unescape(field: &str) -> String {
    let mut parts = field.split('\\');
    let mut text = parts.next().unwrap_or_default().to_string();
    for part in parts {
        match part
            .get(..3)
            .and_then(|digits| u8::from_str_radix(digits, 8).ok())
        {
            Some(byte) if byte.is_ascii() => {
                text.push(char::from(byte));
                text.push_str(&part[3..]);
            }
            _ => {
                text.push('\\');
                text.push_str(part);
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const PURE: &str = "\
24 1 0:22 / /proc rw - proc proc rw
30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate
";
    const HYBRID: &str = "\
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    fn find(mounts: &str, cgroup: &str) -> Option<PathBuf> {
        directory(mounts, path_of(cgroup)?)
    }

    #[test]
    fn pure_hierarchy() {
        let dir = find(PURE, "0::/system.slice/gateway.service\n");
        assert_eq!(dir, Some("/sys/fs/cgroup/system.slice/gateway.service".into()));
    }

    #[test]
    fn hybrid_hierarchy_and_root_cgroup() {
        let cgroup = "9:name=systemd:/\n4:memory:/x\n0::/\n";
        assert_eq!(find(HYBRID, cgroup), Some("/sys/fs/cgroup/unified".into()));
    }

    #[test]
    fn a_mount_of_a_part_of_the_hierarchy() {
        let mounts = "41 31 0:38 /pod/a /my\\040mount rw - cgroup2 cgroup2 rw\n";
        assert_eq!(find(mounts, "0::/pod/a/b"), Some("/my mount/b".into()));
        assert_eq!(find(mounts, "0::/pod/c"), None);
    }

    #[test]
    fn what_cannot_be_seen_is_not_found() {
        assert_eq!(find(PURE, "0::/../other\n"), None);
        assert_eq!(find(PURE, "4:memory:/only-v1\n"), None);
        assert_eq!(find("", "0::/a\n"), None);
    }

    #[test]
    fn escapes() {
        assert_eq!(unescape(r"a\040b\134c\q"), r"a b\c\q");
    }
}
