"""Text as it comes: equal to one decode, whatever the tokens and however they are dealt; stop strings never shown."""

import gzip
import os
import time
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher.text import TextStream, token_bytes
from tests import tiny

DATA = Path(os.environ.get("DISTILL_DATA", Path(__file__).parents[3] / "shared" / "data"))
TINY_R1 = Path(__file__).parents[2] / "teacher" / "models" / "tiny-r1"
REAL = ("deepseek-r1", "llama-3.1", "qwen3")


@cache
def tokenizer(name):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if name == "bytes":
        return tiny.tokenizer()
    if name == "tiny-r1":
        return AutoTokenizer.from_pretrained(TINY_R1)
    if name == "sentencepiece":
        return sentencepiece()
    file = DATA / "tokenizers" / name / "tokenizer.json.gz"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_buffer(gzip.decompress(file.read_bytes())))


def sentencepiece():
    """Llama 2's kind: pieces with ▁ for the blank, bytes as <0xE2>, the first blank dropped."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "▁the", "cat", "s", "▁é", "\n"]
    backend = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def decoded(name, ids):
    return tokenizer(name).decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def deal(data, ids):
    """The ids in chunks of drawn sizes."""
    while ids:
        size = data.draw(st.integers(1, 4))
        yield ids[:size]
        ids = ids[size:]


@pytest.mark.parametrize("name", ["bytes", "tiny-r1", *REAL])
def test_any_tokens_give_what_decode_gives(name):
    size = len(tokenizer(name))

    @settings(max_examples=100, deadline=None)
    @given(st.data())
    def holds(data):
        # Also ids that are no token: a model's vocabulary may be padded beyond its tokenizer's.
        ids = data.draw(st.lists(st.integers(0, size + 3), max_size=40))
        stream = TextStream(tokenizer(name))
        shown = ""
        for chunk in deal(data, ids):
            shown += stream.push(chunk)
            assert decoded(name, ids).startswith(shown)
        shown += stream.flush()
        assert shown == stream.text == decoded(name, ids)
        assert stream.tokens == len(ids)

    holds()


@pytest.mark.parametrize("name", ["bytes", "tiny-r1", *REAL, "sentencepiece"])
def test_the_bytes_of_one_token(name):
    for token in range(0, len(tokenizer(name)), 1 + len(tokenizer(name)) // 1000):
        assert token_bytes(tokenizer(name), token).decode(errors="replace") == decoded(name, [token])
    if name != "sentencepiece":
        half = tokenizer(name)("—", add_special_tokens=False)["input_ids"]
        assert b"".join(token_bytes(tokenizer(name), token) for token in half) == "—".encode()


@pytest.mark.parametrize("name", ["bytes", "tiny-r1", *REAL])
def test_any_text_comes_back_without_half_characters(name):
    @settings(max_examples=60, deadline=None)
    @given(st.text(max_size=30))
    def holds(text):
        ids = tokenizer(name)(text, add_special_tokens=False)["input_ids"]
        stream = TextStream(tokenizer(name))
        deltas = [stream.push([token]) for token in ids] + [stream.flush()]
        assert "".join(deltas) == decoded(name, ids)
        if "\ufffd" not in decoded(name, ids):
            assert not any("\ufffd" in delta for delta in deltas)

    holds()


@settings(max_examples=400, deadline=None)
@given(
    st.text("abé—", max_size=40),
    st.lists(st.text("abé—", min_size=1, max_size=5), min_size=1, max_size=4),
    st.data(),
)
def test_the_text_ends_before_the_stop_string_that_is_complete_first(text, stops, data):
    ids = tokenizer("bytes")(text, add_special_tokens=False)["input_ids"]
    ends = {stop: text.find(stop) + len(stop) for stop in stops if stop in text}
    first = min(ends, key=lambda stop: (ends[stop], -len(stop)), default=None)
    expected = text if first is None else text[: ends[first] - len(first)]

    stream = TextStream(tokenizer("bytes"), stops)
    shown = ""
    for chunk in deal(data, ids):
        shown += stream.push(chunk)
        assert expected.startswith(shown)
    shown += stream.flush()
    assert (shown, stream.text, stream.stop_text) == (expected, expected, first)
    taken = text if first is None else text[: ends[first]]
    assert stream.tokens == len(taken.encode())


def test_only_what_may_become_a_stop_string_is_held_back():
    ids = tokenizer("bytes")("one\n\ntwo", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer("bytes"), ["\n\n\n", "x"])
    assert [stream.push([token]) for token in ids] == ["o", "n", "e", "", "", "\n\nt", "w", "o"]
    assert (stream.flush(), stream.stop_text) == ("", None)


def test_a_stop_string_may_be_a_special_token_or_span_one():
    ids = tokenizer("tiny-r1")("so</think>\n\nthe", add_special_tokens=False)["input_ids"]
    for stop in ("</think>", "o</th", "k>\n\n"):
        stream = TextStream(tokenizer("tiny-r1"), [stop])
        assert stream.push(ids) + stream.flush() == "so</think>\n\nthe".split(stop)[0]
        assert stream.stop_text == stop


def test_after_a_stop_string_nothing_comes():
    ids = tokenizer("bytes")("ab", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer("bytes"), ["b"])
    assert stream.push(ids) == "a"
    assert (stream.push(ids), stream.flush(), stream.tokens, stream.text) == ("", "", 2, "a")


def test_half_a_character_at_the_end_shows_as_the_replacement():
    half = tokenizer("bytes")("—", add_special_tokens=False)["input_ids"][:2]
    stream = TextStream(tokenizer("bytes"), ["\ufffdx"])
    assert (stream.push(half), stream.flush()) == ("", "\ufffd")
    ended = TextStream(tokenizer("bytes"), ["\ufffd"])
    assert (ended.push(half), ended.flush(), ended.stop_text) == ("", "", "\ufffd")


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="stop string is empty"):
        TextStream(tokenizer("bytes"), ["a", ""])


@settings(max_examples=100, deadline=None)
@given(st.text("é— \nthecats", max_size=30), st.data())
def test_a_tokenizer_that_is_not_byte_level_works_too(text, data):
    ids = tokenizer("sentencepiece").backend_tokenizer.encode(text.replace(" ", "▁"), add_special_tokens=False).ids
    stream = TextStream(tokenizer("sentencepiece"))
    shown = "".join(stream.push(chunk) for chunk in deal(data, ids)) + stream.flush()
    assert shown == decoded("sentencepiece", ids)


def test_a_long_text_costs_its_length():
    """Decoding anew at each step would take minutes for this; a stop string of any length is cheap too."""
    ids = tokenizer("bytes")("a" * 20_000, add_special_tokens=False)["input_ids"]
    start = time.perf_counter()
    stream = TextStream(tokenizer("bytes"), ["a" * 15_000 + "b", "aab"])
    for token in ids:
        stream.push([token])
    stream.flush()
    assert stream.text == "a" * 20_000
    assert time.perf_counter() - start < 5


def test_published_texts_of_many_scripts():
    """The texts that llama.cpp tests tokenizers with."""
    file = DATA / "tokenizers" / "test_vectors" / "llama-bpe.inp"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    text = file.read_text(encoding="utf-8")
    for name in REAL:
        ids = tokenizer(name)(text, add_special_tokens=False)["input_ids"]
        stream = TextStream(tokenizer(name))
        assert "".join(stream.push([token]) for token in ids) + stream.flush() == decoded(name, ids)
