"""Replies as the servers word them, whole and streamed in any cut: one text, one split, the same counts."""

import json
import random

import pytest

from distill.endpoints.answers import Stream, Whole
from distill.endpoints.failures import LONGEST_WAIT, retry_after
from distill.endpoints.names import Names
from distill.endpoints.outcomes import make_reply, one_text
from distill.reasoning import split_reasoning
from tests.distill.endpoints.scripted import as_event, ask, deltas, sse, whole

CHAT = "/chat/completions"
TEXTS = [
    'a "quoted" \\ one',
    "line\nbreak\r\n",
    "{}[],:",
    "Zahl π ≈ 3,14 𝛑",
    "\u2028",
    "</thin",
    "data: [DONE]",
    "\x7f\t",
]


def streamed(events, cut=None, usage=None):
    stream = Stream(1 << 20)
    data = b"".join(event if isinstance(event, bytes) else sse(as_event(event, CHAT)) for event in events)
    if usage:
        data += sse(as_event({}, CHAT) | {"choices": [], "usage": usage})
    data += b"data: [DONE]\n\n"
    while data:
        size = cut() if cut else len(data)
        stream.feed(data[:size])
        data = data[size:]
    return stream.answer()


@pytest.mark.parametrize("seed", range(40))
def test_a_stream_reads_the_same_however_it_is_cut_and_worded(seed):
    draw = random.Random(seed)
    reasoning = "".join(draw.choices(TEXTS, k=60))
    content = "".join(draw.choices(TEXTS, k=60))
    events = [{"role": "assistant", "content": ""}]
    events += deltas(reasoning, draw.randint(1, 5), draw.choice(["reasoning", "reasoning_content"]))
    events += [*deltas(content, draw.randint(1, 5)), {"finish_reason": "stop"}]
    events = [x for e in events for x in ([b": keep-alive\n\n", e] if draw.random() < 0.05 else [e])]
    size = draw.choice([1, 7, 100, 5000, 10**6])
    answer = streamed(events, lambda: draw.randint(1, size))
    assert "".join(answer.reasoning) == reasoning and "".join(answer.content) == content
    assert answer.finish == "stop" and answer.model == "m"


def test_carriage_returns_and_spaces_are_no_matter():
    one = sse(as_event({"content": "one"}, CHAT)).replace(b"\n\n", b"\r\n\r\n")
    two = sse(as_event({"content": "two"}, CHAT)).replace(b"data: ", b"data:").replace(b'":', b'": ')
    assert "".join(streamed([one, two, one, one, two, two]).content) == "onetwooneonetwotwo"


def test_events_that_are_read_together_are_not_taken_for_text_when_they_are_not():
    """A text that closes its string itself, within a run of like events: the run is read event by event, and fails."""
    plain = sse(as_event({"content": "x"}, CHAT))
    broken = plain.replace(b'"x"', b'"x","y"')
    with pytest.raises(Exception, match="bad_json"):
        streamed([plain, plain, plain, broken, plain, plain])


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize("path", [CHAT, "/completions"])
def test_the_end_twice_is_found_in_any_wording(path, separators):
    events = [as_event(delta, path) for delta in [*deltas("abcdef"), *[{"finish_reason": "stop"}] * 2]]
    with pytest.raises(Exception, match="duplicated_chunks"):
        streamed([b"data: " + json.dumps(event, separators=separators).encode() + b"\n\n" for event in events])


def test_other_choices_are_not_ours():
    other = sse(as_event({"content": "no"}, CHAT)).replace(b'"index":0', b'"index":1')
    assert "".join(streamed([{"content": "yes"}, other, {"content": "!"}]).content) == "yes!"


def test_an_event_of_another_reply_is_found():
    other = sse(as_event({"content": "no"}, CHAT)).replace(b'"id":"one"', b'"id":"two"')
    with pytest.raises(Exception, match="mixed_stream"):
        streamed([{"content": "a"}, {"content": "b"}, other])


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        # In the content: R1's template opens the thinking, another leaves that to the model; a server repeats it.
        ({"content": "so\n</think>\n\n4"}, "so\n</think>\n\n4"),
        ({"content": "<think>\nso\n</think>\n\n4"}, "so\n</think>\n\n4"),
        ({"content": "\n<think>so"}, "so"),
        # In a field of its own, under either name, or both (SGLang, DeepSeek; vLLM; ours).
        ({"reasoning_content": "so", "content": "4"}, "so\n</think>\n\n4"),
        ({"reasoning": "so\n", "content": "\n\n4"}, "so\n</think>\n\n4"),
        ({"reasoning_content": "so", "reasoning": "so", "content": "4"}, "so\n</think>\n\n4"),
        ({"reasoning_content": "<think>\nso", "content": "4"}, "so\n</think>\n\n4"),
        ({"reasoning_content": "so", "content": "</think>\n\n4"}, "so\n</think>\n\n4"),
        # The thinking never closed.
        ({"reasoning_content": "so and", "content": None}, "so and"),
        # The server tells them apart, and there was no reasoning.
        ({"reasoning_content": None, "content": "4"}, "</think>\n\n4"),
        # It does not: nobody can tell, and our engine would have said just this.
        ({"content": "4"}, "4"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_one_text_of_all_forms(message, expected, stream):
    if stream:
        pieces = [{name: piece} for name, text in message.items() if text for piece in (text[:1], text[1:]) if piece]
        if message.get("reasoning") and message.get("reasoning_content"):
            pieces = [{"reasoning": "so", "reasoning_content": "so"}, {"content": "4"}]
        if "reasoning_content" in message and not message["reasoning_content"]:
            pieces = [{"reasoning_content": None, "content": "4"}]
        answer = streamed([{"role": "assistant"}, *pieces, {"finish_reason": "stop"}])
    else:
        sink = Whole(1 << 20)
        sink.feed(json.dumps(whole(message)).encode())
        answer = sink.answer()
    assert make_reply(ask(), answer, 1.0, chat=True).text == expected


def test_the_split_is_the_servers():
    assert split_reasoning(one_text("a\nb", "c")) == ("a\nb", "c")
    assert split_reasoning(one_text("", "c", answered=True)) == ("", "c")
    assert split_reasoning(one_text("a", "")) == ("a", "")


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 40, "completion_tokens_details": {"reasoning_tokens": 30}},
         (9, 30, 10)),
        ({"prompt_tokens": 9, "completion_tokens": 40, "reasoning_tokens": 30}, (9, 30, 10)),
        # By the share of the text: 20 of 40 characters.
        ({"prompt_tokens": 9, "completion_tokens": 40}, (9, 20, 20)),
        ({"prompt_tokens": 9, "completion_tokens": 40, "completion_tokens_details": {"reasoning_tokens": 0}},
         (9, 20, 20)),
        # A quarter of the characters; those of "question 0" make 3.
        ({}, (3, 5, 5)),
    ],
)  # fmt: skip
def test_tokens_are_the_servers_or_an_estimate(usage, expected):
    answer = streamed([{"content": "a" * 12 + "</think>" + "b" * 20}, {"finish_reason": "stop"}], usage=usage)
    reply = make_reply(ask(), answer, 1.0, chat=True)
    assert (reply.prompt_tokens, reply.reasoning_tokens, reply.answer_tokens) == expected


def test_likeliest_tokens_of_both_apis():
    chat = {"content": [{"token": "a", "logprob": -0.1, "top_logprobs": [
        {"token": "a", "logprob": -0.1}, {"token": "b", "logprob": -2.0}]}]}  # fmt: skip
    plain = {"tokens": ["c"], "token_logprobs": [-3.0], "top_logprobs": [{"a": -0.1, "b": -2.0, "c": -3.0}]}
    for logprobs in (chat, plain):
        sink = Whole(1 << 20, top=2)
        body = whole({"content": "x"})
        body["choices"][0]["logprobs"] = logprobs
        sink.feed(json.dumps(body).encode())
        found = make_reply(ask(logprobs=2), sink.answer(), 1.0, chat=True).logprobs
        assert found.tokens == [("a", "b")] and [list(row) for row in found.logprobs] == [pytest.approx([-0.1, -2.0])]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({b"retry-after": b"7"}, 7.0),
        ({b"retry-after": b"1.5"}, 1.5),
        ({b"retry-after": b"99999999999999999999"}, LONGEST_WAIT),
        ({b"retry-after": b"soon"}, None),
        ({}, None),
        # The server's clock is a year off, and it does not matter: it says what time it has.
        ({b"retry-after": b"Wed, 21 Oct 2015 07:28:30 GMT", b"date": b"Wed, 21 Oct 2015 07:28:00 GMT"}, 30.0),
        ({b"retry-after": b"Wed, 21 Oct 2015 07:28:30 GMT", b"date": b"Wed, 21 Oct 2015 07:29:00 GMT"}, 0.0),
        # It does not say; ours has to do, within bounds.
        ({b"retry-after": b"Wed, 21 Oct 2015 07:28:30 GMT"}, 10.0),
        ({b"retry-after": b"Fri, 21 Oct 2099 07:28:30 GMT"}, LONGEST_WAIT),
    ],
)
def test_retry_after(header, expected):
    assert retry_after(header, now=1445412500.0) == expected


@pytest.mark.parametrize(
    ("asked", "said", "same"),
    [
        ("deepseek-ai/DeepSeek-R1", "deepseek-r1", True),
        ("gpt-5", "gpt-5-2026-01-30", True),
        ("r1", "/models/r1.gguf", True),
        ("DeepSeek-R1", "DeepSeek-R1-Distill-Qwen-7B", False),
        ("deepseek-reasoner", "deepseek-chat", False),
        ("r1", None, True),
    ],
)
def test_names_that_mean_the_same(asked, said, same):
    assert Names(asked).accepts(said) is same


def test_aliases_are_learnt_from_the_list_of_models_or_from_agreement():
    names = Names("alias")
    names.learn([{"id": "alias", "root": "/r1"}, {"id": "first", "root": "/r1"}, {"id": "other", "root": "/v3"}])
    assert names.accepts("first") and not names.accepts("other")
    names = Names("alias")
    assert [names.accepts("first") for _ in range(3)] == [False, False, True]
    names = Names("alias")
    assert names.accepts("alias")
    assert [names.accepts("first") for _ in range(9)] == [False] * 9
