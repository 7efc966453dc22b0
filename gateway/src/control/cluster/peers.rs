//! Exchanges with the other hosts what all should know: who is blocked, and what
//! administrators changed.

use std::{sync::Arc, time::Duration};

use ipnet::IpNet;

use super::{
    Cluster, Node,
    documents::Documents,
    feed::Feed,
    link::{Item, Link},
};
use crate::{control::store::Store, net::clock};

/// How often other hosts' changes are looked for.
const EVERY: Duration = Duration::from_millis(100);

/// How long the lifting of a block is remembered: longer than anyone takes to hear of it.
const LIFTED: Duration = Duration::from_secs(60);

/// The map of blocked clients.
const BLOCKS: &str = "blocks";

const LIFT: &str = "lift";
const BLOCK: &str = "block";

/// Runs until it is aborted.
pub(super) async fn run(cluster: Arc<Cluster>, node: Arc<dyn Node>, store: Option<Store>) {
    let mut links = cluster.link.subscribe();
    let mut blocks = Feed::new(BLOCKS);
    let mut documents = store.map(Documents::new);
    loop {
        let link = links.borrow_and_update().clone();
        let Some(mut link) = link else {
            if links.changed().await.is_err() {
                return;
            }
            continue;
        };
        let done = exchange(&cluster, node.as_ref(), &mut link, &mut blocks).await;
        if let Err(error) = done {
            // The rounds find out by themselves and connect again.
            tracing::debug!(%error, "the exchange of blocks failed");
            blocks.restart();
        }
        if let Some(documents) = &mut documents {
            let done = documents
                .exchange(&mut link, &cluster.host, cluster.unix_ms())
                .await;
            if let Err(error) = done {
                tracing::debug!(%error, "the exchange of keys and budgets failed");
                documents.restart();
            }
        }
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            changed = links.changed() => {
                if changed.is_err() {
                    return;
                }
                blocks.restart();
                if let Some(documents) = &mut documents {
                    documents.restart();
                }
            }
        }
    }
}

async fn exchange(
    cluster: &Cluster,
    node: &dyn Node,
    link: &mut Link,
    blocks: &mut Feed,
) -> anyhow::Result<()> {
    while let Some((client, hold, since_ns)) = cluster.blocks.pop() {
        let Some(item) = block_item(cluster, client, hold, since_ns) else {
            continue;
        };
        if let Err(error) = link.publish(BLOCKS, &item).await {
            // It waits for the next connection.
            cluster.blocks.force_push((client, hold, since_ns));
            return Err(error);
        }
    }
    loop {
        let pulled = blocks.pull(link, cluster.unix_ms()).await?;
        for item in &pulled.items {
            take_block(cluster, node, item);
        }
        if !pulled.more {
            return Ok(());
        }
    }
}

/// What the others are told; `None`: the block is over.
fn block_item(cluster: &Cluster, client: IpNet, hold: Option<Duration>, since_ns: u64) -> Option<Item> {
    let passed = Duration::from_nanos(clock::monotonic_ns().saturating_sub(since_ns));
    let ttl = hold.unwrap_or(LIFTED).checked_sub(passed)?;
    let at_ms = cluster.unix_ms().saturating_sub(passed.as_millis() as u64);
    Some(Item {
        name: client.to_string(),
        stamp: format!("{at_ms:016x}-{}", cluster.host),
        value: if hold.is_some() { BLOCK } else { LIFT }.into(),
        ttl: Some(ttl),
    })
}

fn take_block(cluster: &Cluster, node: &dyn Node, item: &Item) {
    let own = item.stamp.get(17..) == Some(cluster.host.as_str());
    let (Ok(client), Some(ttl), false) = (item.name.parse::<IpNet>(), item.ttl, own) else {
        return;
    };
    match item.value.as_str() {
        BLOCK => node.block_from_peer(client, ttl),
        LIFT => node.unblock_from_peer(client),
        _ => {}
    }
}
