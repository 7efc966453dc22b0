//! A key's own limits, made at run time with the key: rules that bind its requests alone.

use std::sync::Arc;

use super::{
    identity::of_name,
    policy::{amounts, window},
    rule::Rule,
};
use crate::{
    config::schema::{Limit, WindowKind},
    quota::{Unit, levels::Shelf, window::Window},
};

/// The rules of a key's own limits, none of which matches anything but the key. `id` is the key's for ever, whatever it
/// is called: what was used under an amount counts under another.
pub fn rules(id: &str, name: &str, limits: &[Limit]) -> Arc<[Arc<Rule>]> {
    let mut rules: Vec<Arc<Rule>> = Vec::new();
    for limit in limits {
        for (unit, amount) in amounts(limit) {
            let (shelf, window) = match unit {
                Unit::Parallel => (Shelf::Parallel, Window::Parallel),
                _ => (Shelf::Own, window(WindowKind::Bucket, limit.every, None)),
            };
            let every = limit.every.filter(|_| unit != Unit::Parallel);
            let mut identity = of_name(&format!("own {id} {unit:?} {every:?}"));
            // Two that are alike but for their amounts: each has a level of its own.
            while rules.iter().any(|other| other.id == identity) {
                identity = super::identity::mix(identity, 1);
            }
            let name = format!("limits of key {name}").into();
            rules.push(Arc::new(Rule::new(name, unit, amount, window, identity, shelf)));
        }
    }
    rules.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::units::Span;

    fn limit(requests: u64, parallel: Option<u64>, secs: u64) -> Limit {
        Limit {
            requests: Some(requests),
            parallel,
            every: Some(Span::secs(secs)),
            ..Limit::default()
        }
    }

    #[test]
    fn each_amount_is_a_rule_that_outlives_its_amount_and_the_name() {
        let before = rules("key_1", "a", &[limit(5, Some(2), 60), limit(9, None, 3600)]);
        let after = rules("key_1", "b", &[limit(6, Some(3), 60), limit(9, None, 3600)]);
        assert_eq!(before.len(), 3);
        for (before, after) in before.iter().zip(&*after) {
            assert_eq!(before.id, after.id);
        }
        let other = rules("key_2", "a", &[limit(5, None, 60)]);
        assert_ne!(before[0].id, other[0].id);
        let alike = rules("key_1", "a", &[limit(5, None, 60), limit(6, None, 60)]);
        assert_ne!(alike[0].id, alike[1].id);
    }
}
