//! Blocks of networks, prefixes, exemptions, and what happens when maps are full.

use std::{io::ErrorKind, time::Duration};

use gateway::{config::schema, kernel::BlockError};
use gateway_common::{BLOCKS_MAX, NETS_MAX};
use ipnet::IpNet;

use crate::support::{Group, HOLD, Peer, guarded, guarded_with, ip, load, load_on, net, refused, until};

isolated! {
    a_network_is_blocked_but_its_exempt_hosts("") {
        let mut config = schema::Kernel::default();
        config.drop.exempt = vec![net("127.5.0.9")];
        let (kernel, group) = guarded_with(&config);
        kernel.block(net("127.5.0.0/16"), HOLD).expect("blocked");
        assert!(refused("127.5.0.7", group.port()) && refused("127.5.255.7", group.port()));
        group.core_of("127.6.0.7");
        group.core_of("127.5.0.9");
        let blocked = kernel.blocked();
        assert_eq!((blocked.len(), blocked[0].net, blocked[0].dropped), (1, net("127.5.0.0/16"), 2));
        assert!(!kernel.unblock(net("127.5.0.7")).expect("asked"), "only exactly the network is unblocked");
        assert!(kernel.unblock(net("127.5.0.0/16")).expect("unblocked"));
        group.core_of("127.5.0.7");
    }

    the_host_itself_passes_a_block_of_its_network("") {
        let (kernel, group) = guarded();
        kernel.block(net("127.0.0.0/8"), HOLD).expect("blocked");
        group.core_of("127.0.0.1");
        assert!(refused("127.0.0.2", group.port()));
    }

    a_wider_block_holds_when_a_narrower_has_ended("") {
        let (kernel, group) = guarded();
        kernel.block(net("127.5.0.0/16"), HOLD).expect("blocked");
        kernel.block(net("127.5.5.0/24"), Duration::from_millis(100)).expect("blocked");
        assert!(refused("127.5.5.7", group.port()));
        until("the narrower has ended", || {
            kernel.tick();
            kernel.blocked().len() == 1
        });
        assert!(refused("127.5.5.7", group.port()));
        let blocked = kernel.blocked();
        assert_eq!(blocked[0].net, net("127.5.0.0/16"));
        assert!(kernel.unblock(net("127.5.0.0/16")).expect("unblocked"));
        group.core_of("127.5.5.7");
    }

    what_must_not_be_blocked_is_refused_with_a_reason("") {
        let (kernel, _group) = guarded();
        for wrong in ["0.0.0.0/0", "::/0", "127.0.0.1", "::1", "224.0.0.0/8"] {
            let error = kernel.block(net(wrong), HOLD).expect_err(wrong);
            assert!(matches!(error, BlockError::Exempt(_)), "{wrong}: {error}");
        }
    }

    clients_are_as_wide_as_configured("") {
        let mut config = schema::Kernel::default();
        config.drop.prefix_v4 = 24;
        config.drop.prefix_v6 = 48;
        let group = Group::new("[::]:0", 2);
        let mut kernel = load(&config, 2).expect("the programs");
        kernel.guard(&group.fds()).expect("guarded");
        kernel.block_client(ip("127.5.5.7"), HOLD).expect("blocked");
        kernel.block_client(ip("2001:db8:0:1::2"), HOLD).expect("blocked");
        assert!(refused("127.5.5.8", group.port()));
        group.core_of("127.5.6.8");
        assert!(refused("2001:db8:0:2::1", group.port()), "shares the /48");
        let nets: Vec<IpNet> = kernel.blocked().iter().map(|blocked| blocked.net).collect();
        assert!(nets.contains(&net("127.5.5.0/24")) && nets.contains(&net("2001:db8::/48")), "{nets:?}");
        until("it is counted", || kernel.stats().closed == 1);
        assert_eq!(kernel.clients(1)[0].client, ip("127.5.6.0"));
    }

    a_network_more_than_the_bound_is_refused("") {
        let (kernel, group) = guarded();
        for number in 0..NETS_MAX {
            let [_, _, high, low] = number.to_be_bytes();
            kernel.block(net(&format!("10.{high}.{low}.0/28")), HOLD).expect("blocked");
        }
        let error = kernel.block(net("127.5.0.0/16"), HOLD).expect_err("full");
        assert!(matches!(error, BlockError::Full), "{error}");
        assert!(error.to_string().contains("4096"), "{error}");
        kernel.block(net("127.0.0.7"), HOLD).expect("single clients have their own room");
        kernel.block(net("10.0.1.0/28"), HOLD).expect("what is there can be prolonged");
        assert!(kernel.unblock(net("10.0.1.0/28")).expect("unblocked"));
        kernel.block(net("127.5.0.0/16"), HOLD).expect("there is room again");
        assert!(refused("127.5.0.7", group.port()) && refused("127.0.0.7", group.port()));
    }

    the_client_that_goes_on_knocking_stays_blocked_when_the_map_is_full("") {
        let (kernel, group) = guarded();
        kernel.block(net("127.0.0.7"), HOLD).expect("blocked");
        for number in 0..BLOCKS_MAX + BLOCKS_MAX / 4 {
            let [_, high, middle, low] = number.to_be_bytes();
            kernel.block(net(&format!("10.{high}.{middle}.{low}")), HOLD).expect("blocked");
            if number % 500 == 0 {
                assert!(refused("127.0.0.7", group.port()), "evicted after {number}");
            }
        }
        assert!(refused("127.0.0.7", group.port()));
        let blocked = kernel.blocked();
        assert!(blocked.len() <= BLOCKS_MAX as usize && blocked.len() > BLOCKS_MAX as usize * 9 / 10, "{}", blocked.len());
        assert_eq!(blocked[0].net, net("127.0.0.7"), "the one with the most refusals is first");
        let first = blocked.iter().any(|entry| entry.net == net("10.0.0.1"));
        assert!(!first, "the oldest that never came again is gone");
    }

    clients_on_a_wire_are_judged_one_by_one("") {
        let peer = Peer::new();
        let listener = peer.listener();
        let kernel = load_on(&listener);
        kernel.block_client(ip("10.77.0.2"), HOLD).expect("blocked");
        kernel.block_client(ip("2001:db8:77:2::2"), HOLD).expect("blocked");
        for (client, blocked) in [
            ("10.77.0.2", true),
            ("10.77.0.3", false),
            ("2001:db8:77:2::2", true),
            ("2001:db8:77:2::3", true),
            ("2001:db8:77:3::2", false),
        ] {
            let outcome = peer.connect(client, &listener);
            assert_eq!(outcome.is_err(), blocked, "{client}: {outcome:?}");
            if let Err(error) = outcome {
                // The reset to a neighbour that is not known yet may come late.
                let kind = error.kind();
                assert!(matches!(kind, ErrorKind::ConnectionRefused | ErrorKind::TimedOut), "{client}: {kind}");
            }
        }
        // A SYN may be sent again before the reset is there.
        assert!(kernel.stats().dropped >= 3);
    }
}
