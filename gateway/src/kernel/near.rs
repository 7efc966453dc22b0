//! Which group listens on a port, for the program: where the port alone tells, it needs neither the listener's cookie nor
//! a hash.

use aya::maps::{Array, MapData, MapError};
use gateway_common::{GROUPS_MAX, NEAR_SLOTS, Near};

/// The array, and the groups that are in it.
pub struct Ports {
    map: Array<MapData, Near>,
    groups: [Option<Near>; GROUPS_MAX as usize],
}

impl Ports {
    /// An array that nobody is in yet.
    pub fn new(map: Array<MapData, Near>) -> Ports {
        Ports {
            map,
            groups: [None; GROUPS_MAX as usize],
        }
    }

    /// Says where a group listens; None: nowhere any more.
    ///
    /// # Errors
    /// The kernel refused the update.
    pub fn set(&mut self, group: usize, near: Option<Near>) -> Result<(), MapError> {
        let before = std::mem::replace(&mut self.groups[group], near);
        for slot in [before, near]
            .into_iter()
            .flatten()
            .map(|near| near.port % NEAR_SLOTS)
        {
            self.map
                .set(slot, only(&self.groups, slot).unwrap_or_default(), 0)?;
        }
        Ok(())
    }
}

/// The group of a slot when there is just one: two may listen on one port at different addresses, or on ports that meet.
fn only(groups: &[Option<Near>], slot: u32) -> Option<Near> {
    let mut there = groups
        .iter()
        .flatten()
        .filter(|near| near.port % NEAR_SLOTS == slot);
    let first = there.next().copied();
    first.filter(|_| there.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_tells_only_where_one_group_is_in_it() {
        let near = |port, base| {
            Some(Near {
                port,
                base,
                count: 2,
                slot: 1,
            })
        };
        let groups = [
            near(80, 0),
            near(443, 256),
            None,
            near(80, 512),
            near(80 + NEAR_SLOTS, 768),
        ];
        assert_eq!(only(&groups, 443 % NEAR_SLOTS), near(443, 256));
        assert_eq!(only(&groups, 80 % NEAR_SLOTS), None);
        assert_eq!(only(&groups[..2], 80 % NEAR_SLOTS), near(80, 0));
        assert_eq!(only(&groups[4..], 80 % NEAR_SLOTS), near(80 + NEAR_SLOTS, 768));
        assert_eq!(only(&groups, 1), None);
    }
}
