"""Each filter alone: what passes, what does not, and a reason that says what was found."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from distill.filters import (
    COMPARING,
    ORDER,
    correctness,
    duplicates,
    filter_module,
    length,
    readability,
    reflection,
    truncation,
)
from distill.filters import format as format_filter
from distill.recipe import (
    CorrectnessFilter,
    DuplicatesFilter,
    Filters,
    FormatFilter,
    LengthFilter,
    ProblemSource,
    ReadabilityFilter,
    ReflectionFilter,
)
from distill.records import Verdict
from tests.distill.small_run import problem, trace

DATA = Path(os.environ.get("DISTILL_DATA", Path(__file__).resolve().parents[2] / ".." / "shared" / "data"))


def judge(module, traces, problems=None, settings=None):
    problems = problems or [problem()]
    return module.check(traces, {p["id"]: p for p in problems}, settings)


def one(module, text, settings, of=None, end="stop"):
    of = of or problem()
    [verdict] = judge(module, [trace(of, text, end=end)], [of], settings)
    return verdict


def default_settings(name, folder):
    if name == "truncation":
        return None
    (folder / "bench.jsonl").write_text('{"problem": "What is it?"}\n')
    source = ProblemSource(source=str(folder / "bench.jsonl"))
    judge = {"base_url": "http://127.0.0.1:9/v1", "model": "nobody"}
    given = {"decontamination": {"against": [source]}, "quality": {"judge": judge}}.get(name, {})
    return get_args(Filters.model_fields[name].annotation)[0](**given)


def test_every_filter_has_the_same_interface(tmp_path):
    assert set(ORDER) == {"truncation", *Filters.model_fields} and ORDER[-len(COMPARING) :] == COMPARING
    for name in ORDER:
        module = filter_module(name)
        assert callable(module.check) and isinstance(module.VERSION, int)
        assert judge(module, [], settings=default_settings(name, tmp_path)) == []


@pytest.mark.parametrize(
    ("end", "passed", "reason"),
    [
        ("stop", True, "ended by itself"),
        ("length", False, r"cut off after 6 tokens \(max_tokens 64\)"),
        ("prompt_too_long", False, "never sent: the prompt of 5 tokens"),
        ("unknown", True, "ended, as far as the text shows"),
        ("content_filter", False, "did not end by itself: content_filter"),
    ],
)
def test_truncation(end, passed, reason):
    import re

    verdict = one(truncation, "2 and 2 is 4.\n</think>\n\n\\boxed{4}", None, end=end)
    assert verdict.passed == passed and re.match(reason, verdict.reason)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x</think>The answer is **$1,430**", "ended"),
        ("x</think>So it is \\(\\boxed{27}\\) puppies.**", "ended"),
        ("x</think>\\[ \\boxed{4} \\]", "ended"),
        ("x</think>Total: 5 + 6 =", "cut off, it seems: it ends in 'Total: 5 + 6 ='"),
        ("x</think>First we find the", "cut off, it seems: it ends in"),
        ("x</think>Adding these amounts together", "cut off, it seems: it ends within a sentence"),
        ("x</think>\\boxed{4}\n\nLet me know if you want more", "ended"),
        ("x</think>**Answer:** it is the fourth one", "ended"),
        ("x</think>Answer: There are 4 of them. Therefore the number of tiles", "cut off, it seems: it ends within"),
        ("x</think>- the first step\n- the second one of them", "ended"),
        ("x</think>\\[ 5 + 6", "cut off, it seems: a formula is open"),
        ("x</think>```python\nprint(1)", "cut off, it seems: a code block is open"),
        ("Wait, let me", "cut off, it seems: the thinking never closes"),
        ("x</think>", "cut off, it seems: nothing after"),
    ],
)
def test_an_end_that_nobody_recorded_is_judged_by_the_text(text, reason):
    verdict = one(truncation, text, None, end="unknown")
    assert verdict.reason.startswith(reason) and verdict.passed == (reason == "ended")


@pytest.mark.parametrize(
    "text",
    [
        "a\n</think>\n\nSo \\boxed{4}.",
        "<think>\na\n</think>\n\n\\boxed{4}",
        "  <think>a</think>\\boxed{\\frac{1}{2}}",
        "if a<b then 3|x, [x] and <x> stay\n</think>\n\n\\boxed{4}",
        "the bars <| and |> alone, a < s > b\n</think>\n\n\\boxed{4}",
    ],
)
def test_format_accepts(text):
    assert one(format_filter, text, FormatFilter()) == Verdict(True, "one think block, then an answer")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a \\boxed{4}", "the thinking never closes"),
        ("a </think> b </think> \\boxed{4}", "2 closing </think> tags, expected one"),
        ("<think><think> a </think> \\boxed{4}", "the thinking opens again at character 7"),
        ("a <think> b </think> \\boxed{4}", "the thinking opens again at character 2"),
        ("a </think> \\boxed{4} <think>", "the thinking opens again at character 21"),
        ("a <｜User｜> b </think> \\boxed{4}", "template token <｜User｜> at character 2"),
        ("a </think> \\boxed{4}<｜end▁of▁sentence｜>", "template token <｜end▁of▁sentence｜> at character 20"),
        ("a </think> \\boxed{4}<|im_end|>", "template token <|im_end|> at character 20"),
        ("a </think> \\boxed{4}<|im_start|>user", "template token <|im_start|>"),
        ("a <|eot_id|> </think> \\boxed{4}", "template token <|eot_id|>"),
        ("[INST] a </think> \\boxed{4}", "template token [INST] at character 0"),
        ("a </think> \\boxed{4}</s>", "template token </s>"),
        ("a <end_of_turn> </think> \\boxed{4}", "template token <end_of_turn>"),
        ("  </think> \\boxed{4}", "the reasoning is empty"),
        ("a </think> ", "nothing after </think>"),
        ("a \\boxed{4} </think> It is 4.", "no \\boxed{} after </think>; there is one in the reasoning"),
        ("a </think> It is 4.", "no \\boxed{} after </think>"),
        ("a </think> \\boxed{4", "no \\boxed{} after </think>"),
        ("a </think> \\boxed{ }", "the \\boxed{} after </think> is empty"),
    ],
)
def test_format_rejects_and_says_what_it_found(text, reason):
    verdict = one(format_filter, text, FormatFilter())
    assert not verdict.passed and verdict.reason.startswith(reason)


def test_format_asks_for_a_box_only_where_an_answer_is_graded_by_it():
    text = "Let me think.\n</think>\n\nDear reader, ..."
    assert one(format_filter, text, FormatFilter(), problem(kind="open")).passed
    assert one(format_filter, text, FormatFilter(), problem(kind="code")).passed
    assert not one(format_filter, text, FormatFilter(), problem(kind="exact")).passed
    assert one(format_filter, "a</think>\n\nAnswer: B", FormatFilter(), problem(kind="choice")).passed


@pytest.mark.skipif(not (DATA / "traces").is_dir(), reason="no real traces (DISTILL_DATA)")
def test_format_of_real_r1_traces_lacks_nothing_but_boxes():
    # Asked without the boxed instruction; one of the 323 is an error message of the service instead of a trace.
    with gzip.open(DATA / "traces" / "r1_normal.jsonl.gz", "rt", encoding="utf-8") as file:
        replies = [json.loads(line)["response"] for line in file]
    of = problem()
    found = judge(format_filter, [trace(of, reply, k) for k, reply in enumerate(replies)], [of], FormatFilter())
    reasons = Counter(verdict.reason for verdict in found if not verdict.passed)
    assert reasons == {"no \\boxed{} after </think>": 30, "the thinking never closes": 1}


def test_length_bounds():
    of = problem()
    text = "one two three four five\n</think>\n\n\\boxed{4}"
    few, many = "5 reasoning tokens, fewer than 6", "5 reasoning tokens, more than 4"
    assert one(length, text, LengthFilter(max_reasoning_tokens=5), of) == Verdict(True, "5 reasoning tokens")
    assert one(length, text, LengthFilter(max_reasoning_tokens=4), of) == Verdict(False, many)
    assert one(length, text, LengthFilter(min_reasoning_tokens=6), of) == Verdict(False, few)
    assert one(length, text, LengthFilter(), of).passed
    assert not one(length, "</think>\\boxed{4}", LengthFilter(), of).passed


def test_correctness():
    word = problem("Spell abc backward.", "cba", "exact")
    half = problem("Half of one?", "\\frac{1}{2}")
    none = problem("Why?", None)
    cases = [
        (problem(), "x</think>\\boxed{4}", "stop", True, "correct: 4 = 4"),
        (problem(), "x</think>\\boxed{4.0}", "stop", True, "correct: 4.0 = 4"),
        (problem(), "x</think>\\boxed{5}", "stop", False, "wrong: 5 ≠ 4"),
        (problem(), "\\boxed{4}</think>nothing", "stop", False, "wrong: no answer"),
        (problem(), "x</think>\\boxed{4}", "length", False, "wrong: did not end by itself"),
        (half, "x</think>\\boxed{0.5}", "stop", True, "correct: 0.5 = \\frac{1}{2}"),
        (word, "x</think>\\boxed{cba}", "stop", True, "correct: cba = cba"),
        (word, "x</think>\\boxed{abc}", "stop", False, "wrong: abc ≠ cba"),
        (problem(), "x</think>\\boxed{4}", "unknown", True, "correct: 4 = 4"),
        (none, "x</think>\\boxed{4}", "stop", False, "unverifiable: the problem has no reference answer"),
    ]
    traces = [trace(of, text, sample, end) for sample, (of, text, end, *_) in enumerate(cases)]
    verdicts = judge(correctness, traces, [problem(), word, half, none], CorrectnessFilter())
    for verdict, (*_, passed, reason) in zip(verdicts, cases, strict=True):
        assert verdict.passed == passed and verdict.reason.startswith(reason), (verdict, reason)


def test_without_a_reference_a_recipe_may_leave_the_judgement_to_agreement():
    none = problem("Why?", None)
    traces = [trace(none, "x</think>\\boxed{4}"), trace(none, "x</think>\\boxed{4}", 1, "length"), trace(problem())]
    found = judge(correctness, traces, [none, problem()], CorrectnessFilter(without_reference="pass"))
    assert [v.passed for v in found] == [True, False, True]
    assert found[0].reason == "not judged: the problem has no reference answer"


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("\\boxed{4} and again \\boxed{ 4 }", None),
        ("\\boxed{\\frac{1}{2}} or \\boxed{0.5}", "2 different answers are boxed: \\frac{1}{2}, then 0.5"),
        ("\\boxed{11}, \\boxed{9}, \\boxed{4}", "3 different answers are boxed: 11, then 9"),
    ],
)
def test_a_single_answer_on_request(response, reason):
    text = f"x</think>{response}"
    assert one(format_filter, text, FormatFilter()).passed
    verdict = one(format_filter, text, FormatFilter(single_answer=True))
    assert verdict.passed == (reason is None) and (reason is None or verdict.reason == reason)


def test_readability():
    long = "word " * 401
    assert one(readability, f"{long[:-5]}</think>\\boxed{{4}}", ReadabilityFilter()).passed
    verdict = one(readability, f"so\n\n{long}\n\nthen</think>\\boxed{{4}}", ReadabilityFilter())
    assert verdict.reason == f"a paragraph of 401 words, more than 400: '{'word ' * 8}...'"
    assert one(readability, long, ReadabilityFilter(max_paragraph_words=None)).passed
    code = "Let me run it.\n```python\nprint(4)\n```\n</think>\\boxed{4}"
    assert one(readability, code, ReadabilityFilter()).reason == "a code block at character 15 of the reasoning"
    assert one(readability, code, ReadabilityFilter(code_blocks=True)).passed
    assert one(readability, code, ReadabilityFilter(), problem(kind="code")).passed


def test_reflection_is_measured_and_rejects_nothing():
    text = (
        "So it is 4. Wait, let me check that again. 2 and 2. Hmm, let me double-check: 5? No, that's wrong. "
        "Alternatively, I can count. Hold on. On second thought it is 4.\n</think>\n\n\\boxed{4}"
    )
    verdict = one(reflection, text, ReflectionFilter())
    counts = {name: verdict.measured[name] for name in reflection.MARKERS}
    assert verdict.passed and counts == {"wait": 3, "check": 2, "alternative": 1, "backtrack": 2}
    assert "wait 3, check 2, alternative 1, backtrack 2" in verdict.reason
    assert one(reflection, "It is 4.\n</think>\n\n\\boxed{4}", ReflectionFilter()).reason == "0 a 1,000 words (none)"


def test_duplicates_keep_the_first_with_the_same_reasoning_for_the_same_problem():
    first, other = problem("A?"), problem("B?")
    texts = [
        "Same  Thoughts\n</think>\n\n\\boxed{4}",
        "same thoughts</think>It is \\boxed{4}",
        "other</think>\\boxed{4}",
    ]
    traces = [trace(first, text, sample) for sample, text in enumerate(texts)] + [trace(other, texts[0])]
    verdicts = judge(duplicates, traces, [first, other], DuplicatesFilter())
    assert [v.passed for v in verdicts] == [True, False, True, True]
    assert verdicts[1].reason == f"same reasoning as sample 0 (trace {traces[0]['id']})"
