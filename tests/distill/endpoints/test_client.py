"""The client against real HTTP on loopback: what is sent, what comes of it, and what happens when it does not."""

import time

import pytest

from tests.distill.endpoints.scripted import Server, as_event, ask, deltas, replies, sse, teacher, whole


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr("distill.endpoints.work._FIRST_PAUSE", 0.02)


@pytest.mark.parametrize("stream", [True, False])
def test_each_ask_gets_its_reply(stream):
    with Server(lambda r: r.say(f"thought\n</think>\n\n{r.body['seed']}")) as server:
        found = replies(teacher(server, stream=stream), 50)
    assert {reply.text for reply in found.values()} == {f"thought\n</think>\n\n{7 + n}" for n in range(50)}
    assert found["a0"].finish_reason == "stop" and found["a0"].attempts == 1 and found["a0"].endpoint is None
    assert (found["a0"].prompt_tokens, found["a0"].reasoning_tokens + found["a0"].answer_tokens) == (10, 20)
    sent = server.asked[0]
    assert sent.path == "/v1/chat/completions"
    assert {k: sent.body[k] for k in ("model", "temperature", "top_p", "max_tokens", "stream")} == {
        "model": "m", "temperature": 0.6, "top_p": 0.95, "max_tokens": 100, "stream": stream,
    }  # fmt: skip


def test_connections_are_kept():
    ports = set()
    with Server(lambda r: (ports.add(r.handler.client_address), r.say())) as server:
        replies(teacher(endpoints=[{"url": server.url, "concurrency": 2}]), 20)
    assert len(ports) <= 2


@pytest.mark.parametrize("status", [429, 500, 503, 408])
def test_what_a_retry_can_cure_is_tried_again(status):
    def answer(request):
        request.send(status, {"error": {"message": "later"}}) if request.number < 2 else request.say()

    with Server(answer) as server:
        found = replies(teacher(server))["a0"]
    assert (found.finish_reason, found.attempts) == ("stop", 3)


def test_after_all_attempts_it_has_failed_and_says_why():
    with Server(lambda r: r.send(500, {"error": {"message": "out of memory"}})) as server:
        found = replies(teacher(server, attempts=2))["a0"]
    assert (found.finish_reason, found.attempts, found.error) == ("failed", 2, "http_500: out of memory")


def test_a_length_stop_is_an_outcome():
    with Server(lambda r: r.say("and so on", "length")) as server:
        found = replies(teacher(server), [ask()])["a0"]
    assert (found.finish_reason, found.text, found.attempts) == ("length", "and so on", 1)


# Outcomes.


def outcome(answer, asks=1, **more):
    with Server(answer) as server:
        return replies(teacher(server, **{"attempts": 1} | more), asks)["a0"], server


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("content", "finish", "expected"),
    [("", "stop", "empty"), (" \n", "stop", "empty"), ("half", "content_filter", "content_filter")],
)
def test_outcomes_are_told_apart(content, finish, expected, stream):
    assert outcome(lambda r: r.say(content, finish), stream=stream)[0].finish_reason == expected


def test_a_refusal_is_an_outcome():
    message = {"content": None, "refusal": "I would rather not."}
    found, _ = outcome(lambda r: r.send(200, whole(message)), stream=False)
    assert (found.finish_reason, found.text) == ("refusal", "I would rather not.")
    found, _ = outcome(lambda r: r.stream([{"refusal": "I would "}, {"refusal": "not."}, {"finish_reason": "stop"}]))
    assert (found.finish_reason, found.text) == ("refusal", "I would not.")


@pytest.mark.parametrize("broken", [b"\xff\xfe", b"\\ud83d"])
def test_what_is_no_unicode_is_kept_as_far_as_it_goes(broken):
    body = b'{"choices":[{"message":{"content":"ab' + broken + b'cd"},"finish_reason":"stop"}]}'
    found, _ = outcome(lambda r: r.send(200, body), stream=False)
    assert found.finish_reason == "invalid_utf8" and found.text.startswith("ab") and found.text.endswith("cd")
    found.text.encode()
    event = b'data: {"choices":[{"delta":{"content":"ab' + broken + b'cd"},"finish_reason":"stop"}]}\n\n'
    found, _ = outcome(lambda r: r.stream([event]))
    assert found.finish_reason == "invalid_utf8" and found.text.endswith("cd")


@pytest.mark.parametrize("message", ["Content Exists Risk", "x was filtered by our content management policy"])
def test_a_prompt_that_the_filter_stops(message):
    found, _ = outcome(lambda r: r.send(400, {"error": {"message": message}}))
    assert found.finish_reason == "content_filter"


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, {"message": "too long", "code": "context_length_exceeded"}),
        (400, {"message": "The input (61709 tokens) is longer than the model's context length (40960 tokens)."}),
        (400, {"message": "This model's maximum context length is 50 tokens. However, you requested 160 tokens "
                          "(60 in the messages, 100 in the completion). Please reduce the length."}),
        (422, {"message": "Input length (160062 tokens) exceeds the maximum allowed length (59862 tokens)."}),
    ],
)  # fmt: skip
def test_a_prompt_beyond_the_context(status, error):
    found, server = outcome(lambda r: r.send(status, {"error": error}))
    assert found.finish_reason == "prompt_too_long" and len(server.asked) == 1


@pytest.mark.parametrize(
    ("message", "fits"),
    [
        ("This model's maximum context length is 80 tokens. However, you requested 160 tokens (60 in the messages, "
         "100 in the completion). Please reduce the length of the messages or completion.", 20),
        ("'max_tokens' or 'max_completion_tokens' is too large: 100. This model's maximum context length is 80 tokens "
         "and your request has 60 input tokens (100 > 80 - 60).", 20),
        ("Requested token count exceeds the model's maximum context length of 80 tokens. You requested a total of 160 "
         "tokens: 60 tokens from the input messages and 100 tokens for the completion.", 20),
        ("the prompt has 60 tokens and 100 for the completion; this model takes 80 at most in all", 20),
        ("Invalid max_tokens value, the valid range of max_tokens is [1, 64]", 64),
        ("max_tokens is too large: 100. This model supports at most 64 completion tokens, whereas you provided 100.",
         64),
        # The prompt is at least this long: its bytes (and the template's) are at most its tokens.
        ("This model's maximum context length is 128 tokens. However, you requested 100 output tokens and your prompt "
         "contains at least 29 input tokens, for a total of at least 129 tokens.", 128 - 64 - len("question 0")),
    ],
)  # fmt: skip
def test_max_tokens_is_cut_down_to_what_the_server_says_there_is(message, fits):
    def answer(request):
        if request.body["max_tokens"] > fits:
            request.send(400, {"object": "error", "message": message, "type": "BadRequestError", "code": 400})
        else:
            request.say()

    found, server = outcome(answer)
    assert [r.body["max_tokens"] for r in server.asked] == [100, fits]
    assert (found.finish_reason, found.attempts) == ("stop", 1)


# Failures.


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda r: r.send(200, b'{"choices": [{"mess'), "bad_json"),
        (lambda r: r.send(200, b"[1, 2]"), "bad_json"),
        (lambda r: r.send(200, {"choices": []}), "bad_json"),
        (lambda r: r.send(200, {"error": {"message": "CUDA error"}}), "server_error: CUDA error"),
        (lambda r: r.stream([{"content": "half"}], done=False), "cut"),
        (lambda r: (r.begin_stream(), r.chunk(sse(as_event({"content": "half"}, r.path))), r.cut()), "cut"),
        (lambda r: r.stream([b'data: {"choices": [{\n\n']), "bad_json"),
        (lambda r: r.stream([b'data: {"error": {"message": "engine died", "code": 500}}\n\n']), "server_error: engine"),
        (lambda r: r.stream([{"finish_reason": "stop"}, {"content": "late"}]), "reordered_chunks"),
        (lambda r: r.stream([*[{"content": c} for c in "aabbccddeeff"], {"finish_reason": "stop"}],
                            usage={"prompt_tokens": 1, "completion_tokens": 7}), "duplicated_chunks"),
        (lambda r: r.stream([b"id: 4\n", {"content": "a"}, b"id: 4\n", {"content": "a"}]), "duplicated_chunks"),
        (lambda r: r.say(finish="insufficient_system_resource"), "insufficient_system_resource"),
        (lambda r: r.say("x" * 1000000), "huge_body"),
        (lambda r: r.handler.wfile.write(b"SSH-2.0-OpenSSH\r\n\r\n"), "bad_http"),
        (lambda r: r.cut(), "connection"),
    ],
)  # fmt: skip
def test_a_broken_reply_is_a_failed_attempt(answer, kind):
    found, _ = outcome(answer)
    assert found.finish_reason == "failed" and found.error.startswith(kind)


def test_a_hang_and_a_drip_are_ended():
    found, _ = outcome(lambda r: time.sleep(1), idle_timeout=0.2)
    assert found.error == "timeout: nothing came for 0.2 s"
    drip = [x for n in range(20) for x in ({"content": "x"}, 0.05)]
    found, _ = outcome(lambda r: r.stream(drip), idle_timeout=0.5, timeout=0.3)
    assert found.error == "timeout: not done after 0.3 s"
    found, _ = outcome(lambda r: r.stream([*drip[:10], {"finish_reason": "stop"}]), idle_timeout=0.2)
    assert found.finish_reason == "stop"  # slow is not silent


def test_the_server_is_waited_for_as_it_asks():
    times = []

    def answer(request):
        times.append(time.monotonic())
        request.send(429, {}, Retry_After="1") if request.number == 0 else request.say()

    assert outcome(answer, attempts=2)[0].attempts == 2
    assert 1.0 <= times[1] - times[0] < 2.0


def test_an_unfinished_stream_without_done_but_with_its_end_is_whole():
    found, _ = outcome(lambda r: r.stream([*deltas("a</think>b"), {"finish_reason": "stop"}], done=False))
    assert (found.finish_reason, found.text) == ("stop", "a</think>b")


def test_a_server_that_does_not_end_its_stream_is_not_waited_for():
    def answer(request):
        request.begin_stream()
        request.chunk(sse(as_event({"content": "done", "finish_reason": "stop"}, request.path)) + b"data: [DONE]\n\n")
        time.sleep(3)

    start = time.monotonic()
    assert outcome(answer)[0].text == "done"
    assert time.monotonic() - start < 2


def test_a_request_that_only_this_sample_gets_wrong_fails_alone_and_at_once():
    def answer(request):
        request.send(400, {"error": {"message": "no"}}) if request.body["seed"] == 10 else request.say()

    with Server(answer) as server:
        found = replies(teacher(server, endpoints=[{"url": server.url, "concurrency": 1}]), 6)
    assert found["a3"].error == "http_400: HTTP 400: no" and found["a3"].attempts == 1
    assert [r.finish_reason for n, r in found.items() if n != "a3"] == ["stop"] * 5


def test_a_kept_connection_that_was_closed_costs_no_attempt():
    def answer(request):
        request.say()
        request.cut()  # after the reply, without saying so

    with Server(answer) as server:
        found = replies(teacher(server, attempts=1, endpoints=[{"url": server.url, "concurrency": 1}]), 10)
    assert {r.finish_reason for r in found.values()} == {"stop"}


def test_a_server_that_dies_of_a_sample_is_not_killed_for_ever():
    """It closes the connection where it should answer, kept or new: that counts."""

    def answer(request):
        request.cut() if request.body["seed"] == 10 else request.say()

    with Server(answer) as server:
        found = replies(teacher(server, attempts=3, endpoints=[{"url": server.url, "concurrency": 2}]), 10)
    assert found["a3"].error.startswith("connection") and found["a3"].attempts == 3
    assert sum(r.body["seed"] == 10 for r in server.asked) <= 6
    assert sum(r.finish_reason == "stop" for r in found.values()) == 9
