//! The account of one accepted request: from its admission to its one ledger record.

use std::{cell::Cell, net::IpAddr, rc::Rc, sync::Arc};

use crate::{
    config::schema::OnDisconnect,
    core::Core,
    dialect::{
        Api, Finish, Tier, Usage,
        estimate::Calibration,
        tokens::{self, Prompt, Vocabulary},
    },
    fleet::{Endpoint, Target},
    ledger::{
        frame_bytes_max,
        prices::Price,
        record::{Flags, Outcome, Record, RequestId},
    },
    net::clock,
    quota::{Amounts, Denied, Reservation, reservation::Exhausted},
    serve::{keys::Key, snapshot::Model},
    telemetry::{access::AccessEntry, clients::Event},
};

/// Closes itself exactly once: by [`Account::settle`], or, where a request ends in no other way, when it is
/// dropped.
pub struct Account {
    core: Rc<Core>,
    reservation: Option<Reservation>,
    record: Record,
    /// Room that is kept for the record.
    record_bytes_max: u32,
    started_ns: u64,
    /// When the request had been sent upstream, for the gateway's own share of the time.
    dispatched_ns: u64,
    client: IpAddr,
    /// Input tokens as they were estimated, for a request whose provider tells none.
    input_estimated: u64,
    /// The tier that was asked for, for a request whose provider tells none.
    tier: Tier,
    /// A sample of the request, where its tokens can be counted.
    prompt: Option<Box<Prompt>>,
    error: Option<&'static str>,
    /// See [`Account::denied`].
    denied: Option<Box<Denied>>,
    /// Who was asked last, as far as the books care.
    target: Option<Asked>,
    /// Bytes of generated text that were seen, as JSON has it; 0 where nobody looked.
    text_bytes: u64,
    /// [`Account::drains`] for somebody who cannot ask while the account is lent out.
    drains_now: Option<Rc<Cell<bool>>>,
}

/// See [`Account::target`].
struct Asked {
    price: Option<Arc<Price>>,
    calibration: Arc<Calibration>,
    vocabulary: Option<Vocabulary>,
    on_disconnect: OnDisconnect,
}

/// Bytes that the record of a request takes at most, whichever of the model's targets answers it.
pub fn record_bytes_max(key: &Key, model: &Model, marks: &Marks) -> usize {
    let names = [
        &key.name,
        &key.team,
        &key.organization,
        &model.name,
        &marks.user,
        &marks.tags,
    ];
    let own: usize = names.iter().map(|name| name.len()).sum();
    frame_bytes_max(own + model.names_bytes_max)
}

/// What a client says of its request for the books: the end user, its tags, and the service tier that it asks for.
pub struct Marks {
    pub user: Arc<str>,
    pub tags: Arc<str>,
    pub tier: Tier,
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
        body: &[u8],
        marks: Marks,
        reservation: Reservation,
    ) -> Account {
        core.telemetry.counters().requests.inc();
        core.accounts_open.set(core.accounts_open.get() + 1);
        let record_bytes_max = record_bytes_max(key, model, &marks);
        core.accounts_bytes
            .set(core.accounts_bytes.get() + record_bytes_max);
        let empty: Arc<str> = core.empty.clone();
        let record = Record {
            time_unix_ms: id.unix_ms(),
            id,
            key: key.name.clone(),
            team: key.team.clone(),
            user: marks.user,
            organization: key.organization.clone(),
            model: model.name.clone(),
            provider: empty.clone(),
            upstream_model: empty.clone(),
            endpoint: empty,
            tags: marks.tags,
            api,
            outcome: Outcome::Complete,
            finish: Finish::Unknown,
            flags: Flags::default(),
            status: 0,
            attempts: 0,
            fallback: 0,
            usage: Usage::default(),
            cost: None,
            ttft_us: 0,
            duration_us: 0,
            bytes_in: body.len() as u64,
            bytes_out: 0,
        };
        Account {
            core: core.clone(),
            reservation: Some(reservation),
            record,
            record_bytes_max: record_bytes_max as u32,
            started_ns,
            dispatched_ns: 0,
            client,
            input_estimated,
            tier: marks.tier,
            prompt: model
                .has_vocabulary()
                .then(|| Prompt::of(body))
                .flatten()
                .map(Box::new),
            error: None,
            denied: None,
            target: None,
            text_bytes: 0,
            drains_now: None,
        }
    }

    /// Notes who is asked; `fallback` is the target's place among those that are tried.
    pub fn target(&mut self, target: &Target, endpoint: &Endpoint, attempt: usize, fallback: usize) {
        self.record.attempts = self.record.attempts.saturating_add(1);
        if attempt > 0 {
            self.record.flags.set(Flags::RETRIED);
            self.core.telemetry.counters().upstream_retries.inc();
        }
        self.answered_by(target, endpoint, fallback);
    }

    /// Notes who answered, where that is not who was asked last.
    pub fn answered_by(&mut self, target: &Target, endpoint: &Endpoint, fallback: usize) {
        self.record.provider = target.provider.name.clone();
        self.record.upstream_model = target.model.clone();
        self.record.endpoint = endpoint.name.clone();
        self.record.fallback = u8::try_from(fallback).unwrap_or(u8::MAX);
        if fallback > 0 {
            self.record.flags.set(Flags::FALLBACK);
        }
        self.target = Some(Asked {
            price: target.tariff.at(self.record.time_unix_ms).cloned(),
            calibration: target.calibration.clone(),
            vocabulary: target.vocabulary,
            on_disconnect: target.provider.on_disconnect,
        });
        if let Some(drains_now) = &self.drains_now {
            drains_now.set(self.drains());
        }
    }

    /// Reserves what limits of a provider ask for, before the request is sent there.
    ///
    /// # Errors
    /// They have nothing left: another target is to be tried.
    pub fn reserve_for(&mut self, target: &Target) -> Result<(), Box<Denied>> {
        match &mut self.reservation {
            Some(reservation) => reservation.choose_provider(&target.provider.name),
            None => Ok(()),
        }
    }

    /// Output tokens that a stream may deliver before [`Account::extend`] is to be asked.
    pub fn output_allowed(&self) -> u64 {
        self.reservation
            .as_ref()
            .map_or(u64::MAX, Reservation::output_allowed)
    }

    /// Whether the client named the output limit itself.
    pub fn output_is_explicit(&self) -> bool {
        self.reservation
            .as_ref()
            .is_some_and(Reservation::output_is_explicit)
    }

    /// Takes more for a stream that has delivered more than is reserved; the tokens that it may deliver then.
    ///
    /// # Errors
    /// Nothing is left.
    pub fn extend(&mut self, delivered: u64) -> Result<u64, Exhausted> {
        match &mut self.reservation {
            Some(reservation) => reservation
                .extend(delivered)
                .map(|()| reservation.output_allowed()),
            None => Ok(u64::MAX),
        }
    }

    /// Notes that a limit ended the answer.
    pub fn cut(&mut self) {
        self.record.flags.set(Flags::CUT);
        self.core.telemetry.counters().limit_cuts.inc();
    }

    /// Notes that the request is on its way.
    pub fn dispatched(&mut self) {
        self.dispatched_ns = clock::monotonic_ns();
        if let Some(reservation) = &mut self.reservation {
            reservation.sent();
        }
    }

    /// Notes that the request did not reach who was asked, after [`Account::dispatched`].
    pub fn unsent(&mut self) {
        self.dispatched_ns = 0;
        if let Some(reservation) = &mut self.reservation {
            reservation.unsent();
        }
    }

    /// Notes that who was asked has declined, and another is asked: nobody works on the request.
    pub fn declined(&mut self) {
        self.dispatched_ns = 0;
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

    /// The request's id as text, and when it began, milliseconds of the Unix clock.
    pub fn id(&self) -> (String, u64) {
        let id = self.record.id.hex();
        (
            String::from_utf8_lossy(&id).into_owned(),
            self.record.time_unix_ms,
        )
    }

    /// The virtual model.
    pub fn model(&self) -> &str {
        &self.record.model
    }

    /// Gives back all that is reserved: a limit refuses the request after all. Its record is still to be written.
    pub fn denied(&mut self, denied: Box<Denied>) {
        if let Some(reservation) = &mut self.reservation {
            reservation.release();
        }
        self.denied = Some(denied);
    }

    /// The limit that refused it after all.
    pub fn take_denied(&mut self) -> Option<Box<Denied>> {
        self.denied.take()
    }

    /// Notes why the model stopped.
    pub fn finish(&mut self, finish: Finish) {
        self.record.finish = finish;
    }

    /// Notes how much generated text was seen, bytes as JSON has it.
    pub fn text(&mut self, bytes: u64) {
        self.text_bytes = bytes;
    }

    /// Whether this answer's text is to be looked at for [`Account::text`]: some answers teach as much as all, and to find
    /// their text costs as much as to find their usage.
    pub fn teaches(&self) -> bool {
        const ONE_IN: u64 = 8;
        let asked = self.target.as_ref();
        asked.is_some_and(|asked| asked.calibration.is_untaught()) || self.core.chance(ONE_IN) == 0
    }

    /// Sets a flag of the record.
    pub fn flag(&mut self, flag: Flags) {
        self.record.flags.set(flag);
    }

    /// Whether the rest of the answer is to be read when the client hangs up.
    pub fn drains(&self) -> bool {
        let asked = self.target.as_ref();
        asked.is_some_and(|asked| asked.on_disconnect == OnDisconnect::Drain)
    }

    /// What [`Account::drains`] says from now on, while targets are tried.
    pub fn watch_drains(&mut self) -> Rc<Cell<bool>> {
        let drains = Rc::new(Cell::new(self.drains()));
        self.drains_now = Some(drains.clone());
        drains
    }

    /// How many bytes make a token of the model that was asked; `None` before one was.
    pub fn calibration(&self) -> Option<Arc<Calibration>> {
        self.target.as_ref().map(|asked| asked.calibration.clone())
    }

    /// What is asked for.
    pub fn api(&self) -> Api {
        self.record.api
    }

    /// Whether the answer's tokens can be counted, when its text is kept.
    pub fn counts_tokens(&self) -> bool {
        let asked = self.target.as_ref();
        asked.is_some_and(|asked| asked.vocabulary.is_some())
    }

    /// Input tokens as they are estimated: counted where that is possible, else by what the model has taught that was asked,
    /// else as at the beginning.
    pub fn input_estimated(&self) -> u64 {
        let bytes = self.record.bytes_in;
        let Some(asked) = &self.target else {
            return self.input_estimated;
        };
        if let Some(tokens) = self.input_counted(asked) {
            asked.calibration.learn_input(bytes, tokens);
            return tokens;
        }
        asked.calibration.input_tokens(bytes)
    }

    fn input_counted(&self, asked: &Asked) -> Option<u64> {
        let tokenizer = asked.vocabulary?.tokenizer()?;
        let prompt = self.prompt.as_ref()?;
        let may = self.core.may_tokenize(prompt.sample_bytes());
        may.then(|| prompt.tokens(tokenizer)).filter(|&tokens| tokens > 0)
    }

    /// Output tokens of a text of which `sample` was kept, both as JSON has them, where they can be counted.
    pub fn output_counted(&self, sample: &[u8], text_bytes: u64) -> Option<u64> {
        let asked = self.target.as_ref()?;
        let tokenizer = asked.vocabulary?.tokenizer()?;
        if sample.is_empty() || !self.core.may_tokenize(sample.len()) {
            return None;
        }
        let tokens = tokens::text_tokens(tokenizer, sample, text_bytes);
        asked.calibration.learn_output(text_bytes, tokens);
        Some(tokens)
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
    pub fn settle(&mut self, outcome: Outcome, mut usage: Usage, estimated: bool) {
        let Some(reservation) = self.reservation.take() else {
            return;
        };
        let now_ns = clock::monotonic_ns();
        self.record.outcome = outcome;
        if estimated {
            usage.tier = self.tier;
        }
        self.record.usage = usage;
        if estimated {
            self.record.flags.set(Flags::ESTIMATED);
        } else {
            self.learn(&usage);
        }
        if usage.clamped {
            self.record.flags.set(Flags::CLAMPED);
        }
        let failed = matches!(outcome, Outcome::UpstreamFailed | Outcome::TimedOut);
        if failed || !self.record.provider.is_empty() && self.record.status >= 400 {
            self.record.flags.set(Flags::UPSTREAM_ERROR);
        }
        self.record.cost = self.cost(&usage);
        if self.record.cost.is_none() {
            self.record.flags.set(Flags::UNPRICED);
        }
        self.record.duration_us = (now_ns - self.started_ns) / 1000;
        reservation.settle(self.amounts(&usage));
        self.core.append(&self.record);
        self.count(estimated);
    }

    /// What limits count of a usage, at the price of the target that answered.
    fn amounts(&self, usage: &Usage) -> Amounts {
        Amounts {
            input: usage.prompt,
            output: usage.completion,
            nano_usd: self.cost(usage).unwrap_or_default(),
        }
    }

    /// What a request cost: nothing where nothing was used, `None` where nobody knows the price.
    fn cost(&self, usage: &Usage) -> Option<u64> {
        if usage.total() == 0 {
            return Some(0);
        }
        let price = self.target.as_ref()?.price.as_ref()?;
        Some(price.cost(usage))
    }

    /// Learns the ratio of bytes to tokens from what the provider told.
    fn learn(&self, usage: &Usage) {
        let Some(asked) = &self.target else { return };
        asked.calibration.learn_input(self.record.bytes_in, usage.prompt);
        if self.text_bytes > 0 && usage.reasoning == 0 {
            asked.calibration.learn_output(self.text_bytes, usage.completion);
        }
    }

    fn count(&self, estimated: bool) {
        let record = &self.record;
        let telemetry = &self.core.telemetry;
        let counters = telemetry.counters();
        counters.tokens_prompt.add(record.usage.prompt);
        counters.tokens_cached.add(record.usage.cached);
        counters.tokens_completion.add(record.usage.completion);
        counters.usage_estimated.add(estimated.into());
        counters.usage_clamped.add(record.usage.clamped.into());
        counters.unpriced.add(record.cost.is_none().into());
        counters.cost_nano_usd.add(record.cost.unwrap_or(0));
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
            attempts: self.record.attempts,
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
                prompt: self.input_estimated(),
                ..Usage::default()
            };
            self.settle(Outcome::Stopped, usage, true);
        }
        self.core.accounts_open.set(self.core.accounts_open.get() - 1);
        let others = self.core.accounts_bytes.get() - self.record_bytes_max as usize;
        self.core.accounts_bytes.set(others);
        self.core.telemetry.counters().response(self.record.status);
        self.log();
    }
}
