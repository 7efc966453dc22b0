//! What it costs to admit a request and to settle it, by the number of policies that bind it and of keys that ask:
//! `cargo run --release -p gateway --example admit_cost -- [POLICIES] [KEYS] [ROUNDS]`.
//!
//! Without arguments all of 1, 10 and 100 policies and 10, 10,000 and 1,000,000 keys. Times are CPU time of the thread.
//! With arguments one pair, for `valgrind --tool=callgrind`: subtract a run with fewer rounds.

mod support;

use gateway::quota::levels::Shelf;
use support::Bound;

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
    let bound = Bound::new(policies, keys, None)?;
    let each = bound.measure(rounds)?;
    let table = bound.quota.levels.shelf(Shelf::Own);
    let bytes = table.capacity() * 33 / table.used().max(1);
    println!(
        "{policies:>8} {keys:>9} {each:>14.0} {:>15} {bytes:>21}",
        table.used()
    );
    Ok(())
}
