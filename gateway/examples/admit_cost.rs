//! What it costs to admit a request and to settle it, by the number of policies that bind it and of keys that ask:
//! `cargo run --release -p gateway --example admit_cost -- [POLICIES] [KEYS] [ROUNDS]`.
//!
//! Without arguments all of 1, 10 and 100 policies and 10, 10,000 and 1,000,000 keys. Times are CPU time of the thread.
//! With arguments one pair, for `valgrind --tool=callgrind`: subtract a run with fewer rounds.

use std::{net::IpAddr, path::Path, sync::Arc, time::Duration};

use gateway::{
    config,
    net::words::Words,
    quota::{
        Amounts, Facts, Ids, Policies, Quota,
        levels::Shelf,
        reservation::{Ask, admit},
        state,
    },
};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<usize> = std::env::args()
        .skip(1)
        .map(|text| text.parse())
        .collect::<Result<_, _>>()?;
    if let [policies, keys, rest @ ..] = &arguments[..] {
        return measure(*policies, *keys, rest.first().copied().unwrap_or(1_000_000));
    }
    println!("policies      keys   ns a request   levels in use   table bytes a level");
    for policies in [1, 10, 100] {
        for keys in [10, 10_000, 1_000_000] {
            measure(policies, keys, 2_000_000 / policies.max(4))?;
        }
    }
    Ok(())
}

fn measure(policies: usize, keys: usize, rounds: usize) -> anyhow::Result<()> {
    // A tenth of the policies count each key apart, at least one; the others are the keys' common ones.
    let own = policies.div_ceil(10);
    let kinds = [
        "tokens: 100000000000",
        "requests: 100000000000",
        "output_tokens: 100000000000",
    ];
    let windows = ["bucket", "sliding", "calendar"];
    let mut text = String::from("listeners: [{ address: 127.0.0.1:0 }]\nlimits:\n");
    for n in 0..policies {
        let per = if n < own { "key" } else { "shared" };
        let (kind, window) = (kinds[n % 3], windows[n / 3 % 3]);
        text.push_str(&format!(
            "  - {{ name: p{n}, per: {per}, {kind}, every: 1mo, window: {window} }}\n"
        ));
    }
    let config = config::parse(&text, "admit_cost", Path::new("/"), &|_| None)?;
    let policies_of = Arc::new(Policies::new(&config));
    let places = (own * keys * 3 / 2).max(1024);
    let (levels, _) = state::restore(Words::in_memory(state::words_for(places)), places, None);
    let quota = Arc::new(Quota {
        levels,
        ..Quota::default()
    });
    let ids: Vec<Ids> = (0..keys).map(|n| Ids::new(&format!("key-{n}"), "", "")).collect();
    // Every key has its levels before the clock starts, as in a gateway that has run for a while.
    ids.iter().for_each(|ids| one(&quota, &policies_of, *ids));
    let before = cpu()?;
    let mut at = 0;
    for _ in 0..rounds {
        // A stride that visits all keys in an order that no cache foresees.
        at = (at + 7_368_787) % keys;
        one(&quota, &policies_of, ids[at]);
    }
    let each = (cpu()? - before).as_nanos() as f64 / rounds as f64;
    let table = quota.levels.shelf(Shelf::Own);
    let bytes = table.capacity() * 33 / table.used().max(1);
    println!(
        "{policies:>8} {keys:>9} {each:>14.0} {:>15} {bytes:>21}",
        table.used()
    );
    Ok(())
}

fn one(quota: &Arc<Quota>, policies: &Arc<Policies>, ids: Ids) {
    let facts = Facts {
        ids,
        user: "",
        model: "fast",
        path: "/v1/chat/completions",
        client: IpAddr::from([192, 0, 2, 1]),
        header: &|_| None,
        own: &[],
    };
    let ask = Ask {
        input: 100,
        output: 200,
        output_is_explicit: true,
        stream: true,
        rates: None,
    };
    if let Ok(admission) = admit(quota, policies, &facts, ask) {
        admission.reservation.settle(Amounts {
            input: 90,
            output: 120,
            nano_usd: 0,
        });
    }
}

/// CPU time of this thread so far.
fn cpu() -> anyhow::Result<Duration> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat")?;
    let ns = text.split_whitespace().next().unwrap_or("0").parse()?;
    Ok(Duration::from_nanos(ns))
}
