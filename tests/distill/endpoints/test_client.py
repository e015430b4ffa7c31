"""The client against real HTTP on loopback: what is sent, what comes of it, and what happens when it does not."""

import gc
import os
import signal
import threading
import time

import pytest

from distill.endpoints import open_endpoints
from distill.errors import UserError
from tests.distill.endpoints.scripted import Server, Source, as_event, ask, deltas, replies, sse, teacher, whole


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


# The user's mistakes.


@pytest.mark.parametrize("status", [401, 402, 403, 404, 302])
def test_a_wrong_key_or_model_ends_the_run_with_what_the_server_says(status, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "sk-secret-1")
    message = {"error": {"message": "no: sk-secret-1 is nobody's", "code": "x"}}
    with Server(lambda r: r.send(status, message, Location="http://127.0.0.1:9/steal")) as server:
        given = teacher(endpoints=[{"url": server.url, "key": "TEACHER_KEY"}])
        with pytest.raises(UserError) as raised:
            replies(given, 200)
    said = str(raised.value)
    assert server.url in said and str(status) in said and "'m'" in said and "sk-secret" not in said
    assert server.asked[0].headers["Authorization"] == "Bearer sk-secret-1"
    assert len(server.asked) <= 64


def test_a_field_that_the_server_does_not_take_ends_the_run():
    server = Server(lambda r: r.send(400, {"error": {"message": "unknown field 'top_k'"}}))
    with server, pytest.raises(UserError, match="unknown field 'top_k'"):
        replies(teacher(server, body={"top_k": 5}), 100)
    assert server.asked[0].body["top_k"] == 5


def test_one_endpoint_with_a_wrong_key_is_left_out(capsys):
    with Server(lambda r: r.send(401, {"error": {"message": "who?"}})) as bad, Server() as good:
        found = replies(teacher(bad, good), 40)
    assert {(r.finish_reason, r.endpoint, r.attempts) for r in found.values()} == {("stop", good.url, 1)}
    assert capsys.readouterr().err.count("HTTP 401: who?; it gets no more work") == 1


def test_a_missing_key_is_told_before_anything_is_asked(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(UserError, match=r"teacher\.endpoints\.0\.key: the environment variable NO_SUCH_KEY is not set"):
        open_endpoints(teacher(endpoints=[{"url": "http://127.0.0.1:9/v1", "key": "NO_SUCH_KEY"}]))


def test_a_key_in_a_streams_error_is_not_repeated(monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "sk-secret-1")
    event = b'data: {"error": {"message": "sk-secret-1 has had enough"}}\n\n'
    with Server(lambda r: r.stream([event])) as server:
        given = teacher(endpoints=[{"url": server.url, "key": "TEACHER_KEY"}], attempts=1)
        assert replies(given)["a0"].error == "server_error: ... has had enough"


def test_a_server_that_only_turns_away_is_down_at_last():
    """A gateway without anything behind it: samples wait for it then, and are not used up."""
    backends = []

    def answer(request):
        request.say() if backends[0]._endpoints[0].downs else request.send(503, {})

    with Server(answer) as server:
        backends.append(open_endpoints(teacher(server, attempts=200)))
        found = [reply for batch in backends[0].generate(Source(map(ask, range(40)))) for reply in batch]
    assert {reply.finish_reason for reply in found} == {"stop"}


# Which model answers.


def test_another_model_is_not_taken_for_the_one_asked_for():
    def answer(request):
        request.say(model="cheaper" if request.number % 3 == 1 else "m")

    with Server(answer) as server:
        server.models = [{"id": "m"}, {"id": "cheaper"}]
        teacher_ = teacher(server, attempts=50, endpoints=[{"url": server.url, "concurrency": 1}])
        backend = open_endpoints(teacher_)
        found = [r for batch in backend.generate(Source(map(ask, range(6)))) for r in batch]
    assert {r.finish_reason for r in found} == {"stop"}
    assert backend.states()[server.url].errors["wrong_model"] == len(server.asked) - 6 > 0


def test_a_server_of_one_model_may_call_it_what_it_likes():
    with Server(lambda r: r.say(model="/models/r1.gguf")) as server:
        server.models = [{"id": "/models/r1.gguf"}]
        assert replies(teacher(server))["a0"].attempts == 1


# Money, and several endpoints.


def test_all_attempts_that_were_charged_are_paid():
    def answer(request):
        if request.number == 0:
            request.say(finish="insufficient_system_resource")
        else:
            request.say()

    with Server(answer) as server:
        priced = {"url": server.url, "prompt_price": 1.0, "completion_price": 10.0}
        found = replies(teacher(endpoints=[priced]))["a0"]
    assert found.attempts == 2 and found.cost == pytest.approx(2 * (10 * 1.0 + 20 * 10.0) / 1e6)


def test_work_is_shared_by_weight():
    def slowly(request):
        time.sleep(0.002)
        request.say()

    with Server(slowly) as one, Server(slowly) as three:
        endpoints = [{"url": one.url, "concurrency": 8}, {"url": three.url, "weight": 3, "concurrency": 8}]
        found = replies(teacher(endpoints=endpoints), [ask(n) for n in range(8)])
    assert sorted([len(one.asked), len(three.asked)]) == [2, 6] and len(three.asked) == 6
    assert {r.endpoint for r in found.values()} == {one.url, three.url}


def test_a_lost_endpoints_work_moves_to_the_other_and_it_is_taken_back(capsys):
    def slowly(request):
        time.sleep(0.02)
        request.say()

    one, two = Server(slowly), Server(slowly)
    backend = open_endpoints(teacher(attempts=1, endpoints=[{"url": s.url, "concurrency": 4} for s in (one, two)]))
    found, back = [], None
    try:
        for batch in backend.generate(Source(map(ask, range(1000)))):
            found += batch
            if len(found) > 100 and one.http.socket.fileno() >= 0 and back is None:
                one.stop()
            if len(found) > 300 and back is None:
                assert not backend.states()[one.url].up
                back = Server(slowly, one.port)
    finally:
        two.stop()
        back.stop()
    assert len({r.id for r in found}) == len(found) == 1000
    # Nothing was held against the samples that were in flight.
    assert {(r.finish_reason, r.attempts) for r in found} == {("stop", 1)}
    assert backend.states()[one.url].up and len(back.asked) > 50
    down, up = capsys.readouterr().err.splitlines()
    assert down.startswith(f"{one.url} is down (") and down.endswith("); its work goes to the others")
    assert up == f"{one.url} is up again"


def test_without_any_endpoint_it_waits_and_says_so_once(capsys):
    server = Server()
    server.stop()
    backend = open_endpoints(teacher(server, attempts=1))
    work = backend.generate(Source(map(ask, range(10))))
    for _ in range(5):
        assert next(work) == []
    again = Server(port=server.port)
    found = [reply for batch in work for reply in batch]
    again.stop()
    assert [r.attempts for r in found] == [1] * 10
    said = capsys.readouterr().err
    assert said.count("no endpoint is up") == 1 and "refused" in said and "is up again" in said


def test_an_endpoint_that_was_down_is_looked_for_by_the_next_call():
    server = Server()
    server.stop()
    backend = open_endpoints(teacher(server))
    work = backend.generate(Source([ask()]))
    while backend.states()[server.url].up:
        next(work)
    work.close()
    with Server(port=server.port):
        found = [reply for batch in backend.generate(Source([ask()])) for reply in batch]
    assert found[0].finish_reason == "stop"


def test_what_goes_wrong_in_the_source_is_raised():
    class Broken(Source):
        def take(self, most):
            if len(self.left) < 5:
                raise OSError("no space left")
            return super().take(1)

    with Server() as server, pytest.raises(OSError, match="no space left"):
        list(open_endpoints(teacher(server)).generate(Broken(map(ask, range(10)))))


def test_it_does_not_wait_for_ever():
    server = Server()
    server.stop()
    work = open_endpoints(teacher(server, timeout=0.5)).generate(Source(map(ask, range(100))))
    found = []
    with pytest.raises(ConnectionError, match="no endpoint was up"):
        found.extend(reply for batch in work for reply in batch)
    assert found and all(r.finish_reason == "failed" and r.error.startswith("no_endpoint") for r in found)


# The source, and the end.


def test_what_comes_later_is_asked_later():
    """Adaptive waves: nothing for now is not the end."""
    source = Source([ask(0)])
    source.more = True
    with Server() as server:
        work = open_endpoints(teacher(server)).generate(source)
        found = []
        while not found:
            found += next(work)
        assert next(work) == []
        source.left, source.more = [ask(1)], False
        found += [reply for batch in work for reply in batch]
    assert [reply.id for reply in found] == ["a0", "a1"]


def test_closing_gives_up_at_once_and_leaves_nothing():
    gone = threading.Event()

    def answer(request):
        request.begin_stream()
        try:
            for _ in range(200):
                request.chunk(sse(as_event({"content": "x"}, request.path)))
                time.sleep(0.02)
        except OSError:
            gone.set()
            raise

    sockets = set(os.listdir("/proc/self/fd"))
    with Server(answer) as server:
        work = open_endpoints(teacher(server)).generate(Source(map(ask, range(4))))
        while server.open < 4:
            next(work)
        start = time.monotonic()
        work.close()
        assert time.monotonic() - start < 0.5
        assert gone.wait(2)
    assert not [task for task in threading.enumerate() if "asyncio" in task.name]
    time.sleep(0.1)
    assert len(set(os.listdir("/proc/self/fd")) - sockets) <= 1


def test_ctrl_c_leaves_nothing_behind(caplog):
    with Server(lambda r: time.sleep(2)) as server:
        work = open_endpoints(teacher(server)).generate(Source([ask()]))
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            list(work)
        gc.collect()
    assert not caplog.records


def test_the_limit_is_kept():
    def answer(request):
        time.sleep(0.01)
        request.say()

    with Server(answer) as server:
        replies(teacher(endpoints=[{"url": server.url, "concurrency": 3}]), 30)
    assert server.most_open == 3
