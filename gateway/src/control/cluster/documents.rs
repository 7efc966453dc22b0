//! Keys, teams, budgets and credit that administrators made: every host's changes come to all others.
//!
//! A document is an item of a shared map, with the stamp of its last change: of two changes the greater stamp stands, in
//! the map as on each host. A host tells what changed since it last told, and everything to a store that lost its data.

use std::{
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::Duration,
};

use tokio::{task::JoinSet, time::Instant};

use super::{
    feed::Feed,
    link::{Item, Link},
};
use crate::control::store::{Change, Store};

/// The map of documents.
const DOCUMENTS: &str = "documents";

/// How often it is looked whether the store lost its data.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Changes that are told at once.
const CHANGES_PER_BATCH: usize = 64;

/// This host's side of the exchange.
pub(super) struct Documents {
    store: Store,
    feed: Feed,
    /// The map that was told, and the version of this host's store up to which it was.
    told: (String, u64),
    /// When it is to be looked whether the map is the one that was told.
    look_at: Instant,
    refused: AtomicUsize,
}

impl Documents {
    pub(super) fn new(store: Store) -> Documents {
        Documents {
            store,
            feed: Feed::new(DOCUMENTS),
            told: (String::new(), 0),
            look_at: Instant::now(),
            refused: AtomicUsize::new(0),
        }
    }

    /// A connection is new: the store may have lost its data.
    pub(super) fn restart(&mut self) {
        self.feed.restart();
        self.look_at = Instant::now();
    }

    /// Tells what changed here and takes over what changed elsewhere.
    ///
    /// # Errors
    /// The shared store does not answer, or the host's own cannot be read.
    pub(super) async fn exchange(&mut self, link: &mut Link, host: &str, unix_ms: u64) -> anyhow::Result<()> {
        if Instant::now() >= self.look_at {
            let birth = link.birth(DOCUMENTS, host).await?;
            if birth != self.told.0 {
                self.told = (birth, 0);
                // The new log may begin below where the old one was read to.
                self.feed.restart();
            }
            self.look_at = Instant::now() + LOOK_EVERY;
        }
        self.tell(link).await?;
        loop {
            let pulled = self.feed.pull(link, unix_ms).await?;
            self.take_over(&pulled.items).await?;
            if !pulled.more {
                return Ok(());
            }
        }
    }

    async fn tell(&mut self, link: &Link) -> anyhow::Result<()> {
        while *self.store.version().borrow() > self.told.1 {
            let changes = self.store.changes_since(self.told.1, CHANGES_PER_BATCH).await?;
            let Some(last) = changes.last() else { return Ok(()) };
            let version = last.version;
            let mut calls = JoinSet::new();
            for change in &changes {
                let (item, mut link) = (item(change)?, link.clone());
                calls.spawn(async move { link.publish(DOCUMENTS, &item).await });
            }
            while let Some(done) = calls.join_next().await {
                done??;
            }
            self.told.1 = version;
        }
        Ok(())
    }

    async fn take_over(&self, items: &[Item]) -> anyhow::Result<()> {
        let read = |item: &Item| serde_json::from_str(&item.value).ok();
        let changes: Vec<Change> = items.iter().filter_map(read).collect();
        if changes.len() < items.len() {
            self.refuse("not a change");
        }
        if changes.is_empty() {
            return Ok(());
        }
        if self.store.apply(changes.clone()).await.is_ok() {
            return Ok(());
        }
        // One that is not understood here, from a newer gateway perhaps, does not keep the others out.
        for change in changes {
            if let Err(error) = self.store.apply(vec![change]).await {
                self.refuse(&error.to_string());
            }
        }
        Ok(())
    }

    /// Says once that other hosts tell what is not understood here.
    fn refuse(&self, reason: &str) {
        if self.refused.fetch_add(1, Relaxed) == 0 {
            tracing::warn!(
                reason,
                "another host's change of keys or budgets is not taken over; further ones are not logged"
            );
        }
    }
}

fn item(change: &Change) -> anyhow::Result<Item> {
    // The version is this host's own.
    let change = Change {
        version: 0,
        ..change.clone()
    };
    Ok(Item {
        name: format!("{}/{}", change.kind.name(), change.id),
        stamp: format!("{:016x}-{}", change.stamp.unix_ms, change.stamp.host),
        value: serde_json::to_string(&change)?,
        ttl: None,
    })
}
