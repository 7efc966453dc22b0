//! Tells systemd how the service is: ready, reloading, stopping, alive (sd_notify(3)).
//!
//! Not run by systemd (`$NOTIFY_SOCKET` unset), everything here does nothing.

use std::{io, time::Duration};

use sd_notify::NotifyState;

/// The service is up: its listeners accept. `status` is what `systemctl status` shows.
pub fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(&one_line(status))]);
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
pub fn stopping(status: &str) {
    send(&[NotifyState::Stopping, NotifyState::Status(&one_line(status))]);
}

/// Changes what `systemctl status` shows.
pub fn status(status: &str) {
    send(&[NotifyState::Status(&one_line(status))]);
}

/// How long systemd waits for a sign of life before it restarts the service (`WatchdogSec=`); none
/// when it does not watch.
pub fn watchdog_period() -> Option<Duration> {
    sd_notify::watchdog_enabled().filter(|period| !period.is_zero())
}

/// Tells systemd twice a period that the service is alive, as long as `healthy` says so. Returns at
/// once when systemd does not watch; else runs until dropped.
///
/// `healthy` says whether every core has beaten lately. When one has not, nothing is sent, and if
/// that lasts systemd restarts the service: a core that hangs holds clients that nobody serves.
pub async fn watchdog(healthy: impl Fn() -> bool) {
    if let Some(period) = watchdog_period() {
        watch(period / 2, healthy, || send(&[NotifyState::Watchdog])).await;
    }
}

async fn watch(every: Duration, healthy: impl Fn() -> bool, alive: impl Fn()) {
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut was_healthy = true;
    loop {
        ticks.tick().await;
        let is_healthy = healthy();
        if is_healthy {
            alive();
        } else if was_healthy {
            tracing::error!("a core shows no sign of life; the watchdog is not told that all is well");
        }
        was_healthy = is_healthy;
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
    use std::cell::Cell;

    use super::*;

    #[test]
    fn a_status_stays_one_field() {
        assert_eq!(one_line("bad\nREADY=1"), "bad READY=1");
    }

    #[test]
    fn life_is_shown_only_while_healthy() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("runtime");
        let (asked, shown) = (Cell::new(0), Cell::new(0));
        runtime.block_on(async {
            let healthy = || {
                asked.set(asked.get() + 1);
                asked.get() % 2 == 1
            };
            let done = async {
                while asked.get() < 6 {
                    tokio::task::yield_now().await;
                }
            };
            tokio::select! {
                () = watch(Duration::from_millis(1), healthy, || shown.set(shown.get() + 1)) => {}
                () = done => {}
            }
        });
        assert_eq!((asked.get(), shown.get()), (6, 3));
    }
}
