//! The XDP stage: which frames it drops.

use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use gateway::{
    config::schema::{self, Xdp, XdpMode},
    kernel::Kernel,
};
use ipnet::IpNet;
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};

use crate::support::{HOLD, INNER, Peer, in_isolation, load_ports, load_with, net};

const PORT: u16 = 8080;
const BLOCKED: &str = "192.0.2.7";
const BLOCKED_V6: &str = "2001:db8:1::7";

/// Prints what a frame costs by BPF_PROG_TEST_RUN, a million times each; needs bpftool.
#[test]
#[ignore = "a measurement, not a test"]
fn frames() {
    if std::env::var(INNER).as_deref() != Ok("driver::frames") {
        return in_isolation("driver::frames", "");
    }
    let kernel = on_loopback(schema::KernelMode::Auto);
    let ack = Frame {
        flags: 0x10,
        ..Frame::new("192.0.2.8")
    };
    for (what, frame) in [
        ("a blocked client's SYN", Frame::new(BLOCKED)),
        ("a blocked IPv6 client's SYN", Frame::new(BLOCKED_V6)),
        ("another client's SYN", Frame::new("192.0.2.8")),
        ("an open connection's segment", ack),
    ] {
        println!("{what}: {}", run_a_million_times(&frame.build()));
    }
    for blocked in kernel.blocked() {
        kernel.unblock(blocked.net).expect("unblocked");
    }
    drop(kernel);
    let _kernel = load_ports(&xdp("lo", XdpMode::Generic), &[PORT]).expect("the programs");
    println!(
        "nobody blocked: {}",
        run_a_million_times(&Frame::new(BLOCKED).build())
    );
}

/// Of the program that was loaded last.
fn run_a_million_times(frame: &[u8]) -> String {
    let input = std::env::temp_dir().join(format!("gateway-frame-{}", std::process::id()));
    std::fs::write(&input, frame).expect("a file");
    let run = "id=$(bpftool prog show name driver | awk '/^[0-9]+: xdp/ { last = $1 } END { sub(\":\", \"\", last); print last }'); \
               bpftool prog run id $id data_in \"$0\" repeat 1000000";
    let output = std::process::Command::new("sh")
        .args(["-c", run])
        .arg(&input)
        .output()
        .expect("sh");
    let _ = std::fs::remove_file(&input);
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat())
        .trim()
        .to_owned()
}

isolated! {
    only_syns_of_blocked_clients_to_the_ports_are_dropped("") {
        let kernel = on_loopback(schema::KernelMode::Auto);
        let syn = Frame::new(BLOCKED).build();
        assert!(drops(&kernel, &syn));
        assert!(drops(&kernel, &Frame::new(BLOCKED_V6).build()));
        assert!(drops(&kernel, &Frame::new("198.51.100.200").build()), "in a blocked network");
        for (what, frame) in [
            ("another client", Frame::new("192.0.2.8")),
            ("another IPv6 client", Frame::new("2001:db8:2::7")),
            ("an exempt host in a blocked network", Frame::new("198.51.100.9")),
            ("another port", Frame { port: PORT + 1, ..Frame::new(BLOCKED) }),
            ("an ACK", Frame { flags: 0x10, ..Frame::new(BLOCKED) }),
            ("a SYN-ACK", Frame { flags: 0x12, ..Frame::new(BLOCKED) }),
            ("UDP", Frame { protocol: 17, ..Frame::new(BLOCKED) }),
            ("UDP over IPv6", Frame { protocol: 17, ..Frame::new(BLOCKED_V6) }),
        ] {
            assert!(!drops(&kernel, &frame.build()), "{what}");
        }
        let stats = kernel.stats();
        assert_eq!((stats.xdp_dropped, stats.xdp_would_drop), (3, 0));
        let dropped: u64 = kernel.blocked().iter().map(|blocked| blocked.dropped).sum();
        assert_eq!(dropped, 3);
        assert_eq!(kernel.ports()[0].refused, 3);
    }

    the_capabilities_of_the_unit_suffice_for_xdp("-all,+bpf,+perfmon,+net_admin") {
        let kernel = on_loopback(schema::KernelMode::Auto);
        assert!(drops(&kernel, &Frame::new(BLOCKED).build()));
    }

    observing_lets_frames_through("") {
        let kernel = on_loopback(schema::KernelMode::Observe);
        assert!(!drops(&kernel, &Frame::new(BLOCKED).build()));
        assert_eq!((kernel.stats().xdp_dropped, kernel.stats().xdp_would_drop), (0, 1));
    }

    tags_fragments_and_headers_are_looked_through("") {
        let kernel = on_loopback(schema::KernelMode::Auto);
        let v4 = || Frame::new(BLOCKED);
        let v6 = || Frame::new(BLOCKED_V6);
        for (what, frame, dropped) in [
            ("one tag", Frame { tags: vec![0x8100], ..v4() }, true),
            ("two tags", Frame { tags: vec![0x88a8, 0x8100], ..v6() }, true),
            ("three tags", Frame { tags: vec![0x88a8, 0x8100, 0x8100], ..v4() }, false),
            ("another EtherType", Frame { tags: vec![0x9999], ..v4() }, false),
            ("options", Frame { words: 15, ..v4() }, true),
            ("a header too short to be one", Frame { words: 4, ..v4() }, false),
            ("a first fragment", Frame { fragment: 0x2000, ..v4() }, true),
            ("a later fragment", Frame { fragment: 0x2001, ..v4() }, false),
            ("a wrong version", Frame { version: 5, ..v4() }, false),
            ("a wrong version 6", Frame { version: 4, ..v6() }, false),
            ("hop by hop, options, routing", Frame { extensions: vec![(0, 0), (60, 2), (43, 1)], ..v6() }, true),
            ("a first fragment of IPv6", Frame { extensions: vec![(44, 0)], ..v6() }, true),
            ("a later fragment of IPv6", Frame { extensions: vec![(44, 0)], fragment: 8, ..v6() }, false),
            ("more headers than make sense", Frame { extensions: vec![(60, 0); 6], ..v6() }, false),
            ("an unknown header", Frame { extensions: vec![(253, 0)], ..v6() }, false),
            ("a header longer than the frame", Frame { extensions: vec![(0, 0)], lie: Some(200), ..v6() }, false),
        ] {
            assert_eq!(drops(&kernel, &frame.build()), dropped, "{what}");
        }
    }

    frames_cut_anywhere_and_garbage_pass("") {
        let kernel = on_loopback(schema::KernelMode::Auto);
        for whole in [
            Frame::new(BLOCKED).build(),
            Frame { tags: vec![0x8100], words: 8, ..Frame::new(BLOCKED) }.build(),
            Frame { extensions: vec![(0, 1), (44, 0)], ..Frame::new(BLOCKED_V6) }.build(),
        ] {
            // 14 bytes of the TCP header are needed; the kernel itself refuses to run less than an Ethernet header.
            let needed = whole.len() - 6;
            for length in 14..needed {
                assert!(!drops(&kernel, &whole[..length]), "{length} of {}", whole.len());
            }
            assert!(drops(&kernel, &whole[..needed]));
        }
        let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(512) });
        let garbage = proptest::collection::vec(any::<u8>(), 14..200);
        runner.run(&garbage, |frame| {
            prop_assert!(!drops(&kernel, &frame));
            Ok(())
        }).expect("garbage passes");
    }

    both_sides_agree_on_which_network_an_address_is_in("") {
        let kernel = load_ports(&xdp("lo", XdpMode::Generic), &[PORT]).expect("the programs");
        let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(256) });
        let v4 = (any::<u32>(), 8..=32_u8, any::<u32>(), 0..=32_u32).prop_map(|(base, bits, other, keep)| {
            // An address that shares some of the network's bits, so that about half are in it.
            let mask = u32::MAX.checked_shl(32 - keep).unwrap_or(0);
            let address = (base & mask) | (other & !mask);
            let net = ipnet::Ipv4Net::new(Ipv4Addr::from(base), bits).expect("a network").trunc();
            (IpNet::V4(net), IpAddr::V4(Ipv4Addr::from(address)))
        });
        let v6 = (any::<u128>(), 16..=128_u8, any::<u128>(), 0..=128_u32).prop_map(|(base, bits, other, keep)| {
            let mask = u128::MAX.checked_shl(128 - keep).unwrap_or(0);
            let address = (base & mask) | (other & !mask);
            let net = ipnet::Ipv6Net::new(Ipv6Addr::from(base), bits).expect("a network").trunc();
            (IpNet::V6(net), IpAddr::V6(Ipv6Addr::from(address)))
        });
        runner.run(&prop_oneof![v4, v6], |(net, client)| {
            if kernel.block(net, HOLD).is_ok() {
                // A single client is all of its prefix.
                let held = kernel.blocked()[0].net;
                prop_assert_eq!(held, net);
                prop_assert_eq!(drops(&kernel, &Frame::new(&client.to_string()).build()), net.contains(&client), "{} {}", net, client);
                kernel.unblock(net).expect("unblocked");
            }
            prop_assert!(!drops(&kernel, &Frame::new(&client.to_string()).build()));
            Ok(())
        }).expect("both sides agree");
    }

    blocked_clients_on_a_wire_get_no_answer_native("") {
        on_a_wire(XdpMode::Auto, "native");
    }

    blocked_clients_on_a_wire_get_no_answer_generic("") {
        on_a_wire(XdpMode::Generic, "generic");
    }

    frames_for_other_hosts_pass_a_router("") {
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("forwarding");
        let _peer = Peer::new();
        let kernel = load_ports(&xdp("lo", XdpMode::Generic), &[PORT]).expect("the programs");
        kernel.block(net("10.77.0.0/24"), HOLD).expect("blocked");
        let to = |target: &str| Frame { target: Some(target.parse().expect("an address")), ..Frame::new("10.77.0.2") };
        assert!(drops(&kernel, &to("10.77.0.1").build()), "this host");
        assert!(!drops(&kernel, &to("10.77.0.9").build()), "another host behind this one");
    }

    an_interface_that_is_not_there_degrades("") {
        let config = xdp("nosuch0", XdpMode::Auto);
        let kernel = load_ports(&config, &[PORT]).expect("the programs");
        let degraded = kernel.degraded();
        assert!(degraded.len() == 1 && degraded[0].contains("nosuch0"), "{degraded:?}");
        assert!(kernel.xdp().is_none());
    }
}

fn xdp(interface: &str, mode: XdpMode) -> schema::Kernel {
    let xdp = Some(Xdp {
        interface: interface.into(),
        mode,
    });
    schema::Kernel {
        xdp,
        ..schema::Kernel::default()
    }
}

/// With two clients and a network blocked, one host of which is exempt.
fn on_loopback(mode: schema::KernelMode) -> Kernel {
    let mut config = xdp("lo", XdpMode::Generic);
    config.mode = mode;
    config.drop.exempt = vec![net("198.51.100.9")];
    let kernel = load_ports(&config, &[PORT]).expect("the programs");
    assert_eq!(kernel.degraded(), Vec::<String>::new());
    for blocked in [BLOCKED, "2001:db8:1::/64", "198.51.100.0/24"] {
        kernel.block(net(blocked), HOLD).expect("blocked");
    }
    kernel
}

fn drops(kernel: &Kernel, frame: &[u8]) -> bool {
    kernel.would_driver_drop(frame).expect("a verdict")
}

fn on_a_wire(mode: XdpMode, shown: &str) {
    let peer = Peer::new();
    let listener = peer.listener();
    let kernel = load_with(&xdp("veth0", mode), &listener);
    assert_eq!(kernel.degraded(), Vec::<String>::new());
    assert_eq!(kernel.xdp(), Some(("veth0", shown)));
    for (blocked, other) in [
        ("10.77.0.2", "10.77.0.3"),
        ("2001:db8:77:2::2", "2001:db8:77:3::2"),
    ] {
        let kept = peer.connect(blocked, &listener).expect("a connection");
        let client = kernel.net_of(blocked.parse().expect("an address"));
        kernel.block(client, HOLD).expect("blocked");
        let error = peer.connect(blocked, &listener).expect_err("dropped");
        assert!(
            matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock),
            "no reset comes: {error}"
        );
        peer.connect(other, &listener).expect("another client is served");
        kernel.unblock(client).expect("unblocked");
        peer.connect(blocked, &listener).expect("served again");
        drop(kept);
    }
    let stats = kernel.stats();
    assert!(stats.xdp_dropped >= 2 && stats.dropped == 0, "{stats:?}");
    let listed = || {
        let output = std::process::Command::new("ip")
            .args(["link", "show", "veth0"])
            .output()
            .expect("ip");
        String::from_utf8_lossy(&output.stdout).contains("xdp")
    };
    assert!(listed());
    drop(kernel);
    assert!(!listed(), "it is detached at the end");
}

/// An Ethernet frame with the start of a TCP segment in it.
struct Frame {
    tags: Vec<u16>,
    source: IpAddr,
    target: Option<IpAddr>,
    version: u8,
    words: u8,
    fragment: u16,
    protocol: u8,
    /// IPv6 extension headers: kind, and length in units of 8 bytes less one.
    extensions: Vec<(u8, u8)>,
    /// What the first extension says of its length instead.
    lie: Option<u8>,
    port: u16,
    flags: u8,
}

impl Frame {
    fn new(source: &str) -> Frame {
        let source: IpAddr = source.parse().expect("an address");
        Frame {
            tags: Vec::new(),
            source,
            target: None,
            version: if source.is_ipv4() { 4 } else { 6 },
            words: 5,
            fragment: 0,
            protocol: 6,
            extensions: Vec::new(),
            lie: None,
            port: PORT,
            flags: 0x02,
        }
    }

    fn build(&self) -> Vec<u8> {
        let mut frame = vec![0; 12];
        for tag in &self.tags {
            frame.extend(tag.to_be_bytes());
            frame.extend([0, 7]);
        }
        match self.source {
            IpAddr::V4(source) => {
                frame.extend(0x0800_u16.to_be_bytes());
                let mut head = vec![0; usize::from(self.words.max(5)) * 4];
                head[0] = self.version << 4 | self.words;
                head[6..8].copy_from_slice(&self.fragment.to_be_bytes());
                head[9] = self.protocol;
                head[12..16].copy_from_slice(&source.octets());
                if let Some(IpAddr::V4(target)) = self.target {
                    head[16..20].copy_from_slice(&target.octets());
                }
                frame.extend(head);
            }
            IpAddr::V6(source) => {
                frame.extend(0x86dd_u16.to_be_bytes());
                let mut head = vec![0; 40];
                head[0] = self.version << 4;
                head[6] = self.extensions.first().map_or(self.protocol, |(kind, _)| *kind);
                head[8..24].copy_from_slice(&source.octets());
                frame.extend(head);
                self.extend(&mut frame);
            }
        }
        let mut tcp = [0; 20];
        tcp[2..4].copy_from_slice(&self.port.to_be_bytes());
        tcp[12] = 0x50;
        tcp[13] = self.flags;
        frame.extend(tcp);
        frame
    }

    fn extend(&self, frame: &mut Vec<u8>) {
        for (place, (kind, length)) in self.extensions.iter().enumerate() {
            let next = self
                .extensions
                .get(place + 1)
                .map_or(self.protocol, |(kind, _)| *kind);
            let mut extension = vec![0; 8 * (usize::from(*length) + 1)];
            extension[0] = next;
            extension[1] = if place == 0 {
                self.lie.unwrap_or(*length)
            } else {
                *length
            };
            if *kind == 44 {
                extension[2..4].copy_from_slice(&self.fragment.to_be_bytes());
            }
            frame.extend(extension);
        }
    }
}
