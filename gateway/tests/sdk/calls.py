"""What an application does with the openai package, against a gateway. Arguments: base URL, key, unused key with a limit.

Each assertion is about what the application sees; the test that runs this looks at what the upstream saw.
"""

import sys

import openai
from openai import OpenAI

BASE, KEY, LIMITED = sys.argv[1:4]
MESSAGES = [{"role": "user", "content": "hello there"}]
TOKENS = 5
TEXT = "".join(f"t{n} " for n in range(TOKENS))


def client(key=KEY):
    # No second try: the test wants to see the first answer.
    return OpenAI(base_url=f"{BASE}/v1", api_key=key, max_retries=0, timeout=30)


def chat(c):
    answer = c.chat.completions.create(model="fast", messages=MESSAGES)
    assert answer.choices[0].message.content == TEXT, answer
    assert answer.usage.completion_tokens == TOKENS, answer
    assert answer._request_id and len(answer._request_id) == 32, answer._request_id


def chat_stream(c):
    chunks = list(c.chat.completions.create(model="fast", messages=MESSAGES, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == TEXT, text
    assert all(chunk.usage is None for chunk in chunks), chunks
    assert chunks[-1].choices[0].finish_reason == "stop", chunks[-1]


def chat_stream_with_usage(c):
    options = {"include_usage": True}
    stream = c.chat.completions.create(model="fast", messages=MESSAGES, stream=True, stream_options=options)
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert last.choices == [] and last.usage.completion_tokens == TOKENS, last


def chat_stream_helper(c):
    with c.chat.completions.stream(model="fast", messages=MESSAGES) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert text == TEXT == final.choices[0].message.content, text


def completions(c):
    answer = c.completions.create(model="fast", prompt="hello")
    assert answer.choices[0].text == TEXT, answer
    stream = c.completions.create(model="fast", prompt="hello", stream=True)
    text = "".join(choice.text for chunk in stream for choice in chunk.choices)
    assert text == TEXT, text


def embeddings(c):
    answer = c.embeddings.create(model="fast", input="hello")
    assert len(answer.data) == 1 and len(answer.data[0].embedding) == 8, answer


def responses(c):
    answer = c.responses.create(model="fast", input="hello")
    assert answer.output_text == TEXT, answer
    assert answer.usage.output_tokens == TOKENS, answer
    events = list(c.responses.create(model="fast", input="hello", stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == TEXT, text
    assert events[-1].type == "response.completed", events[-1]
    assert events[-1].response.usage.output_tokens == TOKENS, events[-1]


def models(c):
    names = [model.id for model in c.models.list()]
    assert "fast" in names and "broken" in names, names


def expect(kind, call, **wanted):
    try:
        call()
    except kind as error:
        assert type(error) is kind, repr(error)
        for name, value in wanted.items():
            assert getattr(error, name) == value, (name, getattr(error, name), error)
        return error
    raise AssertionError(f"no {kind.__name__}")


def errors(c):
    def ask(c, model="fast", **more):
        return lambda: c.chat.completions.create(model=model, messages=MESSAGES, **more)

    error = expect(openai.AuthenticationError, ask(client("sk-wrong")), status_code=401, code="invalid_api_key")
    assert error.request_id and "sk-wrong" not in str(error), error
    expect(openai.NotFoundError, ask(c, "nobody"), status_code=404, code="model_not_found", param="model")
    expect(openai.PermissionDeniedError, ask(client(LIMITED), "broken"), status_code=403)
    expect(openai.BadRequestError, ask(c, "fast", extra_body={"stream": "yes"}), status_code=400, param="stream")
    ask(client(LIMITED))()
    error = expect(openai.RateLimitError, ask(client(LIMITED)), status_code=429)
    assert int(error.response.headers["retry-after"]) >= 1, error.response.headers
    assert error.response.headers["x-ratelimit-remaining-requests"] == "0", error.response.headers
    expect(openai.InternalServerError, ask(c, "dead"), status_code=502)
    expect(openai.BadRequestError, ask(c, "refusing"), status_code=400)

    def broken():
        for _ in ask(c, "broken", stream=True)():
            pass

    # An `error` event of the upstream, and a stream that the upstream cut: both are seen, none looks like an end.
    expect(openai.APIError, broken)
    seen = []

    def cut():
        for chunk in ask(c, "cut", stream=True)():
            seen.append(chunk)

    expect(openai.APIError, cut, code="upstream_cut")
    assert len(seen) >= 2, seen


def kept_alive(c):
    # Its pool hands the same connection to one call after the other, also after errors and streams.
    for _ in range(5):
        chat(c)
        chat_stream(c)
        expect(openai.NotFoundError, lambda: c.chat.completions.create(model="no", messages=MESSAGES))


def left_early(c):
    # An application that stops reading in the middle.
    stream = c.chat.completions.create(model="endless", messages=MESSAGES, stream=True)
    for number, _ in enumerate(stream):
        if number == 3:
            stream.close()
            break


for call in [
    chat,
    chat_stream,
    chat_stream_with_usage,
    chat_stream_helper,
    completions,
    embeddings,
    responses,
    models,
    errors,
    kept_alive,
    left_early,
]:
    call(client())
    print(f"passed: {call.__name__}")
