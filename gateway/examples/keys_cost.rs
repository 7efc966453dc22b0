//! What run-time keys cost: memory of each in the data plane's table, time of a look-up and of a change, time to read them
//! from the database at the start.
//!
//! `cargo run --release --example keys_cost -- 1000000`

use std::{sync::Arc, time::Instant};

use gateway::{
    config::key_hash,
    control::store::{self, NewKey},
    quota::Ids,
    serve::keys::{Key, Keys, NEVER_MS},
};

/// Resident bytes of the process, of /proc/self/statm (proc(5)), whose second field counts pages of 4 KiB.
fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse::<usize>().ok());
    pages.unwrap_or_default() * 4096
}

fn key(n: usize, team: &Arc<str>, none: &Arc<str>) -> Arc<Key> {
    let name = format!("service-{n}");
    Arc::new(Key {
        ids: Ids::new(&name, team, none),
        name: name.as_str().into(),
        team: team.clone(),
        organization: none.clone(),
        models: None,
        networks: Arc::new([]),
        expires_unix_ms: NEVER_MS,
        disabled: false,
        own: None,
        life: Arc::default(),
    })
}

fn main() -> anyhow::Result<()> {
    let count = std::env::args().nth(1).map_or(Ok(100_000), |text| text.parse())?;
    let (team, none): (Arc<str>, Arc<str>) = ("search".into(), "".into());
    let keys = Keys::default();
    let before = resident_bytes();
    keys.fill((0..count).map(|n| (key_hash(&n.to_string()), key(n, &team, &none))));
    let bytes = resident_bytes().saturating_sub(before);
    println!("{count} keys: {} bytes each in the table", bytes / count.max(1));

    const TRIES: usize = 20_000;
    let hashes: Vec<_> = (0..TRIES)
        .map(|n| key_hash(&(n * 37 % count.max(1)).to_string()))
        .collect();
    let began = Instant::now();
    let found = hashes.iter().filter(|hash| keys.get(hash).is_some()).count();
    println!(
        "look-up: {} ns ({found} found)",
        began.elapsed().as_nanos() / TRIES as u128
    );
    let fresh = key(count, &team, &none);
    let began = Instant::now();
    for hash in hashes.iter().take(2000) {
        keys.set(*hash, &fresh);
    }
    println!("change in force: {} us", began.elapsed().as_micros() / 2000);

    let directory = tempfile::tempdir()?;
    let mut db = store::open(directory.path())?;
    let kept = count.min(20_000);
    let new = |n: usize| NewKey {
        name: format!("service-{n}"),
        ..NewKey::default()
    };
    let began = Instant::now();
    db.together(|db| (0..kept).try_for_each(|n| db.create_key(&new(n), "bench").map(drop)))?;
    println!(
        "made in one transaction: {} us each",
        began.elapsed().as_micros() / kept.max(1) as u128
    );
    let began = Instant::now();
    let mut read = 0usize;
    db.each(|_: store::Key| read += 1)?;
    println!(
        "read at the start: {} ns each ({read})",
        began.elapsed().as_nanos() / kept.max(1) as u128
    );
    Ok(())
}
