//! Waiting for the first of two futures.

use std::{
    future::Future,
    pin::{Pin, pin},
    task::Poll,
};

/// Which of two futures was first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Either<A, B> {
    /// The first one, also when both were ready.
    First(A),
    /// The second one.
    Second(B),
}

/// Waits for the first of two futures and drops the other. Only for waits that lose nothing when
/// dropped: readiness, timers, signals.
pub async fn race<A: Future, B: Future>(a: A, b: B) -> Either<A::Output, B::Output> {
    race_pinned(pin!(a), pin!(b)).await
}

/// As [`race`], on futures that live on: the one that was not first can be waited for again.
pub async fn race_pinned<A: Future, B: Future>(
    mut a: Pin<&mut A>,
    mut b: Pin<&mut B>,
) -> Either<A::Output, B::Output> {
    std::future::poll_fn(move |cx| {
        if let Poll::Ready(value) = a.as_mut().poll(cx) {
            return Poll::Ready(Either::First(value));
        }
        b.as_mut().poll(cx).map(Either::Second)
    })
    .await
}
