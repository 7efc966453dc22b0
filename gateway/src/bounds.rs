//! Every fixed bound of the program, with its unit and its reason.
//!
//! What an operator may want to change is in the configuration and has its default in
//! [`crate::config`]; what stands here is a property of the program.

use std::time::Duration;

/// Longest request or response head, bytes. Heads of LLM clients are under 2 KiB; 32 KiB leaves
/// room for large cookies and tracing headers and still bounds what an idle connection may hold.
pub const HEAD_BYTES_MAX: usize = 32 * 1024;

/// Most header fields in one head. The same bound as nginx' and hyper's default order.
pub const HEADERS_MAX: usize = 100;

/// Longest chunk-size line of a chunked body, bytes, extensions included (RFC 9112, section 7.1.1
/// leaves the bound to us).
pub const CHUNK_LINE_BYTES_MAX: usize = 256;

/// Longest trailer section of a chunked body, bytes. Trailers are read and dropped.
pub const TRAILER_BYTES_MAX: usize = 8 * 1024;

/// Longest server-sent event that is held to be looked at, bytes. A longer one is passed on
/// unseen except for its tail. `response.completed` of the Responses API carries a whole answer,
/// which for long ones is some hundred KiB.
pub const EVENT_BYTES_MAX: usize = 1024 * 1024;

/// Longest answer body without streaming that is kept to read its usage, bytes; a longer one is
/// relayed and its usage looked for in its tail.
pub const ANSWER_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Most tokens, input or output, that a provider is believed to have used for one request: a thousand times what the
/// longest contexts hold. More is a fault of the provider's, which must not put a key in debt for years.
pub const USAGE_TOKENS_MAX: u64 = 1 << 30;

/// Size of a core's scratch buffer for receives, bytes. One read of a flooding stream fills it;
/// every stream of the core uses the same one in turn.
pub const SCRATCH_BYTES: usize = 64 * 1024;

/// Deepest nesting of JSON that is walked. Beyond it the body is refused.
pub const JSON_DEPTH_MAX: usize = 128;

/// Longest name in the configuration (keys, models, providers, teams), bytes. It bounds a ledger
/// record.
pub const NAME_BYTES_MAX: usize = 128;

/// Size of one journal segment, bytes.
pub const SEGMENT_BYTES: usize = 4 * 1024 * 1024;

/// Largest ledger record, bytes: the fixed part, eight names of [`NAME_BYTES_MAX`] and the tags.
pub const RECORD_BYTES_MAX: usize = 1472;

/// Longest list of tags of a request (`x-gateway-tags`), bytes, as it stands in its record.
pub const TAGS_BYTES_MAX: usize = 255;

/// Most tags of one request.
pub const TAGS_MAX: usize = 16;

/// Rows of one day in the rollup. Users come from outside: beyond it they are summed up as `other`.
pub const ROLLUP_ROWS_PER_DAY_MAX: u64 = 100_000;

/// What is read on of an answer whose client has hung up (`on_disconnect: drain`), bytes: a whole answer with all its
/// events. Beyond it the upstream is cancelled and what was used is estimated.
pub const DRAIN_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Longest time that such an answer is read on for.
pub const DRAIN_TIME_MAX: Duration = Duration::from_secs(60);

/// Text whose tokens a core counts with a vocabulary within one tick (50 ms), bytes: at 40 to 100 ns a byte some 3 % of
/// its time. What ends beyond it is estimated by bytes.
pub const TOKENIZED_BYTES_PER_TICK: usize = 16 * 1024;

/// Journal segments that wait, mapped, for a core: with records of 256 bytes some 30,000 requests,
/// time enough to make the next one.
pub const SEGMENTS_READY: usize = 2;

/// Journal segments of a core that are in use or not yet in the rollup. Beyond it (the database is
/// stuck) no new ones are made, and the gateway refuses work when the last is full.
pub const SEGMENTS_LIVE_MAX: usize = 64;

/// Pairs of key and model that the ledger's metrics tell apart: each is a dozen time series. Later
/// ones are counted as `other`.
pub const USAGE_LABELS_MAX: usize = 4096;

/// Entries of the access log that a core may be ahead of its writer. Beyond it entries are dropped
/// and counted.
pub const ACCESS_LOG_QUEUE: usize = 8192;

/// Client addresses whose refusals are watched at the same time. 8 bytes each.
pub const REFUSAL_SLOTS: usize = 64 * 1024;

/// Requests to upstreams made for one client request, the first included.
pub const ATTEMPTS_MAX: usize = 3;

/// Idle connections that a core keeps to one endpoint.
pub const POOL_IDLE_MAX: usize = 256;

/// Shared levels in use on one host at most. Each takes some 250 bytes here and 200 in the store; the control thread
/// looks at all of them in each round, some 2 ms.
pub const LEASED_LEVELS_MAX: usize = 65_536;

/// So many of them may exist before subjects that clients choose (users, addresses) get none of their own: a flood of
/// such leaves room for keys and teams.
pub const LEASED_GUESTS_MAX: usize = LEASED_LEVELS_MAX / 4 * 3;

/// Levels beyond them on which subjects without a place are counted together, one for each policy.
pub const LEASED_OVERFLOWS_MAX: usize = 4_096;

/// Maps that they are kept in: adding one copies 64 entries at most on average.
pub const LEASED_SHARDS: usize = 1_024;

/// Alerts of budgets that wait to be told. Beyond it the oldest are forgotten: each budget alerts at most eight times a
/// period, so that is a storm of which nobody reads the end.
pub const ALERTS_WAITING_MAX: usize = 1024;
/// Longest PROXY header, bytes. Version 1 has at most 107; version 2 has 232 with the longest addresses, and leaves
/// the rest to extensions, of which the largest in use is a client certificate's name.
pub const PROXY_HEADER_BYTES_MAX: usize = 4 * 1024;

/// Most proxies that a request is followed back over. More than any real path has; a longer list is a mistake or a trick.
pub const FORWARDED_HOPS_MAX: usize = 32;

/// Clients that user space turns away at the same time: as many as the kernel's map of blocks. 16 bytes each.
pub const BLOCK_SLOTS: usize = 64 * 1024;

/// Networks blocked by hand at the same time. Every request of a time in which somebody is blocked looks at all of them.
pub const BLOCK_NETS_MAX: usize = 256;

/// Offenders whose earlier drops are remembered, some 100 bytes each.
pub const OFFENDERS_MAX: usize = 64 * 1024;

/// Clients that a core counts one by one for `gateway top`; 88 bytes each.
pub const CLIENT_SLOTS: usize = 2048;
