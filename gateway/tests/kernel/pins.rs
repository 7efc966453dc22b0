//! What outlives a process, and what must not.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use gateway::{
    config::schema,
    kernel::{Kernel, remove_pins},
};

use crate::support::{Group, HOLD, connect, guarded, guarded_with, in_state, ip, net, refused, until};

const BPFFS: &str = "/sys/fs/bpf";

isolated! {
    blocks_and_counts_outlive_a_restart("-all,+bpf,+perfmon,+net_admin") {
        let (kernel, group) = guarded();
        kernel.block(net("127.0.0.7"), HOLD).expect("blocked");
        kernel.block(net("127.5.0.0/16"), HOLD).expect("blocked");
        assert!(refused("127.0.0.7", group.port()) && refused("127.5.0.7", group.port()));
        group.core_of("127.0.0.8");
        until("it has ended", || kernel.stats().closed == 1);
        let before = kernel.stats();
        drop((kernel, group));
        let (kernel, group) = guarded();
        assert_eq!(kernel.stats(), before);
        assert_eq!(kernel.clients(1)[0].client, ip("127.0.0.8"));
        assert!(refused("127.0.0.7", group.port()) && refused("127.5.0.7", group.port()));
        assert_eq!(kernel.blocked().iter().map(|blocked| blocked.dropped).collect::<Vec<_>>(), [2, 2]);
        assert!(kernel.unblock(net("127.5.0.0/16")).expect("unblocked"));
        group.core_of("127.5.0.7");
    }

    connections_that_ended_unseen_are_not_open_for_ever("") {
        let (kernel, group) = guarded();
        let client = connect("127.0.0.8", group.port()).expect("a connection");
        let server = group.accept();
        assert_eq!((kernel.stats().opened, kernel.stats().closed), (1, 0));
        drop(kernel);
        drop((client, server, group));
        let (kernel, _group) = guarded();
        assert_eq!((kernel.stats().opened, kernel.stats().closed), (1, 1));
        assert!(kernel.clients(10).iter().all(|client| client.open() == 0));
    }

    another_layout_starts_clean("") {
        let (kernel, group) = guarded();
        kernel.block(net("127.0.0.7"), HOLD).expect("blocked");
        let old = kernel.pinned().expect("pinned").to_path_buf();
        drop(kernel);
        // As an earlier version would have left it, and a map of which only the name is right.
        let earlier = old.with_file_name("0123456789abcdef-32-64");
        fs::create_dir(&earlier).expect("a directory");
        let strange = aya::maps::HashMap::<_, u32, u32>::create(8, 0).expect("a map");
        fs::remove_file(old.join("CLIENTS")).expect("unpinned");
        strange.pin(old.join("CLIENTS")).expect("pinned");
        let (kernel, _group) = guarded();
        assert!(!earlier.exists());
        assert!(kernel.clients(10).is_empty());
        assert_eq!(kernel.blocked().len(), 1, "what fits is kept");
        drop(kernel);
        let mut config = schema::Kernel::default();
        config.drop.prefix_v4 = 24;
        let (kernel, _group) = guarded_with(&config);
        assert!(kernel.blocked().is_empty() && !old.exists());
        drop(group);
    }

    an_instance_belongs_to_one_gateway("") {
        let (first, _first_group) = guarded();
        let group = Group::new("127.0.0.1:0", 2);
        let mut second = crate::support::load(&schema::Kernel::default(), 2).expect("the programs");
        second.guard(&group.fds()).expect("guarded");
        let degraded = second.degraded();
        assert!(degraded.len() == 1 && degraded[0].contains("kernel.instance"), "{degraded:?}");
        first.block(net("127.0.0.7"), HOLD).expect("blocked");
        group.core_of("127.0.0.7");
        assert!(second.pinned().is_none());
        drop(first);
        let (third, _group) = guarded();
        assert_eq!(third.blocked().len(), 1);
    }

    what_is_abandoned_is_removed("") {
        let state = tempfile::tempdir().expect("a directory");
        let kernel = in_state(state.path()).expect("the programs");
        let abandoned = kernel.pinned().expect("pinned").to_path_buf();
        let (other, _group) = guarded();
        assert!(abandoned.exists(), "the gateway runs");
        drop((kernel, other));
        let _ = guarded();
        assert!(abandoned.exists(), "its state is there");
        drop(state);
        let _ = guarded();
        assert!(!abandoned.exists());
        // By hand also what is not abandoned, but never what is in use.
        let (kernel, _group) = guarded();
        assert!(remove_pins(Path::new(BPFFS), None).expect("read").is_empty());
        let place = kernel.pinned().expect("pinned").to_path_buf();
        drop(kernel);
        assert_eq!(remove_pins(Path::new(BPFFS), Some("another")).expect("read").len(), 0);
        assert_eq!(remove_pins(Path::new(BPFFS), None).expect("read").len(), 1);
        assert!(!place.exists());
    }

    without_a_bpf_file_system_nothing_is_kept_and_it_is_said("-all,+bpf,+perfmon,+net_admin") {
        let config = schema::Kernel { bpffs: "/proc".into(), ..schema::Kernel::default() };
        let kernel = crate::support::load(&config, 1).expect("the programs");
        let degraded = kernel.degraded();
        assert!(degraded.len() == 1 && degraded[0].contains("mount -t bpf bpf /proc"), "{degraded:?}");
    }

    a_bpf_file_system_is_mounted_where_that_may_be("") {
        let place = tempfile::tempdir().expect("a directory");
        let config = schema::Kernel { bpffs: place.path().into(), ..schema::Kernel::default() };
        let kernel = crate::support::load(&config, 1).expect("the programs");
        assert_eq!(kernel.degraded(), Vec::<String>::new());
        assert!(kernel.pinned().expect("pinned").starts_with(place.path()));
        drop(kernel);
        let _ = Command::new("umount").arg(place.path()).status();
    }

    a_killed_gateway_leaves_blocks_and_nothing_attached("") {
        let directory = tempfile::tempdir().expect("a directory");
        let gateway = Running::start(directory.path());
        gateway.cli(&["kernel", "block", "127.0.0.7", "--for", "1h"]);
        gateway.cli(&["kernel", "block", "127.5.0.0/16"]);
        assert!(refused("127.0.0.7", PORT) && refused("127.5.0.1", PORT));
        assert!(rights(gateway.child.id()).iter().all(|held| held >> 39 & 1 == 0 && held >> 12 & 1 == 0),
            "no thread keeps CAP_BPF or CAP_NET_ADMIN");
        drop(gateway); // by SIGKILL
        // Nothing of it is at work once the kernel has put its sockets away, and the port is another's.
        until("the port is free", || std::net::TcpListener::bind(("127.0.0.1", PORT)).is_ok());
        let group = Group::new(&format!("127.0.0.1:{PORT}"), 1);
        group.core_of("127.0.0.7");
        drop(group);
        until("the port is free again", || gateway::net::tcp::ensure_free(([127, 0, 0, 1], PORT).into()).is_ok());
        let gateway = Running::start(directory.path());
        assert!(refused("127.0.0.7", PORT) && refused("127.5.0.1", PORT));
        let status = gateway.cli(&["kernel", "status"]);
        assert!(status.contains("127.0.0.7/32") && status.contains("127.5.0.0/16"), "{status}");
        assert!(gateway.cli(&["kernel", "unblock", "127.0.0.7"]).contains("may connect again"));
        assert!(!refused("127.0.0.7", PORT));
        gateway.cli(&["kernel", "clients"]);
        let clear = Command::new(BINARY).args(["kernel", "clear"]).output().expect("the binary");
        let clear = String::from_utf8_lossy(&clear.stdout).into_owned();
        assert!(clear.contains("nothing is left"), "{clear}");
    }

    required_means_required("-all") {
        let directory = tempfile::tempdir().expect("a directory");
        let config = write(directory.path(), "required");
        let output = Command::new(BINARY).args(["run", "-c"]).arg(config).output().expect("the binary");
        assert!(!output.status.success());
        let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("kernel.mode is required") && text.contains("CAP_BPF is missing"), "{text}");
    }
}

const BINARY: &str = env!("CARGO_BIN_EXE_gateway");
/// The namespace is the test's own, so the ports are.
const PORT: u16 = 18080;

/// The built binary; ended by SIGKILL.
struct Running {
    child: Child,
    config: PathBuf,
}

impl Running {
    fn start(directory: &Path) -> Running {
        let config = write(directory, "required");
        let log = fs::File::create(directory.join("log")).expect("a log");
        let child = Command::new(BINARY)
            .args(["run", "-c"])
            .arg(&config)
            .stdout(log.try_clone().expect("a log"))
            .stderr(Stdio::from(log))
            .spawn()
            .expect("the binary");
        let mut running = Running { child, config };
        until("the gateway serves", || {
            let ended = running.child.try_wait().expect("a child");
            assert!(
                ended.is_none(),
                "{}",
                fs::read_to_string(directory.join("log")).unwrap_or_default()
            );
            connect("127.0.0.1", 19900).is_ok() && connect("127.0.0.1", PORT).is_ok()
        });
        running
    }

    fn cli(&self, arguments: &[&str]) -> String {
        let output = Command::new(BINARY)
            .args(arguments)
            .arg("-c")
            .arg(&self.config)
            .output()
            .expect("the binary");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{arguments:?}: {text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        text
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn write(directory: &Path, mode: &str) -> PathBuf {
    let config = directory.join("gateway.yaml");
    let state = directory.join("state");
    let text = format!(
        "listeners: [{{ address: '127.0.0.1:{PORT}' }}]\n\
         admin: {{ address: '127.0.0.1:19900', token: a-token-of-a-test-that-is-long-enough }}\n\
         kernel: {{ mode: {mode} }}\n\
         ledger: {{ path: {} }}\n",
        state.display()
    );
    fs::write(&config, text).expect("written");
    config
}

/// The permitted capabilities of each thread of a process.
fn rights(pid: u32) -> Vec<u64> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("threads");
    let held = threads.map(|thread| {
        let status = fs::read_to_string(thread.expect("a thread").path().join("status")).expect("a status");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("CapPrm:"))
            .expect("a set")
            .trim()
            .to_string();
        u64::from_str_radix(&line, 16).expect("a number")
    });
    held.collect()
}

#[allow(dead_code)]
fn is_send_and_sync(kernel: Kernel) -> impl Send + Sync {
    (kernel, Duration::ZERO)
}
