"""Where the reasoning ends: R1's replies with and without the opening tag, nested, repeated or never closed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.reasoning import assistant_text, closing_tag, split_reasoning


@pytest.mark.parametrize(
    ("text", "reasoning", "response"),
    [
        ("a\n</think>\n\nb", "a", "b"),
        ("<think>\na\n</think>\n\nb", "a", "b"),
        ("\n <think>a</think>b", "a", "b"),
        ("</think>b", "", "b"),
        ("a</think>", "a", ""),
        ("never closes \\boxed{4}", "never closes \\boxed{4}", ""),
        ("<think>never closes", "never closes", ""),
        ("", "", ""),
        # Opened again inside: the closing that is needed is the second.
        ("a <think> b </think> c </think> d", "a <think> b </think> c", "d"),
        ("<think>a <think> b </think> c </think> d", "a <think> b </think> c", "d"),
        # A tag only talked about leaves one closing too few: the last one counts.
        ("I write <think> first. a </think> d", "I write <think> first. a", "d"),
        # What follows the needed closing is the response, tags and all.
        ("a </think> b </think> c", "a", "b </think> c"),
        ("a </think> b <think> c </think> d", "a", "b <think> c </think> d"),
    ],
)
def test_split(text, reasoning, response):
    assert split_reasoning(text) == (reasoning, response)


plain = st.text(max_size=40).map(lambda text: text.replace("<", "")).filter(str.strip)


@given(plain, plain, st.booleans())
def test_what_is_put_together_comes_apart_again(reasoning, response, opened):
    text = assistant_text(reasoning, response)
    text = text if opened else text.removeprefix("<think>\n")
    assert split_reasoning(text) == (reasoning.strip(), response.strip())


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", " "]), max_size=12).map("".join))
def test_nothing_is_lost_and_only_closed_thinking_has_a_response(text):
    reasoning, response = split_reasoning(text)
    tag = closing_tag(text)
    assert (tag is None) == ("</think>" not in text)
    if tag is None:
        assert response == ""
    else:
        assert text[tag.end() :].strip() == response
        assert text[: tag.start()].lstrip().removeprefix("<think>").strip() == reasoning
