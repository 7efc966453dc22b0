//! The account of one accepted request: from its admission to its one ledger record.

use std::{net::IpAddr, rc::Rc, sync::Arc};

use crate::{
    core::Core,
    dialect::{Api, Usage},
    fleet::Target,
    ledger::record::{Flags, Outcome, Record, RequestId},
    net::clock,
    quota::Reservation,
    serve::{keys::Key, snapshot::Model},
    telemetry::{access::AccessEntry, clients::Event},
};

/// Closes itself exactly once: by [`Account::settle`], or, where a request ends in no other way, when it is
/// dropped.
pub struct Account {
    core: Rc<Core>,
    reservation: Option<Reservation>,
    record: Record,
    started_ns: u64,
    /// When the request had been sent upstream, for the gateway's own share of the time.
    dispatched_ns: u64,
    client: IpAddr,
    /// Input tokens as they were estimated, for a request whose provider tells none.
    input_estimated: u64,
    error: Option<&'static str>,
    /// Requests made to upstreams.
    attempts: u8,
}

impl Account {
    /// Opens the account of a request that has been admitted.
    #[allow(clippy::too_many_arguments)] // the facts of a request; a builder would only hide them
    pub fn open(
        core: &Rc<Core>,
        id: RequestId,
        started_ns: u64,
        client: IpAddr,
        key: &Arc<Key>,
        model: &Arc<Model>,
        api: Api,
        input_estimated: u64,
        body_bytes: usize,
        reservation: Reservation,
    ) -> Account {
        core.telemetry.counters().requests.inc();
        core.accounts_open.set(core.accounts_open.get() + 1);
        let empty: Arc<str> = core.empty.clone();
        let record = Record {
            time_unix_ms: id.unix_ms(),
            id,
            key: key.name.clone(),
            team: key.team.clone(),
            model: model.name.clone(),
            provider: empty.clone(),
            upstream_model: empty,
            api,
            outcome: Outcome::Complete,
            flags: Flags::default(),
            status: 0,
            usage: Usage::default(),
            ttft_us: 0,
            duration_us: 0,
            bytes_in: body_bytes as u64,
            bytes_out: 0,
        };
        Account {
            core: core.clone(),
            reservation: Some(reservation),
            record,
            started_ns,
            dispatched_ns: 0,
            client,
            input_estimated,
            error: None,
            attempts: 0,
        }
    }

    /// Notes who is asked.
    pub fn target(&mut self, target: &Target, attempt: usize, fallback: bool) {
        self.attempts = self.attempts.saturating_add(1);
        self.record.provider = target.provider.name.clone();
        self.record.upstream_model = target.model.clone();
        if attempt > 0 {
            self.record.flags.set(Flags::RETRIED);
            self.core.telemetry.counters().upstream_retries.inc();
        }
        if fallback {
            self.record.flags.set(Flags::FALLBACK);
        }
    }

    /// Notes that the request is on its way.
    pub fn dispatched(&mut self) {
        self.dispatched_ns = clock::monotonic_ns();
    }

    /// Notes the status that the client is sent, and whether it is a stream.
    pub fn answering(&mut self, status: u16, stream: bool) {
        self.record.status = status;
        if stream {
            self.record.flags.set(Flags::STREAM);
        }
    }

    /// Notes that the first byte of the answer's body has come.
    pub fn first_byte(&mut self, now_ns: u64) {
        if self.record.ttft_us == 0 {
            self.record.ttft_us = ((now_ns - self.started_ns) / 1000).max(1);
        }
    }

    /// Notes bytes of the answer's body that went to the client.
    pub fn sent(&mut self, bytes: usize) {
        self.record.bytes_out += bytes as u64;
    }

    /// Notes the code of the error that the client is told.
    pub fn error(&mut self, code: &'static str) {
        self.error = Some(code);
    }

    /// Notes who answered, where that is not who was asked last.
    pub fn answered_by(&mut self, target: &Target) {
        self.record.provider = target.provider.name.clone();
        self.record.upstream_model = target.model.clone();
    }

    /// What is asked for.
    pub fn api(&self) -> Api {
        self.record.api
    }

    /// Input tokens that were estimated at the beginning.
    pub fn input_estimated(&self) -> u64 {
        self.input_estimated
    }

    /// When the request's head was complete, by the monotonic clock, nanoseconds.
    pub fn started_ns(&self) -> u64 {
        self.started_ns
    }

    /// When the request had been sent upstream, by the monotonic clock, nanoseconds; 0 before.
    pub fn dispatched_ns(&self) -> u64 {
        self.dispatched_ns
    }

    /// Whether the record has been written.
    pub fn is_settled(&self) -> bool {
        self.reservation.is_none()
    }

    /// Closes the account: trues up the limits, writes the record, counts. To be called before the last byte of
    /// the answer leaves. The first call counts.
    pub fn settle(&mut self, outcome: Outcome, usage: Usage, estimated: bool) {
        let Some(reservation) = self.reservation.take() else {
            return;
        };
        let now_ns = clock::monotonic_ns();
        self.record.outcome = outcome;
        self.record.usage = usage;
        if estimated {
            self.record.flags.set(Flags::ESTIMATED);
        }
        self.record.duration_us = (now_ns - self.started_ns) / 1000;
        reservation.settle(usage.total(), now_ns);
        self.core.append(&self.record);
        self.count(estimated);
    }

    fn count(&self, estimated: bool) {
        let record = &self.record;
        let telemetry = &self.core.telemetry;
        let counters = telemetry.counters();
        counters.tokens_prompt.add(record.usage.prompt);
        counters.tokens_cached.add(record.usage.cached);
        counters.tokens_completion.add(record.usage.completion);
        counters.usage_estimated.add(estimated.into());
        match record.outcome {
            Outcome::ClientGone => counters.client_disconnects.inc(),
            Outcome::UpstreamFailed | Outcome::TimedOut => counters.upstream_errors.inc(),
            Outcome::Complete | Outcome::Stopped => {}
        }
        let ended = Event::Ended {
            tokens: record.usage.total(),
            bytes_in: record.bytes_in,
            bytes_out: record.bytes_out,
        };
        telemetry.client(self.client, ended);
        telemetry.record_total_us(record.duration_us);
        if record.ttft_us > 0 {
            telemetry.record_ttft_us(record.ttft_us);
        }
        if self.dispatched_ns > 0 {
            telemetry.record_overhead_us((self.dispatched_ns - self.started_ns) / 1000);
        }
    }

    fn log(&self) {
        if !self.core.telemetry.access_log_on() {
            return;
        }
        let record = &self.record;
        self.core.telemetry.log_access(AccessEntry {
            time_unix_ms: record.time_unix_ms,
            request_id: Some(record.id),
            client: Some(self.client),
            method: "POST".into(),
            path: record.api.path().into(),
            key: Some(record.key.clone()),
            model: Some(record.model.clone()),
            provider: Some(record.provider.clone()),
            upstream_model: Some(record.upstream_model.clone()),
            status: record.status,
            outcome: record.outcome.name(),
            error: self.error,
            stream: record.flags.has(Flags::STREAM),
            estimated: record.flags.has(Flags::ESTIMATED),
            usage: record.usage,
            attempts: self.attempts,
            ttft_us: record.ttft_us,
            duration_us: record.duration_us,
            bytes_in: record.bytes_in,
            bytes_out: record.bytes_out,
        });
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        // Only a request that was given up in the middle gets here unsettled: by the end of the core, or by a panic.
        if !self.is_settled() {
            let usage = Usage {
                prompt: self.input_estimated,
                ..Usage::default()
            };
            self.settle(Outcome::Stopped, usage, true);
        }
        self.core.accounts_open.set(self.core.accounts_open.get() - 1);
        self.core.telemetry.counters().response(self.record.status);
        self.log();
    }
}
