//! Calls to the store that run: which parts of it they are for, which parts answer, and whether one lost its data.
//!
//! A part that is slow holds up nobody but its own levels: a round waits for answers no longer than a round, and asks
//! only parts that owe none.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use tokio::{task::JoinSet, time::timeout};

use super::{
    level::{Report, Times},
    link::{LEVELS_PER_CALL, Link},
    wire::Heard,
};
use crate::net::clock;

/// Stands for the part in which hosts say that they are there.
const PRESENCE: u64 = u64::MAX;

/// See the module.
#[derive(Default)]
pub(super) struct Calls {
    running: JoinSet<Done>,
    /// Calls that run, for each part that has any.
    busy: HashMap<u64, usize>,
    /// Parts whose last call was answered, and those whose was not.
    well: HashSet<u64>,
    ill: HashSet<u64>,
    /// Busy parts whose levels would have asked for more.
    awaited: HashSet<u64>,
    /// One of them has answered since.
    hurry: bool,
    /// The mark that each part had.
    marks: HashMap<u64, u64>,
}

/// A call that has ended.
pub(super) enum Done {
    Levels(Call),
    Presence(anyhow::Result<Presence>),
}

/// Reports that were sent.
pub(super) struct Call {
    pub part: u64,
    /// Whose reports they are.
    pub places: Vec<usize>,
    pub reports: Vec<Report>,
    /// Before it was sent, monotonic nanoseconds.
    pub sent_ns: u64,
    pub heard: anyhow::Result<Heard>,
}

/// What the store says of hosts and time.
pub(super) struct Presence {
    pub hosts: u64,
    /// What to add to this host's wall clock to have the store's, milliseconds.
    pub offset_ms: i64,
}

impl Calls {
    /// Forgets what runs: the connection is lost. Answers that may still be on their way are told by their numbers.
    pub fn clear(&mut self) {
        let marks = std::mem::take(&mut self.marks);
        *self = Calls {
            marks,
            ..Calls::default()
        };
    }

    /// Whether a part owes an answer.
    pub fn is_busy(&self, part: u64) -> bool {
        self.busy.contains_key(&part)
    }

    /// Whether any answer is owed.
    pub fn is_any_running(&self) -> bool {
        !self.running.is_empty()
    }

    /// Notes that a level of a busy part wants more: the part is to be asked again when it has answered.
    pub fn wait_for(&mut self, part: u64) {
        self.awaited.insert(part);
    }

    /// Whether a part has answered that a level waited for, since the last look.
    pub fn take_hurry(&mut self) -> bool {
        std::mem::take(&mut self.hurry)
    }

    /// Whether the last call to a part was not answered.
    pub fn is_ill(&self, part: u64) -> bool {
        self.ill.contains(&part)
    }

    /// Parts that do not answer.
    pub fn ill(&self) -> usize {
        self.ill.len()
    }

    /// Whether no part answers.
    pub fn all_ill(&self) -> bool {
        self.well.is_empty() && !self.ill.is_empty()
    }

    /// Parts that nothing is asked of tell nothing of the store.
    pub fn forget_all_but(&mut self, parts: impl Fn(u64) -> bool) {
        let keep = |part: &u64| *part == PRESENCE || parts(*part);
        self.well.retain(keep);
        self.ill.retain(keep);
    }

    /// Says that this host is here.
    pub fn say_present(&mut self, mut link: Link, host: String, lease_ms: u64) {
        if self.is_busy(PRESENCE) {
            return;
        }
        self.begin(PRESENCE, async move {
            let before_ms = clock::unix_ms();
            Done::Presence(link.present(&host, lease_ms).await.map(|(store_ms, hosts)| {
                // Half of the way there and back is within a round's accuracy.
                let here_ms = before_ms + clock::unix_ms().saturating_sub(before_ms) / 2;
                Presence {
                    hosts: hosts.max(1),
                    offset_ms: store_ms as i64 - here_ms as i64,
                }
            }))
        });
    }

    /// Sends reports of one part's levels, with those whose they are. Without any it is looked whether the part is as it was.
    pub fn report(&mut self, link: &Link, part: u64, levels: Vec<(usize, Report)>, times: Times) {
        let mut levels = levels.into_iter();
        loop {
            let (places, reports): (Vec<usize>, Vec<Report>) = levels.by_ref().take(LEVELS_PER_CALL).unzip();
            let link = link.clone();
            self.begin(part, async move {
                let sent_ns = clock::monotonic_ns();
                let heard = link.report(part, &reports, times).await;
                Done::Levels(Call {
                    part,
                    places,
                    reports,
                    sent_ns,
                    heard,
                })
            });
            if levels.len() == 0 {
                return;
            }
        }
    }

    fn begin(&mut self, part: u64, call: impl Future<Output = Done> + Send + 'static) {
        *self.busy.entry(part).or_default() += 1;
        self.running.spawn(call);
    }

    /// The next call that has ended, within this time; `None`: none runs, or those that do take longer.
    pub async fn ended(&mut self, within: Duration) -> Option<Done> {
        let next = timeout(within, self.running.join_next()).await;
        let Ok(done) = next.ok()?? else {
            // A panic: nobody knows whose call it was.
            self.clear();
            return None;
        };
        let (part, is_answered) = match &done {
            Done::Levels(call) => (call.part, call.heard.is_ok()),
            Done::Presence(result) => (PRESENCE, result.is_ok()),
        };
        if let Some(calls) = self.busy.get_mut(&part) {
            *calls -= 1;
            if *calls == 0 {
                self.busy.remove(&part);
                // One that does not answer is asked with the next round: it must not be asked all the while.
                self.hurry |= self.awaited.remove(&part) && is_answered;
            }
        }
        let (into, from) = match is_answered {
            true => (&mut self.well, &mut self.ill),
            false => (&mut self.ill, &mut self.well),
        };
        into.insert(part);
        from.remove(&part);
        Some(done)
    }

    /// Notes a part's mark; true: it is another one than before, so the part lost its data.
    pub fn is_new(&mut self, part: u64, mark: u64) -> bool {
        self.marks.insert(part, mark).is_some_and(|before| before != mark)
    }
}
