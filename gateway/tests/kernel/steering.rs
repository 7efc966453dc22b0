//! Which core a connection goes to.

use std::net::TcpStream;

use gateway_common::{LOAD_SLACK, overloaded};

use crate::support::{Group, connect, guarded, load, place_everything};

/// Simulated cores: more than CPUs, as where a gateway may run on a part of them.
const CORES: usize = 4;

/// Long streams of one round.
const STREAMS: usize = 400;

/// Streams between two ticks of the control thread.
const PER_TICK: usize = 10;

isolated! {
    every_packet_of_a_cpu_goes_to_its_core("") {
        let (mut kernel, group) = guarded();
        for core in [0, 1, 0] {
            place_everything(&mut kernel, core);
            // Fewer than a core may have more than the other.
            for _ in 0..LOAD_SLACK / 2 {
                assert_eq!(group.core_of("127.0.0.8"), core);
            }
        }
        let stats = kernel.stats();
        assert_eq!((stats.steered, stats.steered_away, stats.fallback), (3 * LOAD_SLACK / 2, 0, 0));
    }

    an_overloaded_core_gives_away_just_enough("") {
        let (mut kernel, group) = guarded();
        place_everything(&mut kernel, 0);
        let own = LOAD_SLACK + 68;
        kernel.publish_loads([(0, own as u32)]);
        kernel.publish_loads([(1, 0)]);
        let moved = (0..).find(|least| !overloaded(own, *least)).expect("an end");
        assert!(moved > 20);
        for _ in 0..moved {
            assert_eq!(group.core_of("127.0.0.8"), 1);
        }
        assert_eq!(group.core_of("127.0.0.8"), 0, "what was steered counts at once");
        assert_eq!(kernel.stats().steered_away, moved);
        kernel.publish_loads([(0, own as u32), (1, own as u32)]);
        assert_eq!(group.core_of("127.0.0.8"), 0);
    }

    long_streams_are_balanced_where_the_hash_is_not("") {
        // By chance the hash may be even once; eight times it is not.
        let steered = (0..4).map(|_| imbalance(true)).fold(0.0, f64::max);
        let hashed = (0..8).map(|_| imbalance(false)).fold(0.0, f64::max);
        println!("furthest from the mean: steered {:.1} %, hashed {:.1} %", steered * 100.0, hashed * 100.0);
        assert!(steered <= 0.10, "steered streams are {:.0} % off", steered * 100.0);
        assert!(hashed > 0.10, "hashed streams are {:.0} % off", hashed * 100.0);
    }
}

/// How far the busiest or idlest core is from the mean when all streams are open, as a share of the mean.
fn imbalance(steering: bool) -> f64 {
    let group = Group::new("127.0.0.1:0", CORES);
    let mut kernel = load(&gateway::config::schema::Kernel::default(), CORES).expect("the programs");
    kernel.guard(&group.fds()).expect("guarded");
    kernel.set_steering(steering);
    let mut open = [0; CORES];
    let mut streams: Vec<(TcpStream, TcpStream)> = Vec::new();
    for stream in 0..STREAMS {
        let client = format!("127.0.{}.{}", 1 + stream / 200, 1 + stream % 200);
        let client = connect(&client, group.port()).expect("a connection");
        let (core, server) = group.accept();
        open[core] += 1;
        streams.push((client, server));
        if stream % PER_TICK == 0 {
            kernel.publish_loads(open.iter().copied().enumerate());
        }
    }
    let mean = STREAMS as f64 / CORES as f64;
    open.iter()
        .map(|streams| (f64::from(*streams) - mean).abs() / mean)
        .fold(0.0, f64::max)
}
