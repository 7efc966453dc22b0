//! How a run goes, told once a second while it does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use gateway_bench::load::{Options, Progress};

/// Does `run` with `options`, and tells on standard error how it goes where that is `wanted`.
pub fn watched<T>(wanted: bool, options: &mut Options, run: impl FnOnce(&Options) -> T) -> T {
    if !wanted {
        return run(options);
    }
    let progress = Arc::<Progress>::default();
    options.progress = Some(progress.clone());
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| tell(&progress, &over));
        let result = run(options);
        over.store(true, Relaxed);
        watcher.thread().unpark();
        result
    })
}

fn tell(progress: &Progress, over: &AtomicBool) {
    let start = Instant::now();
    let (mut requests_before, mut events_before) = (0, 0);
    while !over.load(Relaxed) {
        std::thread::park_timeout(Duration::from_secs(1));
        let (requests, events) = (progress.requests.load(Relaxed), progress.events.load(Relaxed));
        eprintln!(
            "{:>6.0} s  {:>6} under way  {:>8}/s requests  {:>9}/s events  p50 {:>9.2} ms  p99 {:>9.2} ms  {} failed",
            start.elapsed().as_secs_f64(),
            progress.active.load(Relaxed),
            requests - requests_before,
            events - events_before,
            progress.p50_us.load(Relaxed) as f64 / 1e3,
            progress.p99_us.load(Relaxed) as f64 / 1e3,
            progress.failures.load(Relaxed)
        );
        (requests_before, events_before) = (requests, events);
    }
}
