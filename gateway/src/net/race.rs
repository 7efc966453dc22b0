//! Waiting for the first of two futures.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use pin_project_lite::pin_project;

/// Which of two futures was first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Either<A, B> {
    /// The first one, also when both were ready.
    First(A),
    /// The second one.
    Second(B),
}

pin_project! {
    /// See [`race`]. Written out, because an `async fn` would hold each future twice, and races nest.
    pub struct Race<A, B> {
        #[pin]
        a: A,
        #[pin]
        b: B,
    }
}

/// Waits for the first of two futures; the other is dropped with the race. Only for waits that lose nothing when
/// dropped: readiness, timers, signals.
pub fn race<A: Future, B: Future>(a: A, b: B) -> Race<A, B> {
    Race { a, b }
}

impl<A: Future, B: Future> Future for Race<A, B> {
    type Output = Either<A::Output, B::Output>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let race = self.project();
        if let Poll::Ready(value) = race.a.poll(cx) {
            return Poll::Ready(Either::First(value));
        }
        race.b.poll(cx).map(Either::Second)
    }
}
