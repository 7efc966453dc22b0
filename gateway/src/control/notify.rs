//! Tells systemd how the service is: ready, reloading, stopping, alive (sd_notify(3)).
//!
//! Not run by systemd (`$NOTIFY_SOCKET` unset), everything here does nothing.

use std::{
    io,
    time::{Duration, Instant},
};

use sd_notify::NotifyState;

/// The service is up: its listeners accept. Also the end of a reload.
pub fn ready() {
    send(&[NotifyState::Ready]);
}

/// A reload begins. Follow with [`ready`] when it is done, whether it changed anything or was refused.
pub fn reloading() {
    // systemd from 253 on takes RELOADING=1 only with the time at which it was sent.
    match NotifyState::monotonic_usec_now() {
        Ok(now) => send(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!(%error, "no monotonic clock; systemd is not told of the reload"),
    }
}

/// The service is about to end; it drains first.
pub fn stopping() {
    send(&[NotifyState::Stopping]);
}

/// Sets the line that `systemctl status` shows.
pub fn status(status: &str) {
    send(&[NotifyState::Status(&one_line(status))]);
}

/// Shows systemd that the service is alive, as long as it is.
///
/// systemd restarts a service of which it hears nothing for `WatchdogSec=`. That is right for a
/// gateway with a core that hangs: it holds clients that nobody serves.
#[derive(Debug)]
pub struct Watchdog {
    /// Half of systemd's patience; none when it does not watch.
    every: Option<Duration>,
    last: Option<Instant>,
    was_healthy: bool,
}

impl Watchdog {
    /// Reads from the environment whether and how often systemd wants to hear something.
    #[allow(clippy::new_without_default)] // reads the environment, which a default should not
    pub fn new() -> Watchdog {
        let period = sd_notify::watchdog_enabled().filter(|period| !period.is_zero());
        Watchdog::every(period.map(|period| period / 2))
    }

    fn every(every: Option<Duration>) -> Watchdog {
        Watchdog {
            every,
            last: None,
            was_healthy: true,
        }
    }

    /// Tells systemd that all is well, when it is time to and `healthy` says so. The control thread
    /// calls this in its tick, however often that is.
    pub fn beat(&mut self, healthy: impl FnOnce() -> bool) {
        if self.is_time(Instant::now(), healthy) {
            send(&[NotifyState::Watchdog]);
        }
    }

    fn is_time(&mut self, now: Instant, healthy: impl FnOnce() -> bool) -> bool {
        let Some(every) = self.every else { return false };
        if self.last.is_some_and(|last| now.duration_since(last) < every) {
            return false;
        }
        let is_healthy = healthy();
        if !is_healthy && self.was_healthy {
            tracing::error!("a core shows no sign of life; the watchdog is not told that all is well");
        }
        self.was_healthy = is_healthy;
        if is_healthy {
            self.last = Some(now);
        }
        is_healthy
    }
}

/// A state is one line a field: a line break in the text would begin another field.
fn one_line(text: &str) -> String {
    text.replace(['\n', '\r', '\0'], " ")
}

fn send(state: &[NotifyState<'_>]) {
    match sd_notify::notify(state) {
        Ok(()) => {}
        // The socket's queue is full: systemd is busy, and the next message tells it anew.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
        Err(error) => tracing::warn!(%error, ?state, "systemd cannot be told"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_stays_one_field() {
        assert_eq!(one_line("bad\nREADY=1"), "bad READY=1");
    }

    #[test]
    fn life_is_shown_when_due_and_only_while_healthy() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut watchdog = Watchdog::every(Some(Duration::from_millis(100)));
        assert!(watchdog.is_time(at(0), || true));
        assert!(!watchdog.is_time(at(99), || panic!("not asked before it is time")));
        assert!(watchdog.is_time(at(100), || true));
        assert!(!watchdog.is_time(at(200), || false));
        assert!(
            watchdog.is_time(at(210), || true),
            "told at once when it recovers"
        );
    }

    #[test]
    fn nothing_is_shown_when_nobody_watches() {
        let mut watchdog = Watchdog::every(None);
        assert!(!watchdog.is_time(Instant::now(), || panic!("not asked")));
    }
}
