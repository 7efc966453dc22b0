//! Where a request goes: the order in which targets and endpoints are tried.

use std::sync::Arc;

use super::{Endpoint, Pool, Target};
use crate::config::schema::Balance;

/// The order in which a model's targets are tried for one request: by priority; within one, by weighted
/// chance. Returns indexes into `targets`. Targets of weight 0 are left out.
pub fn order(targets: &[Target], mut chance: impl FnMut(u64) -> u64) -> Vec<usize> {
    let mut left: Vec<usize> = (0..targets.len()).filter(|&i| targets[i].weight > 0).collect();
    left.sort_by_key(|&i| targets[i].priority);
    let mut order = Vec::with_capacity(left.len());
    while let Some(&first) = left.first() {
        let group = left
            .iter()
            .take_while(|&&i| targets[i].priority == targets[first].priority)
            .count();
        let sum: u64 = left[..group].iter().map(|&i| u64::from(targets[i].weight)).sum();
        let mut drawn = if group == 1 { 0 } else { chance(sum) };
        let picked = left[..group].iter().position(|&i| {
            let weight = u64::from(targets[i].weight);
            let hit = drawn < weight;
            drawn = drawn.saturating_sub(weight);
            hit
        });
        order.push(left.remove(picked.unwrap_or(0)));
    }
    order
}

/// Chooses an endpoint, leaving out those in `tried`. Endpoints that are down come last.
pub fn endpoint<'a>(
    endpoints: &'a [Arc<Endpoint>],
    balance: Balance,
    pool: &Pool,
    tried: &[u64],
    turn: u64,
    now_ns: u64,
) -> Option<&'a Arc<Endpoint>> {
    let count = endpoints.len();
    let from = turn as usize % count.max(1);
    let rotated = (0..count)
        .map(|i| &endpoints[(from + i) % count])
        .filter(|e| !tried.contains(&e.id));
    // `min_by_key` takes the first of equals, which the rotation makes a different one each time.
    rotated.min_by_key(|e| {
        let load = match balance {
            Balance::LeastRequests => pool.active(e.id),
            Balance::RoundRobin => 0,
        };
        (pool.is_down(e.id, now_ns), load)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::Provider;

    fn targets(weights: &[(u32, u32)]) -> Vec<Target> {
        let provider = Arc::new(Provider {
            name: "p".into(),
            authorization: None,
            endpoints: Vec::new(),
            on_disconnect: Default::default(),
        });
        let target = |&(weight, priority)| Target {
            provider: provider.clone(),
            model: "m".into(),
            model_json: b"\"m\"".to_vec(),
            weight,
            priority,
            tariff: Default::default(),
            calibration: Default::default(),
            vocabulary: None,
        };
        weights.iter().map(target).collect()
    }

    #[test]
    fn priority_first_then_weight() {
        let targets = targets(&[(1, 1), (80, 0), (20, 0), (0, 0)]);
        assert_eq!(order(&targets, |_| 0), [1, 2, 0]);
        assert_eq!(order(&targets, |_| 79), [1, 2, 0]);
        assert_eq!(order(&targets, |sum| sum - 1), [2, 1, 0]);
    }

    #[test]
    fn weights_are_kept_over_many_draws() {
        let targets = targets(&[(80, 0), (20, 0)]);
        let firsts = (0..100).filter(|&draw| order(&targets, |_| draw)[0] == 0).count();
        assert_eq!(firsts, 80);
    }
}
