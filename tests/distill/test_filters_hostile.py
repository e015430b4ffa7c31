"""No text brings a filter down, makes it slow, or changes what it says of the other traces in the batch."""

import json
import random
import time
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.filters import ASKING, ORDER, filter_module
from distill.filters.words import LONGEST_WORD, cut_words, stretch_hashes
from distill.recipe import Filters
from tests.distill.small_run import problem, trace

TEXTS = {
    "empty": "",
    "blank": " \n\t " * 1000,
    "a megabyte without a blank": "a" * 1_000_000,
    "a megabyte on one line": "so we see that " * 70_000,
    "NUL": "\0" * 1000 + "so\0it\0is",
    "lone surrogates": "half \ud800 and \udfff half" * 50,
    "right to left": "‮שלום עולם‬ مرحبا بالعالم " * 50,
    "emoji": "👩‍👩‍👧‍👦🇺🇳😀" * 300,
    "combining": "Z̷̢̛͇a̶̡͝l̵̨͠g̸̢͝o̷̧͠ " * 100,
    "braces": "{" * 100_000,
    "dollars": "$" * 50_001,
    "backslashes": "\\" * 50_001,
    "fences": "```" * 20_001,
    "open formulas": "\\[ x " * 20_000,
    "open boxes": "\\boxed{" * 10_000,
    "angles": "<｜" * 30_000 + "<|" * 30_000,
    "think tags": "<think>" * 2000 + "</think>" * 2000,
    "zero width": "a\u200b\u200c\u200d\ufeffb " * 2000,
    "other line ends": "one\r\ntwo\x85three\u2028four\u2029five" * 500,
    "end of a character cut off": "caf\u00e9" * 100 + "\u00e9",
    "numbers": "1234567890 " * 5000,
    "one of each": "".join(map(chr, range(1, 0xD800, 7))),
}


def chosen(name, folder):
    if name == "truncation":
        return None
    model = get_args(Filters.model_fields[name].annotation)[0]
    if name != "decontamination":
        return model()
    return model(against=[{"source": str(folder / "bench.jsonl")}])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With an evaluation set that is as bad, but for what is refused when it is read."""
    path = tmp_path_factory.mktemp("sets")
    texts = [text[:3000] for text in TEXTS.values() if "\ud800" not in text]
    (path / "bench.jsonl").write_text("".join(json.dumps({"problem": f"What is {t} then?"}) + "\n" for t in texts))
    return path


@pytest.mark.parametrize("what", TEXTS)
@pytest.mark.parametrize("name", [name for name in ORDER if name not in ASKING])  # have their own tests
def test_hostile_texts(name, what, folder):
    text = TEXTS[what]
    usual = "Let me think about 2 and 2. It is 4, I think.\n</think>\n\nSo it is \\boxed{4}."
    of, other = {**problem(), "id": "hostile", "problem": text}, problem(answer=None)
    traces = [
        trace(other, usual),
        trace(of, f"{text}\n</think>\n\n{text[:5000]} \\boxed{{4}}"),
        trace(of, text[:5000], 1, "length"),
        trace(other, f"x</think>{text[:5000]}", 2),
        trace(other, f"{text[:5000]}</think>{text[-100:]}", 3, "unknown"),
    ]
    problems = {p["id"]: p for p in (of, other)}
    module, settings_ = filter_module(name), chosen(name, folder)
    start = time.process_time()
    found = module.check(traces, problems, settings_)
    assert time.process_time() - start < 20
    assert len(found) == len(traces) and all(isinstance(v.reason, str) and len(v.reason) < 2000 for v in found)
    assert all(isinstance(v.passed, bool) for v in found)
    [alone] = module.check(traces[:1], problems, settings_)
    if name not in ("agreement", "outliers"):
        assert found[0] == alone


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.characters(), max_size=80), max_size=6))
def test_words_cover_the_text_and_do_not_depend_on_the_batch(texts):
    together = cut_words(texts)
    for text, words in zip(texts, together, strict=True):
        [alone] = cut_words([text])
        assert (alone.start.tolist(), alone.end.tolist()) == (words.start.tolist(), words.end.tolist())
        assert alone.hash.tolist() == words.hash.tolist() and alone.kind.tolist() == words.kind.tolist()
        data = text.encode("utf-8", "surrogatepass")
        covered = bytearray(data)
        previous = 0
        for begin, stop in zip(words.start.tolist(), words.end.tolist(), strict=True):
            assert previous <= begin < stop <= begin + 4 * LONGEST_WORD
            covered[begin:stop] = b" " * (stop - begin)
            previous = stop
        assert not covered.decode("utf-8", "replace").strip()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "Ä", "数", "+", "12", "x_1"]), max_size=40), st.integers(1, 6))
def test_equal_stretches_have_equal_hashes_and_others_have_not(words, length):
    [found] = cut_words([" ".join(words)])
    hashes = stretch_hashes(found.hash, length).tolist()
    stretches = [tuple(words[i : i + length]) for i in range(max(len(words) - length + 1, 0))]
    assert len(hashes) == len(stretches)
    assert len(set(zip(hashes, stretches, strict=True))) == len(set(hashes)) == len(set(stretches))


def test_words():
    text = "a+b=12, isn't 数学 naïve x_1 Привет 3.5 ½ “q”"
    [found] = cut_words([text])
    assert found.text(0, len(found)).split(" ") == [
        "a", "+", "b", "=", "12", ",", "isn", "'", "t", "数", "学", "naïve", "x_1", "Привет", "3", ".", "5", "½",
        "“", "q", "”",
    ]  # fmt: skip
    [upper], [lower] = cut_words(["WAIT"]), cut_words(["wait"])
    assert upper.hash.tolist() == lower.hash.tolist()
    [long] = cut_words(["é" * 100])
    assert len(long) == 100


def test_groups_of_texts_are_cut_as_each_alone():
    pick = random.Random(0)
    texts = ["".join(pick.choices("ab \n$é数", k=pick.randrange(30_000))) for _ in range(12)]
    for together, text in zip(cut_words(texts), texts, strict=True):
        [alone] = cut_words([text])
        assert (together.hash == alone.hash).all() and (together.start == alone.start).all()
