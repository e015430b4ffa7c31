"""What goes wrong: each has one clear answer, nothing hangs, and the others are served on."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from tests.teacher import serving

CHAT = {"model": serving.NAME, "messages": [{"role": "user", "content": "how many?"}], "max_tokens": 20}
LONG = CHAT | {"max_tokens": 450, "ignore_eos": True}


class Slow:
    """An engine whose steps wait for `go`, or break with `error`."""

    def __init__(self, **options):
        self._engine = serving.random_engine(**options)
        self.go = threading.Event()
        self.stepping = threading.Event()  # a step has been entered
        self.error = None
        self.steps = 0

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def step(self):
        self.stepping.set()
        assert self.go.wait(30)
        self.steps += 1
        if self.error is not None:
            raise self.error
        return self._engine.step()


@pytest.fixture(scope="module")
def server():
    with serving.serve(serving.random_engine(), serving.served(), api_key="sesame") as running:
        yield running


def post(server, body, path="/v1/chat/completions", **options):
    options.setdefault("headers", {"Authorization": "Bearer sesame"})
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx2.post(server.url + path, content=content, timeout=30, **options)


def error_of(reply):
    assert set(reply.json()) == {"error"}
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    return reply.json()["error"]


@pytest.mark.parametrize(
    "body", [b"{", b"", b"nonsense", b'{"messages": [}', b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}", b"\xff\xfe{"]
)
def test_malformed_json(server, body):
    reply = post(server, body)
    assert reply.status_code == 400
    assert "not valid JSON" in error_of(reply)["message"]


def test_a_body_that_is_no_object(server):
    assert "expected an object" in error_of(post(server, [1]))["message"]


def test_half_a_surrogate_pair(server):
    reply = post(server, b'{"messages": [{"role": "user", "content": "\\ud800"}]}')
    assert (reply.status_code, error_of(reply)["param"]) == (400, "messages")
    reply = post(server, b'{"prompt": "a\\udfff"}', "/v1/completions")
    assert (reply.status_code, error_of(reply)["param"]) == (400, "prompt")


def test_a_body_without_end(server, monkeypatch):
    from teacher.server import app

    monkeypatch.setattr(app, "MOST_BYTES", 1000)
    reply = post(server, b" " * 2000)
    assert (reply.status_code, error_of(reply)["type"]) == (413, "invalid_request_error")


def test_no_such_route_or_method(server):
    assert error_of(httpx2.get(server.url + "/v1/embeddings"))["message"] == "GET /v1/embeddings: Not Found"
    reply = httpx2.get(server.url + "/v1/chat/completions")
    assert (reply.status_code, error_of(reply)["type"]) == (405, "invalid_request_error")


@pytest.mark.parametrize("key", [None, "Bearer wrong", "sesam", "Bearer sésame", "Basic sesame"])
def test_a_key_that_is_missing_or_wrong(server, key, caplog):
    headers = {} if key is None else {"Authorization": key.encode()}
    for reply in (post(server, CHAT, headers=headers), httpx2.get(server.url + "/v1/models", headers=headers)):
        assert (reply.status_code, error_of(reply)["code"]) == (401, "invalid_api_key")
        assert "sesame" not in reply.text + caplog.text
    assert httpx2.get(server.url + "/health").status_code == 200  # a probe has no key
    assert post(server, CHAT).status_code == 200


def test_more_sequences_than_the_server_takes_at_any_time():
    with serving.serve(serving.random_engine(), serving.served(), most_requests=5) as server:
        for path, body in (
            ("/v1/chat/completions", CHAT | {"n": 6}),
            ("/v1/completions", {"prompt": ["a"] * 3, "n": 2}),
            ("/v1/completions", {"prompt": ["a"] * 100_000}),
        ):
            reply = post(server, body, path)
            assert (reply.status_code, error_of(reply)["param"]) == (400, "n")
        assert post(server, CHAT | {"n": 5}).status_code == 200


def test_a_request_larger_than_the_cache():
    engine = serving.random_engine(cache_tokens=64)
    with serving.serve(engine, serving.served()) as server:  # which does not know how small the cache is
        reply = post(server, {"prompt": "x" * 200, "max_tokens": 10}, "/v1/completions")
        assert reply.status_code == 400
        assert error_of(reply)["message"] == "its prompt has 200 tokens; expected fewer than max_len (64)"
        # All of a batch, or none.
        reply = post(server, {"prompt": ["a", "x" * 200], "max_tokens": 10}, "/v1/completions")
        assert reply.status_code == 400
        reply = post(server, {"prompt": "x" * 200, "max_tokens": 10, "stream": True}, "/v1/completions")
        assert (reply.status_code, error_of(reply)["type"]) == (400, "invalid_request_error")
        assert post(server, {"prompt": "a", "max_tokens": 10}, "/v1/completions").status_code == 200
        assert not server.worker._live


def test_a_full_queue_says_when_to_come_again():
    engine = Slow()
    with serving.serve(engine, serving.served(), most_requests=3) as server, ThreadPoolExecutor(3) as threads:
        running = [threads.submit(post, server, CHAT) for _ in range(3)]
        wait_for(lambda: len(server.worker._live) == 3)
        reply = post(server, CHAT)
        assert (reply.status_code, error_of(reply)["type"]) == (429, "rate_limit_error")
        assert 1 <= int(reply.headers["Retry-After"]) <= 60
        engine.go.set()
        assert [future.result().status_code for future in running] == [200] * 3
        assert post(server, CHAT).status_code == 200


def test_an_engine_that_breaks_answers_everybody_and_takes_nobody():
    engine = Slow()
    with serving.serve(engine, serving.served()) as server, ThreadPoolExecutor(4) as threads:
        whole = threads.submit(post, server, CHAT | {"n": 2})
        stream = threads.submit(post, server, CHAT | {"stream": True})
        assert engine.stepping.wait(20)
        scored = {"prompt": "ab", "max_tokens": 0, "echo": True, "logprobs": 1}
        score = threads.submit(post, server, scored, "/v1/completions")
        wait_for(lambda: len(server.worker._live) == 3 and server.worker._futures)
        engine.error = RuntimeError("secret of the house")
        engine.go.set()
        for future in (whole, score):
            assert (future.result().status_code, error_of(future.result())["code"]) == (500, "engine_failed")
        # The stream's status had gone out, or not yet.
        reply = stream.result()
        assert '"code": "engine_failed"' in reply.text or '"code":"engine_failed"' in reply.text
        for reply in (post(server, CHAT), httpx2.get(server.url + "/health")):
            assert (reply.status_code, error_of(reply)["code"]) == (503, "engine_failed")
        assert "secret" not in whole.result().text + stream.result().text
        assert httpx2.get(server.url + "/metrics").status_code == 200


def test_a_stream_that_breaks_in_the_middle_ends_with_an_error():
    engine = Slow()
    engine.go.set()
    with serving.serve(engine, serving.served()) as server:
        with httpx2.stream("POST", server.url + "/v1/chat/completions", json=LONG | {"stream": True}) as reply:
            lines = reply.iter_lines()
            for _ in range(20):
                next(lines)
            engine.error = RuntimeError("broken")
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert reply.status_code == 200
        assert events[-1]["error"]["code"] == "engine_failed"


def test_a_model_that_breaks_while_scoring_breaks_that_call_only():
    class Broken:
        lm_head = serving.random_model().lm_head

        def __call__(self, *arguments, **settings):
            raise RuntimeError("out of memory")

    with serving.serve(serving.random_engine(), serving.served(model=Broken())) as server:
        body = {"prompt": "ab", "max_tokens": 0, "echo": True, "logprobs": 1}
        reply = post(server, body, "/v1/completions")
        assert (reply.status_code, error_of(reply)["type"]) == (500, "server_error")
        assert "memory" not in reply.text
        assert post(server, CHAT).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_place(stream):
    engine = Slow()
    with serving.serve(engine, serving.served()) as server:
        body = json.dumps(LONG | {"stream": stream, "n": 3}).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            wait_for(lambda: len(server.worker._live) == 3)
            if stream:
                engine.go.set()
                client.recv(100)
                engine.go.clear()
        # Hung up. The server must see it before the engine goes on.
        time.sleep(0.3)
        steps = engine.steps
        engine.go.set()
        wait_for(lambda: not server.worker._live)
        assert engine.steps - steps < 50  # of the 450 that the tokens take
        assert not engine.has_work
        assert post(server, CHAT).status_code == 200


def test_a_long_prompt_holds_nobody_up(server):
    """Two megabytes are rendered and tokenised while others are answered."""
    long = CHAT | {"messages": [{"role": "user", "content": "many words " * 200_000}]}
    with ThreadPoolExecutor(1) as thread, httpx2.Client(base_url=server.url) as probe:
        probe.get("/health")
        refused, answers = thread.submit(post, server, long), 0
        while not refused.done():
            assert probe.get("/health").status_code == 200
            answers += 1
    assert error_of(refused.result())["code"] == "context_length_exceeded"
    assert answers >= 10  # a handful if the event loop did the work


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
