"""Where the reasoning ends: the same for a stream and a whole reply, with the opening tag in prompt, reply, or both."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher.server.chat import ReasoningSplit, opens_reasoning


def split(text, opened, parser="deepseek_r1", sizes=()):
    splitter = ReasoningSplit(parser, opened)
    pieces, sizes = [], iter(sizes)
    while text:
        size = next(sizes, len(text))
        pieces.append(splitter.push(text[:size]))
        text = text[size:]
    pieces.append(splitter.flush())
    return "".join(p.reasoning for p in pieces), "".join(p.content for p in pieces)


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("12+3\n</think>\n\nfifteen", True, ("12+3", "fifteen")),
        ("<think>\n12+3\n</think>\n\nfifteen", True, ("12+3", "fifteen")),
        ("<think>\n12+3\n</think>\n\nfifteen", False, ("12+3", "fifteen")),
        ("\n<think>12+3</think>fifteen\n", False, ("12+3", "fifteen\n")),
        ("never closed </thin", True, ("never closed </thin", "")),
        ("no thought < at all", False, ("", "no thought < at all")),
        (" an answer that says </think>", False, ("", " an answer that says </think>")),
        ("</think>\n\nat once", True, ("", "at once")),
        ("one</think>two</think>three", True, ("one", "two</think>three")),
        ("ends open  ", True, ("ends open  ", "")),
        ("<thi", False, ("", "<thi")),
        ("", True, ("", "")),
    ],
)
def test_both_sides(text, opened, expected):
    assert split(text, opened) == expected


def test_without_a_parser_all_is_content():
    assert split("<think>a</think>b", True, "none") == ("", "<think>a</think>b")


TEXTS = st.lists(st.sampled_from(["<think>", "</think>", "<th", "</", "ink>", "\n", " ", "a", "b<"]), max_size=12)


@settings(max_examples=500, deadline=None)
@given(TEXTS, st.booleans(), st.lists(st.integers(1, 5), max_size=60))
def test_a_stream_says_what_a_whole_reply_says(parts, opened, sizes):
    text = "".join(parts)
    assert split(text, opened, sizes=sizes) == split(text, opened)


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.booleans())
def test_nothing_but_tags_and_blank_space_is_lost(parts, opened):
    def bare(text):
        return "".join(text.replace("<think>", "").replace("</think>", "").split())

    reasoning, content = split("".join(parts), opened)
    assert bare(reasoning) + bare(content) == bare("".join(parts))


@pytest.mark.parametrize(
    ("prompt", "opens"), [("<｜Assistant｜><think>\n", True), ("<think>a</think>x", False), ("", False)]
)
def test_whether_a_prompt_leaves_the_reasoning_open(prompt, opens):
    assert opens_reasoning(prompt) is opens
