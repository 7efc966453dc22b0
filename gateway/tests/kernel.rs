//! The real programs in the real kernel: early drop, steering, accounting.
//!
//! Each test runs in a child process of its own, in a fresh network namespace and a fresh cgroup, so that tests neither
//! meet each other nor the host. It needs root, BPF, cgroup2 and `unshare`, `ip`, `setpriv`; without them it prints
//! `skipped: <reason>` and passes, unless `GATEWAY_TESTS_REQUIRED=kernel` is set.

/// Declares tests that run isolated, with a bounding set of capabilities (of `setpriv`; empty: all that there are).
macro_rules! isolated {
    ($($name:ident($caps:literal) $body:block)*) => {$(
        #[test]
        fn $name() {
            // As the test runner names it: without the crate.
            let path = concat!(module_path!(), "::", stringify!($name));
            let path = path.split_once("::").map_or(path, |(_, path)| path);
            if std::env::var(crate::support::INNER).as_deref() == Ok(path) {
                $body
            } else {
                crate::support::in_isolation(path, $caps);
            }
        }
    )*};
}

#[path = "kernel/accounting.rs"]
mod accounting;
#[path = "kernel/bounds.rs"]
mod bounds;
#[path = "kernel/driver.rs"]
mod driver;
#[path = "kernel/networks.rs"]
mod networks;
#[path = "kernel/pins.rs"]
mod pins;
#[path = "support/skip.rs"]
mod skip;
#[path = "kernel/steering.rs"]
mod steering;
#[path = "kernel/support.rs"]
mod support;

use std::{
    io::{Read, Write},
    net::{IpAddr, TcpListener},
    os::fd::AsFd,
    time::{Duration, Instant},
};

use gateway::{config::schema, kernel::BlockError};
use support::{
    Group, HOLD, INNER, Lines, PATIENCE, connect, guarded, guarded_with, in_isolation, ip, load, net,
    place_everything, refused, until,
};

isolated! {
    a_blocked_client_is_refused_and_others_are_served("") {
        let (kernel, group) = guarded();
        kernel.block(net("127.0.0.7"), HOLD).expect("blocked");
        for _ in 0..3 {
            assert!(refused("127.0.0.7", group.port()));
        }
        group.core_of("127.0.0.8");
        let stats = kernel.stats();
        assert_eq!((stats.dropped, stats.would_drop, stats.steered, stats.fallback), (3, 0, 1, 0));
        assert_eq!((stats.stray, stats.unreadable), (0, 0));
        let blocked = kernel.blocked();
        assert_eq!(blocked.len(), 1);
        assert_eq!((blocked[0].net, blocked[0].dropped), (net("127.0.0.7"), 3));
        assert!(blocked[0].remaining <= HOLD && blocked[0].remaining > HOLD - PATIENCE);
    }

    an_open_connection_outlives_the_block("") {
        let (kernel, group) = guarded();
        let mut client = connect("127.0.0.7", group.port()).expect("a connection");
        let (_, mut server) = group.accept();
        kernel.block(net("127.0.0.7"), HOLD).expect("blocked");
        client.write_all(b"hello").expect("sent");
        let mut text = [0; 5];
        server.read_exact(&mut text).expect("received");
        assert_eq!(&text, b"hello");
        assert!(refused("127.0.0.7", group.port()));
    }

    a_block_ends_by_itself("") {
        let (kernel, group) = guarded();
        let hold = Duration::from_millis(300);
        let start = Instant::now();
        kernel.block(net("127.0.0.7"), hold).expect("blocked");
        until("the block ends", || !refused("127.0.0.7", group.port()));
        assert!(start.elapsed() >= hold, "ended after {:?}", start.elapsed());
        assert!(kernel.blocked().is_empty());
        assert!(kernel.stats().dropped > 0);
        assert!(!kernel.unblock(net("127.0.0.7")).expect("asked"), "over is not blocked");
    }

    a_block_ends_by_hand("") {
        let (kernel, group) = guarded();
        kernel.block(net("127.0.0.7"), HOLD).expect("blocked");
        assert!(refused("127.0.0.7", group.port()));
        assert!(kernel.unblock(net("127.0.0.7")).expect("unblocked"));
        group.core_of("127.0.0.7");
        assert!(!kernel.unblock(net("127.0.0.7")).expect("asked"));
    }

    blocking_again_changes_the_end_and_keeps_the_count("") {
        let (kernel, group) = guarded();
        kernel.block(net("127.0.0.7"), HOLD).expect("blocked");
        assert!(refused("127.0.0.7", group.port()));
        kernel.block(net("127.0.0.7"), HOLD * 2).expect("blocked");
        assert!(refused("127.0.0.7", group.port()));
        let blocked = kernel.blocked();
        assert_eq!(blocked[0].dropped, 2);
        assert!(blocked[0].remaining > HOLD);
    }

    observing_counts_and_lets_in("") {
        let (kernel, group) = guarded();
        kernel.block(net("127.0.0.7"), HOLD).expect("blocked");
        kernel.set_observe(true);
        group.core_of("127.0.0.7");
        assert_eq!((kernel.stats().dropped, kernel.stats().would_drop), (0, 1));
        assert_eq!(kernel.blocked()[0].would_drop, 1);
        kernel.set_observe(false);
        assert!(refused("127.0.0.7", group.port()));
        assert_eq!((kernel.stats().dropped, kernel.stats().would_drop), (1, 1));
    }

    the_mode_of_the_configuration_may_be_observe("") {
        let group = Group::new("127.0.0.1:0", 1);
        let config = schema::Kernel { mode: schema::KernelMode::Observe, ..schema::Kernel::default() };
        let mut kernel = load(&config, 1).expect("the programs");
        kernel.guard(&group.fds()).expect("guarded");
        kernel.block(net("127.0.0.7"), HOLD).expect("blocked");
        group.core_of("127.0.0.7");
        assert_eq!(kernel.stats().would_drop, 1);
    }

    ipv6_clients_are_blocked_by_their_64_and_ipv4_ones_on_a_dual_stack_listener("") {
        let group = Group::new("[::]:0", 2);
        let mut kernel = load(&schema::Kernel::default(), 2).expect("the programs");
        kernel.guard(&group.fds()).expect("guarded");
        kernel.block(kernel.net_of(ip("2001:db8:0:1::2")), HOLD).expect("blocked");
        assert!(refused("2001:db8:0:1::2", group.port()));
        assert!(refused("2001:db8:0:1::1", group.port()), "shares the /64");
        group.core_of("2001:db8:0:2::1");
        assert_eq!(kernel.blocked()[0].net, net("2001:db8:0:1::/64"));
        kernel.block(net("127.0.0.7"), HOLD).expect("blocked");
        assert!(refused("127.0.0.7", group.port()));
        group.core_of("127.0.0.8");
        assert_eq!((kernel.stats().dropped, kernel.stats().steered), (3, 2));
        assert_eq!(kernel.stats().unreadable, 0);
        until("both are counted", || kernel.stats().closed == 2);
        let clients: Vec<IpAddr> = kernel.clients(10).iter().map(|client| client.client).collect();
        assert!(clients.contains(&ip("2001:db8:0:2::")) && clients.contains(&ip("127.0.0.8")), "{clients:?}");
    }

    the_host_itself_and_exempt_networks_are_not_blocked("") {
        let group = Group::new("127.0.0.1:0", 1);
        let mut config = schema::Kernel::default();
        config.drop.exempt = vec!["127.0.1.0/24".parse().expect("a network")];
        let mut kernel = load(&config, 1).expect("the programs");
        kernel.guard(&group.fds()).expect("guarded");
        for client in ["127.0.0.1", "127.0.1.9"] {
            assert!(!kernel.may_block(ip(client)));
            let error = kernel.block(net(client), HOLD).expect_err("exempt");
            assert!(matches!(error, BlockError::Exempt(_)), "{error}");
            group.core_of(client);
        }
        kernel.block(net("127.0.0.7"), HOLD).expect("blocked");
        kernel.set_exempt(&["127.0.0.0/24".parse().expect("a network")]);
        group.core_of("127.0.0.7");
        assert!(kernel.blocked().is_empty());
    }

    two_groups_are_told_apart("") {
        let (mut kernel, first) = guarded();
        let second = Group::new("127.0.0.1:0", 2);
        kernel.guard(&second.fds()).expect("guarded");
        place_everything(&mut kernel, 1);
        assert_eq!(first.core_of("127.0.0.8"), 1);
        assert_eq!(second.core_of("127.0.0.8"), 1);
        assert_eq!((kernel.stats().steered, kernel.stats().fallback), (2, 0));
        kernel.block(net("127.0.0.7"), HOLD).expect("blocked");
        assert!(refused("127.0.0.7", first.port()) && refused("127.0.0.7", second.port()));
    }

    a_core_without_listener_is_replaced_by_the_hash("") {
        let (mut kernel, mut group) = guarded();
        place_everything(&mut kernel, 1);
        drop(group.0.remove(1));
        assert_eq!(group.core_of("127.0.0.8"), 0);
        assert_eq!((kernel.stats().steered, kernel.stats().fallback), (0, 1));
        kernel.guard(&group.fds()).expect("guarded again");
        place_everything(&mut kernel, 0);
        assert_eq!(group.core_of("127.0.0.8"), 0);
        assert_eq!((kernel.stats().steered, kernel.stats().fallback), (1, 1));
    }

    guarding_again_releasing_and_steering_off("") {
        let (mut kernel, group) = guarded();
        // More often than there are slots: each time the group keeps its own.
        for _ in 0..20 {
            kernel.guard(&group.fds()).expect("guarded again");
        }
        kernel.set_steering(false);
        group.core_of("127.0.0.8");
        assert_eq!((kernel.stats().steered, kernel.stats().fallback), (0, 1));
        kernel.block(net("127.0.0.7"), HOLD).expect("blocked");
        kernel.release(&group.fds()).expect("released");
        group.core_of("127.0.0.7");
        assert_eq!(kernel.stats().fallback, 1, "the program is off");
        for _ in 0..20 {
            let other = Group::new("127.0.0.1:0", 2);
            kernel.guard(&other.fds()).expect("guarded");
            kernel.release(&other.fds()).expect("released");
        }
    }

    sockets_without_a_group_are_refused_with_a_reason("") {
        let mut kernel = load(&schema::Kernel::default(), 1).expect("the programs");
        let plain = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let off = kernel.guard(&[plain.as_fd()]).expect_err("no SO_REUSEPORT");
        assert!(off.reason.contains("listeners"), "{off}");
        assert!(kernel.guard(&[]).is_err());
    }

    two_gateways_share_a_cgroup("") {
        let of = |name: &str| schema::Kernel { instance: Some(name.into()), ..schema::Kernel::default() };
        let (first, first_group) = guarded_with(&of("first"));
        let (second, second_group) = guarded_with(&of("second"));
        second.block(net("127.0.0.7"), HOLD).expect("blocked");
        assert!(refused("127.0.0.7", second_group.port()));
        assert!(first.blocked().is_empty());
        first_group.core_of("127.0.0.8");
        second_group.core_of("127.0.0.8");
        second_group.core_of("127.0.0.8");
        until("all have ended", || first.stats().closed == 1 && second.stats().closed == 2);
        drop(first);
        second_group.core_of("127.0.0.8");
        until("the other goes on", || second.stats().closed == 3);
    }

    nothing_is_dropped_after_the_end("") {
        let (kernel, group) = guarded();
        kernel.block(net("127.0.0.7"), HOLD).expect("blocked");
        assert!(refused("127.0.0.7", group.port()));
        drop(kernel);
        group.core_of("127.0.0.7");
    }

    a_drop_is_logged_once_for_many("") {
        let lines = Lines::default();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(lines.clone()).finish();
        tracing::subscriber::with_default(subscriber, || {
            let (kernel, group) = guarded();
            kernel.block(net("127.0.0.7"), HOLD).expect("blocked");
            for _ in 0..50 {
                assert!(refused("127.0.0.7", group.port()));
            }
            until("a line", || {
                kernel.tick();
                !lines.text().is_empty()
            });
            let text = lines.text();
            assert!(text.contains("refused connections of blocked client 127.0.0.7: 1 "), "{text}");
            assert!(text.contains("gateway::kernel"), "{text}");
            // Sampled by powers of two: 1, 2, 4, 8, 16, 32 at most.
            assert!(text.lines().count() <= 6, "{text}");
        });
    }

    the_capabilities_of_the_unit_suffice("-all,+bpf,+perfmon,+net_admin") {
        let (kernel, group) = guarded();
        kernel.block(net("127.0.0.7"), HOLD).expect("blocked");
        assert!(refused("127.0.0.7", group.port()));
        group.core_of("127.0.0.8");
        until("it is counted", || kernel.stats().closed == 1);
    }

    without_net_admin_only_accounting_is_off("-all,+bpf,+perfmon") {
        let group = Group::new("127.0.0.1:0", 2);
        let mut kernel = load(&schema::Kernel::default(), 2).expect("the programs");
        kernel.guard(&group.fds()).expect("guarded");
        let degraded = kernel.degraded();
        assert_eq!(degraded.len(), 1);
        assert!(degraded[0].starts_with("connection accounting is off: CAP_NET_ADMIN is missing"), "{degraded:?}");
        kernel.block(net("127.0.0.7"), HOLD).expect("blocked");
        assert!(refused("127.0.0.7", group.port()));
        group.core_of("127.0.0.8");
        assert_eq!(kernel.stats().opened, 0);
    }

    without_rights_the_reason_says_so("-all") {
        let off = load(&schema::Kernel::default(), 1).expect_err("no rights");
        assert!(off.reason.starts_with("CAP_BPF is missing"), "{off}");
    }

    a_cgroup_that_is_none_degrades_with_a_reason("") {
        for directory in ["/nonexistent", "/tmp"] {
            let config = schema::Kernel { cgroup: Some(directory.into()), ..schema::Kernel::default() };
            let kernel = load(&config, 1).expect("the programs");
            let degraded = kernel.degraded();
            assert_eq!(degraded.len(), 1);
            assert!(degraded[0].contains(directory), "{degraded:?}");
        }
    }
}

#[test]
fn switched_off_is_off_whatever_the_rights() {
    let config = schema::Kernel {
        mode: schema::KernelMode::Off,
        ..schema::Kernel::default()
    };
    let off = load(&config, 1).expect_err("off");
    assert_eq!(off.reason, "switched off by kernel.mode");
}

/// Load for `perf/bpf-stats.sh`: refused attempts, then served connections.
#[test]
#[ignore = "a measurement, not a test"]
fn flood() {
    if std::env::var(INNER).as_deref() != Ok("flood") {
        return in_isolation("flood", "");
    }
    let (kernel, group) = guarded();
    kernel.block(net("127.0.0.7"), HOLD).expect("blocked");
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(2) {
        assert!(refused("127.0.0.7", group.port()));
    }
    while start.elapsed() < Duration::from_secs(4) {
        group.core_of("127.0.0.8");
    }
}
