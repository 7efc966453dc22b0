//! The gateway's parsers and what must hold for them, without the rest of the gateway.
//!
//! The sources are included by path, not linked: instrumenting the gateway would instrument its
//! TLS, its database and its kernel loader too, and take minutes instead of seconds. It works
//! because the parsers are pure functions over bytes that name nothing but `bounds`.

#[path = "../../gateway/src/bounds.rs"]
#[allow(dead_code)] // The bounds of what is not included here.
mod bounds;
#[path = "../../gateway/src/dialect"]
pub mod dialect {
    //! The JSON walk alone.
    pub mod json;
}
#[path = "../../gateway/src/http/mod.rs"]
pub mod http;

#[path = "../../gateway/tests/parsers/checks.rs"]
pub mod checks;
#[path = "../../gateway/tests/parsers/seeds.rs"]
pub mod seeds;

/// One parser under test.
#[derive(Clone, Copy)]
pub struct Target {
    /// Name on the command line.
    pub name: &'static str,
    /// Panics where the parser does wrong.
    pub check: fn(&[u8]),
    /// Inputs to start from.
    pub seeds: &'static [&'static [u8]],
    /// Words to put into them.
    pub words: &'static [&'static [u8]],
}

/// All targets.
pub const TARGETS: [Target; 6] = [
    Target {
        name: "head",
        check: checks::head,
        seeds: seeds::HEADS,
        words: seeds::HEAD_WORDS,
    },
    Target {
        name: "chunked",
        check: checks::chunked,
        seeds: seeds::BODIES,
        words: seeds::BODY_WORDS,
    },
    Target {
        name: "sse",
        check: checks::events,
        seeds: seeds::STREAMS,
        words: seeds::STREAM_WORDS,
    },
    Target {
        name: "proxy",
        check: checks::proxy,
        seeds: seeds::PROXIES,
        words: seeds::PROXY_WORDS,
    },
    Target {
        name: "forwarded",
        check: checks::forwarded,
        seeds: seeds::FORWARDED,
        words: seeds::FORWARDED_WORDS,
    },
    Target {
        name: "json",
        check: checks::document,
        seeds: seeds::DOCUMENTS,
        words: seeds::DOCUMENT_WORDS,
    },
];
