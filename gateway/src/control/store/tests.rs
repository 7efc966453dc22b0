//! The store: what it keeps, and how several come to the same state.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

/// Notes what it is told.
#[derive(Clone, Default)]
struct Notes(Arc<Mutex<Vec<Changed>>>);

impl Follow for Notes {
    fn follow(&mut self, changed: &[Changed]) {
        self.0.lock().expect("notes").extend_from_slice(changed);
    }
    fn used_since(&self, _: u64) -> Vec<(String, u64)> {
        Vec::new()
    }
    fn used_of_ended(&mut self) -> Vec<(String, u64)> {
        Vec::new()
    }
}

fn new_store() -> (TempDir, Store, Notes) {
    let directory = tempfile::tempdir().expect("directory");
    let notes = Notes::default();
    let store = Store::start(open(directory.path()).expect("database"), notes.clone()).expect("store");
    (directory, store, notes)
}

fn named(name: &str) -> NewKey {
    NewKey {
        name: name.into(),
        ..NewKey::default()
    }
}

/// A budget that is prepaid.
fn prepaid() -> BudgetSettings {
    serde_json::from_str("{}").expect("settings")
}

fn state(store: &Store) -> Vec<(Kind, String, Option<String>, Stamp)> {
    let changes = store
        .change_blocking(|db| db.changes_since(0, usize::MAX))
        .expect("changes");
    let mut state: Vec<_> = changes
        .into_iter()
        .map(|change| (change.kind, change.id, change.doc, change.stamp))
        .collect();
    state.sort_by(|a, b| (a.0 as u8, &a.1).cmp(&(b.0 as u8, &b.1)));
    state
}

fn apply(store: &Store, changes: Vec<Change>) -> usize {
    store
        .change_blocking(move |db| {
            let mut news = 0;
            for change in &changes {
                news += usize::from(db.apply(change)?);
            }
            Ok(news)
        })
        .expect("applied")
}

#[test]
fn what_fails_leaves_nothing_and_what_follows_is_made() {
    let (_directory, store, notes) = new_store();
    let failed = store.change_blocking(|db| {
        db.create_key(&named("a"), "t")?;
        Err::<(), _>(Failure::invalid("no"))
    });
    assert_eq!(failed.expect_err("refused").cause, Cause::Invalid);
    let (row, secret) = store
        .change_blocking(|db| db.create_key(&named("a"), "t"))
        .expect("made");
    assert!(secret.is_some_and(|secret| secret.starts_with("sk-gw-")));
    let changed = notes.0.lock().expect("notes").clone();
    let [
        Changed::Key {
            old: None,
            new: Some(key),
        },
    ] = &changed[..]
    else {
        panic!("{changed:?}")
    };
    assert_eq!(key.id, row.doc.id);
    assert_eq!(*store.version().borrow(), row.version);
    assert_eq!(store.change_blocking(|db| db.count(Kind::Key)).expect("count"), 1);
    assert_eq!(
        store
            .change_blocking(|db| db.audit_before(u64::MAX, 9))
            .expect("audit")
            .len(),
        1
    );
    assert!(store.trouble().is_none());
}

#[test]
fn a_budget_is_changed_as_it_was_seen_or_not_at_all() {
    let (_directory, store, _) = new_store();
    let budget = (Scope::Gateway, "all");
    let settings = prepaid();
    let set = |seen: Option<u64>| {
        let settings = settings.clone();
        store.change_blocking(move |db| db.set_budget(budget, seen, &settings, "t"))
    };
    let stale = |result: Result<Standing, Failure>| result.expect_err("stale").cause == Cause::Stale;
    assert!(stale(set(Some(1))), "there is none that could have been seen");
    let (seen, _) = set(None).expect("made");
    let topup = NewTopUp {
        usd: "5".into(),
        reference: "r".into(),
    };
    let ((topped, _), fresh) = store
        .change_blocking(move |db| db.top_up(budget.0, budget.1, &topup, "t"))
        .expect("added");
    assert!(fresh && topped.version > seen.version);
    assert!(stale(set(Some(seen.version))), "it has credit that was not seen");
    let version = seen.version;
    let deleted = store.change_blocking(move |db| db.delete_budget(budget.0, budget.1, Some(version), "t"));
    assert_eq!(deleted.expect_err("stale").cause, Cause::Stale);
    set(Some(topped.version)).expect("as seen");
}

#[test]
fn top_ups_of_a_budget_are_bounded_and_known_ones_are_still_known() {
    let (_directory, store, _) = new_store();
    let budget = (Scope::Gateway, "all");
    store
        .change_blocking(move |db| db.set_budget(budget, None, &prepaid(), "t"))
        .expect("made");
    let add = |number: u64| {
        let topup = NewTopUp {
            usd: "1".into(),
            reference: format!("r{number}"),
        };
        store.change_blocking(move |db| db.top_up(budget.0, budget.1, &topup, "t"))
    };
    for number in 0..budgets::TOPUPS_MAX {
        assert!(add(number).expect("added").1);
    }
    let one_more = add(budgets::TOPUPS_MAX).expect_err("too many");
    assert_eq!(one_more.cause, Cause::Conflict);
    assert!(!add(7).expect("known").1);
}

#[test]
fn a_budget_of_the_run_time_can_all_that_one_of_the_file_can() {
    let (_directory, store, _) = new_store();
    let set = |text: &str| {
        let settings: BudgetSettings = serde_json::from_str(text).expect("settings");
        store.change_blocking(move |db| db.set_budget((Scope::Gateway, "all"), None, &settings, "t"))
    };
    let text = r#"{"usd": "2.5", "every": "1d", "time_zone": "Asia/Tokyo", "alerts": [150],
        "on_exhausted": "error", "unpriced": "allow", "hard": false}"#;
    let (row, credit) = set(text).expect("made");
    let at_run_time = row.doc.as_in_file(credit);
    let text = r#"{"usd": "2.5", "every": "1d", "time_zone": "Asia/Tokyo", "alerts": ["150%"],
        "on_exhausted": "error", "unpriced": "allow", "hard": false}"#;
    let of_file: crate::config::schema::Budget = serde_json::from_str(text).expect("a budget");
    assert_eq!(
        serde_json::to_value(&at_run_time).expect("JSON"),
        serde_json::to_value(&of_file).expect("JSON")
    );
    for (wrong, says) in [
        (
            r#"{"usd": "1", "every": "1d", "time_zone": "Mars/Olympus"}"#,
            "time zone",
        ),
        (r#"{"usd": "1", "every": "1d", "time_zone": ""}"#, "time_zone"),
        (r#"{"usd": "1"}"#, "every"),
        (r#"{"every": "1d"}"#, "every"),
        (r#"{"usd": "1", "every": "2mo"}"#, "every"),
        (r#"{"alerts": [0]}"#, "alerts"),
        (r#"{"alerts": [1001]}"#, "alerts"),
    ] {
        let failure = set(wrong).expect_err(wrong);
        assert_eq!(failure.cause, Cause::Invalid, "{wrong}");
        assert!(failure.message.contains(says), "{wrong}: {failure}");
    }
    // One that was kept before dollars needed a period: there once, and not every minute.
    let once = Budget {
        every: None,
        ..row.doc
    };
    let in_force = once.as_in_file(0);
    assert_eq!(
        (in_force.usd, in_force.credit.map(|credit| credit.0)),
        (None, Some(2_500_000_000))
    );
}

#[test]
fn it_is_all_there_when_opened_again() {
    let (directory, store, _) = new_store();
    let (row, _) = store
        .change_blocking(|db| db.create_key(&named("a"), "t"))
        .expect("made");
    let before = state(&store);
    drop(store);
    // The thread ends when the last handle is gone; SQLite lets the next one in as soon as it may.
    let notes = Notes::default();
    let store = Store::start(open(directory.path()).expect("database"), notes).expect("store");
    assert_eq!(state(&store), before);
    let again = store
        .change_blocking(move |db| db.key(&row.doc.id))
        .expect("kept");
    assert_eq!(again.doc.name, "a");
}

#[test]
fn a_database_of_a_newer_gateway_is_refused() {
    let directory = tempfile::tempdir().expect("directory");
    drop(open(directory.path()).expect("made"));
    let connection = rusqlite::Connection::open(directory.path().join(FILE)).expect("database");
    connection
        .pragma_update(None, "user_version", 99)
        .expect("version");
    drop(connection);
    let error = format!("{:#}", open(directory.path()).err().expect("refused"));
    assert!(error.contains("newer gateway"), "{error}");
    std::fs::write(
        directory.path().join(FILE),
        b"this is not a database, but long enough to be one",
    )
    .expect("file");
    assert!(open(directory.path()).is_err());
}

#[test]
fn a_change_goes_to_another_host_once() {
    let (_a, one, _) = new_store();
    let (_b, two, notes) = new_store();
    let (row, secret) = one
        .change_blocking(|db| db.create_key(&named("a"), "t"))
        .expect("made");
    let changes = one
        .change_blocking(|db| db.changes_since(0, 10))
        .expect("changes");
    assert!(
        changes
            .iter()
            .all(|change| !format!("{change:?}").contains(secret.as_deref().expect("secret")))
    );
    assert_eq!(apply(&two, changes.clone()), 1);
    assert_eq!(apply(&two, changes), 0, "again it is no news");
    assert_eq!(notes.0.lock().expect("notes").len(), 1);
    assert_eq!(state(&one), state(&two));
    // The other host's later change wins, even if its clock is behind.
    let id = row.doc.id.clone();
    two.change_blocking(move |db| db.revoke_key(&id, None, &Revocation::default(), "t"))
        .expect("revoked");
    let back = two
        .change_blocking(|db| db.changes_since(0, 10))
        .expect("changes");
    assert_eq!(apply(&one, back), 1);
    assert_eq!(state(&one), state(&two));
}

#[test]
fn a_foreign_document_that_is_wrong_is_refused_whole() {
    let (_directory, store, _) = new_store();
    let wrong = Change {
        kind: Kind::Key,
        id: "key_1".into(),
        doc: Some("{}".into()),
        stamp: Stamp {
            unix_ms: u64::MAX / 4,
            host: "x".into(),
        },
        version: 1,
    };
    let refused = store.change_blocking(move |db| db.apply(&wrong));
    assert_eq!(refused.expect_err("refused").cause, Cause::Broken);
    assert!(state(&store).is_empty());
}

#[test]
fn a_change_from_the_future_is_taken_and_yields_to_later_ones() {
    let (_directory, store, _) = new_store();
    let (_other_directory, other, _) = new_store();
    for name in ["a", "b"] {
        let new = NewTeam {
            name: name.into(),
            ..NewTeam::default()
        };
        other
            .change_blocking(move |db| db.create_team(&new, "t"))
            .expect("a team");
    }
    let mut changes = other
        .change_blocking(|db| db.changes_since(0, 10))
        .expect("changes");
    let years_ms = 10 * 365 * 86_400_000;
    changes[0].stamp.unix_ms += years_ms;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    assert_eq!(
        runtime.block_on(store.apply(changes.clone())).expect("applied"),
        2
    );
    let there = |store: &Store| -> Vec<String> {
        let all = state(store).into_iter();
        all.filter_map(|(_, id, doc, _)| doc.map(|_| id)).collect()
    };
    assert_eq!(there(&store), ["a", "b"]);
    // Who has heard of it changes it as any other, and is heard by the rest.
    store
        .change_blocking(|db| db.delete_team("a", None, "t"))
        .expect("deleted");
    let later = store
        .change_blocking(|db| db.changes_since(0, 10))
        .expect("changes");
    assert!(
        later
            .iter()
            .any(|change| change.id == "a" && change.stamp > changes[0].stamp)
    );
    runtime.block_on(other.apply(later)).expect("applied");
    assert_eq!(there(&other), ["b"]);
    // Told again it brings nothing back.
    assert_eq!(
        runtime.block_on(store.apply(changes.clone())).expect("applied"),
        0
    );
    // What is no time leaves no room for later changes.
    changes[0].stamp.unix_ms = u64::MAX;
    runtime
        .block_on(store.apply(vec![changes[0].clone()]))
        .expect_err("no stamp");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Hosts that hear of each other's changes in any order, some of them several times, end in the same state; credit is
    /// the sum of all top-ups.
    #[test]
    fn hosts_come_to_the_same_state(steps in prop::collection::vec((0usize..3, 0u8..6, 0u8..4), 1..40)) {
        let directories: Vec<TempDir> = (0..3).map(|_| tempfile::tempdir().expect("directory")).collect();
        let mut hosts: Vec<Db> = directories.iter().map(|directory| open(directory.path()).expect("database")).collect();
        let mut expected = std::collections::BTreeMap::new();
        for (step, (host, what, which)) in steps.into_iter().enumerate() {
            let db = &mut hosts[host];
            let name = format!("team {which}");
            match what {
                0 => drop(db.create_team(&NewTeam { name, ..NewTeam::default() }, "t")),
                1 => drop(db.update_team(&name, None, &TeamPatch {
                    organization: Some(Some(format!("o{step}"))), ..TeamPatch::default()
                }, "t")),
                2 => drop(db.delete_team(&name, None, "t")),
                3 => {
                    drop(db.set_budget((Scope::Team, &name), None, &prepaid(), "t"));
                }
                4 => {
                    let topup = NewTopUp { usd: "1.5".into(), reference: format!("r{step}") };
                    if db.top_up(Scope::Team, &name, &topup, "t").is_ok() {
                        *expected.entry(name).or_insert(0i64) += 1_500_000_000;
                    }
                }
                _ => {
                    let changes = db.changes_since(0, usize::MAX).expect("changes");
                    for change in changes.iter().rev() {
                        hosts[(host + 1) % 3].apply(change).expect("applied");
                    }
                }
            }
        }
        for _ in 0..2 {
            for from in 0..3 {
                let changes = hosts[from].changes_since(0, usize::MAX).expect("changes");
                for host in &mut hosts {
                    for change in &changes {
                        host.apply(change).expect("applied");
                    }
                }
            }
        }
        let view = |db: &Db| {
            let mut all: Vec<_> = db.changes_since(0, usize::MAX).expect("changes").into_iter()
                .map(|change| (change.kind as u8, change.id, change.doc, change.stamp)).collect();
            all.sort();
            all
        };
        prop_assert_eq!(view(&hosts[0]), view(&hosts[1]));
        prop_assert_eq!(view(&hosts[1]), view(&hosts[2]));
        for (name, nano) in expected {
            prop_assert_eq!(hosts[0].credit(&Budget::id_of(Scope::Team, &name)).expect("credit"), nano);
        }
    }
}
