"""Our own server as the teacher, over the wire: the text is what the embedded engine makes of the same seed."""

import re
import subprocess
import sys

import pytest

from distill.embedded import EmbeddedTeacher
from distill.recipe_teacher import Teacher
from distill.records import Ask
from tests.distill.endpoints.scripted import Source, replies

QUESTIONS = [
    f"State the final answer to the following arithmetic problem: {a} + {b} =\n"
    "Please reason step by step, and put your final answer within \\boxed{}."
    for a, b in [(12, 30), (7, 85), (411, 96), (5, 5)]
]


def asks(**more):
    fields = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 512} | more
    return [
        Ask(f"a{n}", [{"role": "user", "content": text}], seed=90 + n, **fields) for n, text in enumerate(QUESTIONS)
    ]


@pytest.fixture(scope="module")
def url():
    command = [sys.executable, "-m", "distill", "teacher", "serve", "tiny-r1", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield re.search(r"listens on (\S+/v1) ", process.stderr.readline())[1]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture(scope="module")
def embedded():
    found = {}
    for batch in EmbeddedTeacher(Teacher(kind="embedded", model="tiny-r1")).generate(Source(asks())):
        found |= {reply.id: reply for reply in batch}
    assert len({reply.text for reply in found.values()}) == len(QUESTIONS)
    return found


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("api", ["chat", "completions"])
def test_the_text_is_the_embedded_engines(url, embedded, api, stream):
    teacher = Teacher(kind="endpoint", model="tiny-r1", api=api, stream=stream, endpoints=[{"url": url}])
    found = replies(teacher, asks())
    assert {n: (r.text, r.finish_reason, r.prompt_tokens) for n, r in found.items()} == {
        n: (r.text, r.finish_reason, r.prompt_tokens) for n, r in embedded.items()
    }
    for name, reply in found.items():
        # The server counts the token that ends the text, and the chat API says how much was reasoning.
        there, here = embedded[name], reply
        assert there.reasoning_tokens + there.answer_tokens + 1 == here.reasoning_tokens + here.answer_tokens
        if api == "chat":
            assert here.reasoning_tokens == there.reasoning_tokens


@pytest.mark.parametrize("stream", [True, False])
def test_max_tokens_shrinks_to_what_fits(url, embedded, stream):
    teacher = Teacher(kind="endpoint", model="tiny-r1", stream=stream, endpoints=[{"url": url}])
    found = replies(teacher, asks(max_tokens=32768))
    assert {n: r.text for n, r in found.items()} == {n: r.text for n, r in embedded.items()}
    assert {r.attempts for r in found.values()} == {1}


def test_a_prompt_that_fills_the_context_is_told(url):
    teacher = Teacher(kind="endpoint", model="tiny-r1", endpoints=[{"url": url}])
    long = Ask("long", [{"role": "user", "content": "1 + " * 3000}], 0.6, 0.95, 100, 1)
    found = replies(teacher, [long])["long"]
    assert found.finish_reason == "prompt_too_long" and found.prompt_tokens > 2048


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("api", ["chat", "completions"])
def test_the_likeliest_tokens_come_along(url, api, stream):
    teacher = Teacher(kind="endpoint", model="tiny-r1", api=api, stream=stream, endpoints=[{"url": url}])
    reply = replies(teacher, asks(logprobs=3, max_tokens=16)[:1])["a0"]
    found = reply.logprobs
    assert len(found.tokens) == len(found.logprobs) == reply.reasoning_tokens + reply.answer_tokens == 16
    assert all(len(row) == 3 and list(row) == sorted(row, reverse=True) for row in found.logprobs)
    assert "".join(map(str, found.chosen)) == reply.text
