"""The client against real HTTP on loopback: what is sent, what comes of it, and what happens when it does not."""

import pytest

from tests.distill.endpoints.scripted import Server, ask, replies, teacher


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
