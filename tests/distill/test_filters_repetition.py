"""Repetition: loops are found where they are; real reasoning and digit-by-digit arithmetic are not taken for loops."""

import gzip
import json
import os
import random
from importlib import import_module
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.filters.repetition import check, find_loop, repeats
from distill.filters.words import cut_words
from distill.recipe import RepetitionFilter
from tests.distill.small_run import problem, trace

DATA = Path(os.environ.get("DISTILL_DATA", Path(__file__).resolve().parents[2] / ".." / "shared" / "data"))
needs_data = pytest.mark.skipif(not (DATA / "traces").is_dir(), reason="no real traces (DISTILL_DATA)")
DEFAULT = RepetitionFilter()


def verdict(text, chosen=DEFAULT):
    of = problem()
    [found] = check([trace(of, f"{text}\n</think>\n\n\\boxed{{4}}")], {of["id"]: of}, chosen)
    return found


def prose(words, seed=0):
    """Words as they come in prose: few of them often, and no stretch of 16 twice."""
    pick = random.Random(seed)
    return [f"w{int(pick.paretovariate(0.7)) % 5000}" for _ in range(words)]


@pytest.mark.parametrize(("period", "times"), [(1, 40), (3, 15), (12, 5), (40, 4), (200, 3)])
@pytest.mark.parametrize("before", [0, 300])
def test_a_loop_is_found_where_it_is(period, times, before):
    text, unit = prose(before), [f"u{n}" for n in range(period)]
    words = text + unit * times + prose(300, seed=1)
    [cut] = cut_words([" ".join(words)])
    found = find_loop(cut, *repeats(cut.hash, 16), 16)
    assert (found.start, found.end, found.period) == (before, before + period * times, period)
    assert found.times == pytest.approx(times)
    said = verdict(" ".join(words))
    assert not said.passed
    assert f"a loop at words {before + 1} to {before + period * times} of" in said.reason
    assert f"{period} words said {times} times, 'u0" in said.reason


def test_a_text_that_starts_to_loop_and_is_cut_in_mid_loop():
    words = prose(200) + ["Wait", ",", "let", "me", "check", "again", "."] * 9 + ["Wait", ","]
    assert "7 words said 9.29 times, 'Wait , let me check again .'" in verdict(" ".join(words)).reason


def test_circles_that_are_no_loop_count_by_their_share():
    paragraphs = [prose(30, seed=n) for n in range(6)]
    order = [0, 1, 2, 3, 4, 5, 2, 0, 4, 1, 3, 5, 1, 0]
    words = [word for n in order for word in paragraphs[n]]
    said = verdict(" ".join(words))
    assert not said.passed and "of the stretches of 16 words are repeats" in said.reason
    assert verdict(" ".join(words), RepetitionFilter(max_share=0.9)).passed


def test_checking_a_passage_once_is_no_loop():
    words = prose(400)
    assert verdict(" ".join(words + words[100:150] + prose(100, seed=1))).passed


def test_a_drawn_line_is_no_loop():
    assert verdict(" ".join(prose(400)) + "\n|" + "---|" * 12 + "\n" + "=" * 60).passed


def test_text_without_blanks():
    assert not verdict("等一下我再想想。" * 12).passed
    assert not verdict("a" * 5000).passed
    assert not verdict("!" * 3000).passed
    assert not verdict("lalelu" * 500).passed


@pytest.mark.parametrize("text", ["", "4", "one two three", "\n" * 50])
def test_short_texts_pass(text):
    assert verdict(text).passed


@settings(max_examples=60)
@given(st.lists(st.sampled_from("abc"), max_size=80), st.integers(2, 5))
def test_repeats_equal_a_direct_search(words, ngram):
    last, direct = {}, []
    for i in range(max(len(words) - ngram + 1, 0)):
        stretch = tuple(words[i : i + ngram])
        if stretch in last:
            direct.append((i, i - last[stretch]))
        last[stretch] = i
    [cut] = cut_words([" ".join(words)])
    starts, distances = repeats(cut.hash, ngram)
    assert list(zip(starts.tolist(), distances.tolist(), strict=True)) == direct


def worked(count):
    """What tiny-r1 is taught to write on the quickstart's problems."""
    from distill.problems import reasoning_gym_problems
    from distill.recipe_load import load_recipe

    families = load_recipe("quickstart").problems.families
    for p in islice(reasoning_gym_problems(families, 0, "train"), count):
        solver = import_module(f"distill.worked.{p['meta']['family']}")
        yield "\n".join(solver.solve(p["problem"]).lines)


def test_digit_by_digit_arithmetic_is_no_repetition():
    lines = (
        "98+93=(98+93) 98+93: 8+3+0=11 9+9+1=19 =191 191\n191-77=(191-77) 191-77: 1-7-0=14 9-7-1=01 1-0-0=01 =114 114"
    )
    assert verdict(lines).passed
    rejected = [found.reason for text in worked(600) if not (found := verdict(text)).passed]
    assert len(rejected) <= 1, rejected


def real_traces(name):
    with gzip.open(DATA / "traces" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["response"] for line in file]


@needs_data
def test_real_traces_pass():
    texts = real_traces("r1_normal") + real_traces("others_normal")
    rejected = [found.reason for text in texts if not (found := verdict(text)).passed]
    assert len(texts) == 1292 and len(rejected) <= 6, rejected


@needs_data
def test_loops_spliced_into_real_traces_are_found():
    pick = random.Random(0)
    missed = total = 0
    for text in real_traces("r1_normal"):
        words = text.partition("</think>")[0].split(" ")
        if len(words) < 120:
            continue
        for period, times in ((5, 10), (10, 5), (20, 4), (60, 3)):
            at = pick.randrange(len(words) - period)
            looped = words[:at] + words[at : at + period] * times + words[at + period :]
            total += 1
            missed += verdict(" ".join(looped)).passed
    assert total > 1000 and missed / total <= 0.005, f"{missed} of {total} loops missed"
