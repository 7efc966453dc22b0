use super::*;
use crate::control::store::NewTeam;

#[test]
fn after_a_rollback_by_sqlite_nothing_of_the_batch_is_kept() {
    let directory = tempfile::tempdir().expect("directory");
    let mut db = Db::open(directory.path()).expect("database");
    let make = |db: &mut Db, name: &str| {
        let new = NewTeam {
            name: name.into(),
            ..NewTeam::default()
        };
        db.attempt(|db| db.create_team(&new, "admin"))
    };
    db.begin().expect("a transaction");
    make(&mut db, "first").expect("made");
    // What SQLite does where the disk is full.
    let full = db.attempt(|db| -> Result<(), Failure> {
        db.connection.execute_batch("ROLLBACK")?;
        Err(Failure::broken("full"))
    });
    assert!(full.is_err());
    make(&mut db, "second").expect_err("no transaction");
    db.commit().expect_err("no transaction");
    for name in ["first", "second"] {
        db.team(name).expect_err("not kept");
    }
    // The next batch is a new beginning.
    db.begin().expect("a transaction");
    make(&mut db, "third").expect("made");
    assert_eq!(db.commit().expect("committed").len(), 1);
    db.team("third").expect("kept");
}
