//! Rates and caps of connections.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use gateway::config::schema::{Connections, Kernel as Config, KernelMode};
use gateway_common::HALF_OPEN_NS;
use socket2::{Domain, Protocol, Socket, Type};

use crate::support::{Group, connect, guarded_with, load, net, refused, until};

fn with(connections: Connections) -> Config {
    Config {
        connections,
        ..Config::default()
    }
}

fn none() -> Connections {
    Connections {
        half_open: 0,
        ..Connections::default()
    }
}

isolated! {
    a_client_may_open_so_many_a_second("") {
        let (kernel, group) = guarded_with(&with(Connections { per_client_rate: Some(1), burst: Some(3), ..none() }));
        let start = Instant::now();
        let accepted = (0..20).filter(|_| !refused("127.0.0.7", group.port())).count();
        let most = 3 + start.elapsed().as_secs() as usize + 1;
        assert!((3..=most).contains(&accepted), "{accepted} of at most {most}");
        assert_eq!(kernel.stats().over_rate, 20 - accepted as u64);
        group.core_of("127.0.0.8");
        until("the bucket fills again", || !refused("127.0.0.7", group.port()));
        let client = kernel.clients(10).into_iter().find(|client| client.client == crate::support::ip("127.0.0.7"));
        assert!(client.expect("counted").refused > 0);
        assert!(kernel.ports()[0].refused > 0);
    }

    a_new_rate_holds_after_a_reload("") {
        let (kernel, group) = guarded_with(&with(none()));
        assert!((0..20).all(|_| !refused("127.0.0.7", group.port())));
        kernel.set_connections(&Connections { per_client_rate: Some(1), burst: Some(1), ..none() });
        assert!((0..5).any(|_| refused("127.0.0.7", group.port())));
    }

    exempt_clients_are_not_bound_and_observing_only_counts("") {
        let bounds = Connections { per_client_rate: Some(1), burst: Some(1), per_client_open: Some(1), ..none() };
        let mut config = with(bounds);
        config.drop.exempt = vec![net("127.5.0.0/16")];
        let (kernel, group) = guarded_with(&config);
        assert!((0..10).all(|_| !refused("127.5.0.7", group.port())));
        assert_eq!(kernel.stats().over_rate, 0);
        kernel.set_observe(true);
        assert!((0..10).all(|_| !refused("127.0.0.7", group.port())));
        let stats = kernel.stats();
        assert!(stats.would_drop > 0 && stats.over_rate == 0, "{stats:?}");
        assert_eq!(config.mode, KernelMode::Auto);
    }

    a_client_may_have_so_many_open("") {
        let group = Group::new("[::]:0", 2);
        let mut kernel = load(&with(Connections { per_client_open: Some(3), ..none() }), 2).expect("the programs");
        kernel.guard(&group.fds()).expect("guarded");
        for client in ["127.0.0.7", "2001:db8:0:1::2"] {
            let before = kernel.stats();
            let mut open: Vec<(TcpStream, (usize, TcpStream))> = (0..3)
                .map(|_| (connect(client, group.port()).expect("a connection"), group.accept()))
                .collect();
            assert!(refused(client, group.port()), "{client}");
            assert_eq!(kernel.stats().over_open, before.over_open + 1);
            drop(open.pop());
            until("there is room again", || kernel.stats().closed > before.closed);
            open.push((connect(client, group.port()).expect("a connection"), group.accept()));
            let same = if client.contains(':') { "2001:db8:0:1::1" } else { client };
            assert!(refused(same, group.port()), "a /64 is one client");
        }
        group.core_of("127.0.0.8");
    }

    a_flood_of_new_addresses_does_not_keep_known_clients_out("") {
        let (kernel, group) = guarded_with(&with(Connections { half_open: 5, ..none() }));
        group.core_of("127.0.0.8");
        let start = Instant::now();
        for number in 0..200 {
            send_syn([198, 51, 100, number], group.port());
        }
        let sent = start.elapsed();
        until("all were judged", || kernel.stats().steered + kernel.stats().over_half_open == 201);
        let admitted = 200 - kernel.stats().over_half_open;
        let most = 5 + 1 + sent.as_nanos() as u64 * 5 / HALF_OPEN_NS;
        assert!((5..=most).contains(&admitted), "{admitted} of at most {most}");
        group.core_of("127.0.0.8");
        // A new one is refused like the flood, until that is forgotten.
        assert!(sent > Duration::from_millis(700) || refused("127.0.0.9", group.port()));
        until("the flood is forgotten", || !refused("127.0.0.9", group.port()));
    }

    new_clients_that_finish_their_handshake_take_no_room("") {
        let (kernel, group) = guarded_with(&with(Connections { half_open: 5, ..none() }));
        for number in 1..=100 {
            group.core_of(&format!("127.0.9.{number}"));
        }
        assert_eq!(kernel.stats().over_half_open, 0);
    }
}

/// Sends a SYN from an address that is nobody's, so that no handshake follows.
fn send_syn(source: [u8; 4], port: u16) {
    let socket =
        Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW))).expect("a raw socket");
    let target = Ipv4Addr::LOCALHOST;
    let mut segment = vec![
        0x9c, 0x40, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0,
    ];
    segment[2..4].copy_from_slice(&port.to_be_bytes());
    let mut pseudo = [source, target.octets()].concat();
    pseudo.extend([0, 6, 0, segment.len() as u8]);
    pseudo.extend(&segment);
    let sum = checksum(&pseudo);
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0];
    packet.extend(source);
    packet.extend(target.octets());
    packet.extend(segment);
    let to = SocketAddr::new(target.into(), 0).into();
    socket.send_to(&packet, &to).expect("sent");
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}
