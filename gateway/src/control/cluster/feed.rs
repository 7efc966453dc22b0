//! Maps that all hosts have a copy of: who reads along with the store's log.
//!
//! A reader takes all items once, then follows the log of what changed. It begins again after a lost connection, for the
//! store may have lost its data, and where the log, which is short, does not go back to where it was. Items are states with stamps, so hearing of one twice or late
//! changes nothing.

use super::link::{Item, Link};

/// Where a reader is in one map.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Start,
    /// Goes through all items; behind `end` the log is followed.
    Scan {
        cursor: u64,
        end: String,
    },
    Follow {
        end: String,
    },
}

/// A reader of one map.
#[derive(Debug)]
pub struct Feed {
    map: &'static str,
    place: Place,
}

/// What one call of [`Feed::pull`] found.
#[derive(Debug, Default)]
pub struct Pulled {
    pub items: Vec<Item>,
    /// There is more at once.
    pub more: bool,
}

impl Feed {
    pub fn new(map: &'static str) -> Feed {
        Feed {
            map,
            place: Place::Start,
        }
    }

    /// Begins again with all items.
    pub fn restart(&mut self) {
        self.place = Place::Start;
    }

    /// Reads the next portion.
    ///
    /// # Errors
    /// The store does not answer; the reader stays where it is.
    pub async fn pull(&mut self, link: &mut Link, unix_ms: u64) -> anyhow::Result<Pulled> {
        match self.place.clone() {
            Place::Start => {
                // The end first: what changes during the scan is then read again.
                let end = link.log_end(self.map).await?;
                self.place = Place::Scan { cursor: 0, end };
                Ok(Pulled {
                    items: Vec::new(),
                    more: true,
                })
            }
            Place::Scan { cursor, end } => {
                let (cursor, items) = link.scan(self.map, cursor, unix_ms).await?;
                let more = cursor != 0;
                self.place = match more {
                    true => Place::Scan { cursor, end },
                    false => Place::Follow { end },
                };
                Ok(Pulled { items, more })
            }
            Place::Follow { end } => {
                let Some((names, end)) = link.changed_since(self.map, &end).await? else {
                    self.place = Place::Start;
                    return Ok(Pulled {
                        items: Vec::new(),
                        more: true,
                    });
                };
                let items = link.items(self.map, &names, unix_ms).await?;
                self.place = Place::Follow { end };
                Ok(Pulled {
                    more: !names.is_empty(),
                    items,
                })
            }
        }
    }
}
