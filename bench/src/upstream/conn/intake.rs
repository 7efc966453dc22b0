//! The way in: from received bytes to a whole request, and on to what answers it.

use super::super::answer::{Answer, put_error, put_json};
use super::super::behaviour::Stale;
use super::super::limits::unix_s;
use super::super::request::{self, Api, MODELS, Route};
use super::super::stats::count;
use super::{Body, Connection, Context, Ending, Phase, Wait, nanoseconds};
use crate::http::{Dechunker, Fields, HEAD_BYTES_MAX, HEADERS_MAX, head_end};

/// Bytes of a request's body that are taken.
const BODY_BYTES_MAX: usize = 256 * 1024 * 1024;
/// Bytes that a peer may send ahead while its answer is under way.
const PIPELINED_BYTES_MAX: usize = 1024 * 1024;

impl Connection {
    /// Puts `received` bytes of the input where they belong; false where the peer sends what it may not.
    pub(super) fn take(&mut self, received: usize, context: &mut Context<'_>) -> bool {
        let input = &context.input[..received];
        match &mut self.phase {
            // The bulk of a large body goes straight to its place.
            Phase::Body(Body {
                length,
                dechunker: None,
                ..
            }) if self.received.is_empty() => {
                let wanted = (*length as usize - self.body.len()).min(input.len());
                self.body.extend_from_slice(&input[..wanted]);
                self.received.extend_from_slice(&input[wanted..]);
                true
            }
            Phase::Head | Phase::Body(_) => {
                self.received.extend_from_slice(input);
                true
            }
            _ => {
                self.received.extend_from_slice(input);
                self.received.len() <= PIPELINED_BYTES_MAX
            }
        }
    }

    pub(super) fn read_head(&mut self, context: &mut Context<'_>) -> Option<Wait> {
        if self.received.is_empty() {
            return Some(Wait::Socket);
        }
        if self.stale == Stale::OnRequest {
            self.socket.end();
            return Some(Wait::Close);
        }
        let Some(head_bytes) = head_end(&self.received) else {
            return if self.received.len() > HEAD_BYTES_MAX {
                self.refuse("head too large", context)
            } else {
                Some(Wait::Socket)
            };
        };
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut request = httparse::Request::new(&mut headers);
        let fields = match request.parse(&self.received[..head_bytes]) {
            Ok(httparse::Status::Complete(_)) => Fields::read(request.headers),
            _ => None,
        };
        let Some(fields) =
            fields.filter(|fields| fields.content_length.unwrap_or(0) <= BODY_BYTES_MAX as u64)
        else {
            return self.refuse("malformed head", context);
        };
        if fields.expect_continue {
            self.out.extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
        }
        self.close_asked = fields.close;
        let length = if fields.chunked {
            0
        } else {
            fields.content_length.unwrap_or(0)
        };
        self.head.clear();
        self.head.extend_from_slice(&self.received[..head_bytes]);
        self.received.drain(..head_bytes);
        self.body.clear();
        let direct = (length as usize).min(self.received.len());
        if !fields.chunked {
            self.body.extend(self.received.drain(..direct));
        }
        let dechunker = fields.chunked.then(Dechunker::default);
        self.phase = Phase::Body(Body {
            head_bytes,
            length,
            dechunker,
        });
        None
    }

    pub(super) fn read_body(&mut self, context: &mut Context<'_>) -> Option<Wait> {
        let Phase::Body(body) = &mut self.phase else {
            return None;
        };
        let done = match &mut body.dechunker {
            None => self.body.len() as u64 == body.length,
            Some(dechunker) => {
                let mut at = 0;
                while at < self.received.len() && !dechunker.is_done() {
                    let Ok((eaten, data)) = dechunker.step(&self.received[at..]) else {
                        return self.refuse("malformed chunk", context);
                    };
                    self.body.extend_from_slice(data.unwrap_or_default());
                    at += eaten;
                }
                let done = dechunker.is_done();
                self.received.drain(..at);
                done
            }
        };
        if self.body.len() > BODY_BYTES_MAX {
            return self.refuse("body too large", context);
        }
        if !done {
            return Some(Wait::Socket);
        }
        let head_bytes = body.head_bytes;
        self.dispatch(head_bytes, context);
        None
    }

    /// Answers 400 and closes.
    fn refuse(&mut self, reason: &str, context: &Context<'_>) -> Option<Wait> {
        count(&context.shared.counters.bad_requests);
        self.received.clear();
        put_error(&mut self.out, 400, reason, 0, true);
        self.phase = Phase::Last(Ending {
            close: true,
            ..Ending::PLAIN
        });
        None
    }

    /// Sends a whole request to what answers it.
    fn dispatch(&mut self, head_bytes: usize, context: &mut Context<'_>) {
        self.phase = Phase::Last(Ending::PLAIN);
        let line_end = memchr::memchr(b'\r', &self.head[..head_bytes]).unwrap_or_default();
        // The head is given away below, while the target is still looked at.
        let line = String::from_utf8_lossy(&self.head[..line_end]).into_owned();
        let mut words = line.split(' ');
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        match Route::of(method, target) {
            Route::SetModel => {
                let words = String::from_utf8_lossy(&self.body);
                match context.shared.set_model(&target[MODELS.len()..], &words) {
                    Ok(()) => put_json(&mut self.out, 200, "", "{}", false),
                    Err(error) => put_error(&mut self.out, 400, &error, 0, false),
                }
            }
            Route::Call(api) => {
                count(&context.shared.counters.requests_by_endpoint[self.endpoint]);
                let named = request::of_path(target);
                self.call(api, named, context);
                context.shared.last.swap(&mut self.head, &mut self.body);
            }
            Route::Models => {
                let models: Vec<serde_json::Value> = context
                    .shared
                    .model_names()
                    .into_iter()
                    .map(|id| serde_json::json!({ "id": id, "object": "model", "created": 0, "owned_by": "sim" }))
                    .collect();
                let body = serde_json::json!({ "object": "list", "data": models }).to_string();
                put_json(&mut self.out, 200, "", &body, false);
            }
            Route::Stats => {
                let stats = serde_json::to_string(&context.shared.counters.read()).unwrap_or_default();
                put_json(&mut self.out, 200, "", &stats, false);
            }
            Route::Last => {
                let last = context.shared.last.read().to_json().to_string();
                put_json(&mut self.out, 200, "", &last, false);
            }
            Route::Unknown => put_error(&mut self.out, 404, "no such path in the simulator", 0, false),
        }
    }

    /// `named` is what the path says: the model, and whether to stream.
    fn call(&mut self, api: Api, named: Option<(String, bool)>, context: &mut Context<'_>) {
        let counters = &context.shared.counters;
        let mut call = match request::parse(&self.body) {
            Ok(call) => call,
            Err(error) => {
                count(&counters.bad_requests);
                return put_error(&mut self.out, 400, &error.to_string(), 0, false);
            }
        };
        if let Some((model, stream)) = named {
            (call.model, call.stream) = (model.into(), stream);
        }
        let mut behaviour = match context.shared.behaviour_of(&call.model) {
            Ok(behaviour) => behaviour,
            Err(error) => {
                count(&counters.bad_requests);
                return put_error(&mut self.out, 400, &error, 0, false);
            }
        };
        behaviour.draw(context.random);
        context.shared.play(&mut behaviour);
        if behaviour.cache_blocks > 0 || !behaviour.prefill.is_zero() {
            let prompt = request::prompt_bytes(&self.body);
            let cached = context
                .shared
                .provider
                .look_up(self.endpoint, &prompt, &behaviour)
                .min(call.prompt_tokens);
            behaviour.cached_tokens = behaviour.cached_tokens.max(cached);
            behaviour.first += behaviour
                .prefill
                .mul_f64((call.prompt_tokens - cached) as f64 / 1000.0);
        }
        let tokens =
            call.prompt_tokens + u64::from(behaviour.tokens.min(call.tokens_max.unwrap_or(u32::MAX)));
        let verdict = context.shared.provider.admit(
            self.endpoint,
            &call.model,
            api,
            behaviour.limits,
            tokens,
            context.now_ns,
        );
        let permit = match verdict.outcome {
            Ok(permit) => permit,
            Err(retry_s) => {
                (behaviour.status, behaviour.retry_after_s) = (429, retry_s);
                None
            }
        };
        *context.next_id += 1;
        let mut wait = behaviour.slow_head;
        let mut answer = Box::new(Answer::new(api, &call, behaviour, *context.next_id, unix_s()));
        answer.limit_fields = verdict.fields;
        answer.permit = permit;
        if answer.stream {
            count(&counters.streams_total);
            count(&counters.streams_open);
        } else if answer.behaviour.status == 200 {
            wait += answer.behaviour.first;
        }
        self.phase = Phase::Delay {
            until_ns: context.now_ns + nanoseconds(wait),
            answer,
        };
    }
}
