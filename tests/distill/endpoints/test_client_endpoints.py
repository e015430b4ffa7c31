"""The client and its endpoints over real HTTP: mistakes, several endpoints, the source of the work, the end."""

import gc
import os
import signal
import threading
import time

import pytest

from distill.endpoints import open_endpoints
from distill.errors import UserError
from tests.distill.endpoints.scripted import Server, Source, as_event, ask, replies, sse, teacher


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr("distill.endpoints.work._FIRST_PAUSE", 0.02)


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
