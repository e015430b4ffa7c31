r"""Verdicts on final answers, on ordinary and on hostile output."""

import gzip
import json
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from evals.grading import extract_answer, grade, grade_many
from evals.grading.exact import exactly_equal, number
from evals.grading.pool import Pool, shared_pool
from tests.bench.grading import hostile_answer

DATA = Path(os.environ.get("DISTILL_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"<think>\boxed{1}</think>\boxed{2}", "2"),
        (r"reasoning \boxed{1}</think> nothing", None),
        (r"<think>never closed \boxed{1}", None),
        (r"a</think>b \boxed{1} </think> c \boxed{3}", "3"),
        (r"\boxed{4} and \boxed{5", "4"),
        (r"\boxed{unbalanced", None),
        (r"}}} \boxed{6} {{{", "6"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed { 8 }", "8"),
        ("no box at all: 9", None),
        ("", None),
        (r"\boxed{}", ""),
        ("nul \x00 \\boxed{a\x00b}", "a\x00b"),
    ],
)
def test_the_last_balanced_box_after_the_reasoning_is_the_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "reference", "kind", "verdict"),
    [
        ("5", "5", "math", "correct"),
        ("6", "5", "math", "wrong"),
        ("1,234", "1234", "math", "correct"),
        ("1{,}234", "1234", "math", "correct"),
        ("5.0", "5", "math", "correct"),
        ("0.5", "1/2", "math", "correct"),
        (r"\dfrac{3}{6}", r"\frac12", "math", "correct"),
        ("\u2212 7", "-7", "math", "correct"),
        ("007", "7", "math", "correct"),
        (r"\text{Evelyn}", "Evelyn", "math", "correct"),
        ("", "5", "math", "wrong"),
        (r"\sqrt{16}", "4", "math", "correct"),
        (r"(x+1)^2", "x^2+2x+1", "math", "correct"),
        (r"(3, \pi/2)", r"\left( 3, \frac{\pi}{2} \right)", "math", "correct"),
        ("0.333333", "1/3", "math", "correct"),
        ("0.33", "1/3", "math", "wrong"),
        ("dog", "5", "math", "wrong"),
        ("god", "god", "exact", "correct"),
        ("  go\n d ", "go d", "exact", "correct"),
        ("God", "god", "exact", "wrong"),
        (r"\text{god}", "god", "exact", "correct"),
        ("B", "B", "choice", "correct"),
        (r"\text{(B)}", "B", "choice", "correct"),
        ("B. blue", "b", "choice", "correct"),
        ("C", "B", "choice", "wrong"),
        ("Blue", "B", "choice", "wrong"),
        ("B", "blue", "choice", "unverifiable"),
        ("5", None, "math", "unverifiable"),
        ("5", "5", "open", "unverifiable"),
        ("5", "5", "code", "wrong"),
    ],
)
def test_verdicts(answer, reference, kind, verdict):
    assert grade(f"\\boxed{{{answer}}}", reference, kind).verdict == verdict


def test_no_box_is_wrong_with_that_reason_and_choices_may_be_stated_in_words():
    assert grade("the answer is 5", "5").reason == "no answer"
    assert grade("Answer: B", "B", "choice").verdict == "correct"
    assert grade("so the answer is (C).", "B", "choice").verdict == "wrong"
    with pytest.raises(ValueError, match="unknown kind of problem 'maths'"):
        grade("5", "5", "maths")


def test_plain_numbers_never_reach_a_worker_process(monkeypatch):
    monkeypatch.setattr(Pool, "compare", lambda *_: pytest.fail("a plain number went to math-verify"))
    rng = random.Random(0)
    for _ in range(300):
        a, b = rng.randint(-(10**6), 10**6), rng.randint(-(10**6), 10**6)
        assert grade(f"\\boxed{{{a:,}}}", str(a)).verdict == "correct"
        assert grade(f"\\boxed{{{a}}}", str(b)).verdict == ("correct" if a == b else "wrong")
        assert number(f"{a}/{max(1, abs(b))}") * max(1, abs(b)) == a


def test_the_exact_path_agrees_with_math_verify_where_it_decides():
    from evals.grading.worker import compare

    texts = [
        "5",
        "-5",
        "0.5",
        "1/2",
        r"\frac{1}{2}",
        "3.0",
        "1,000",
        "1000",
        "12/4",
        r"\frac34",
        "0.75",
        "2/3",
        "0.6667",
    ]
    for answer in texts:
        for reference in texts:
            decided = exactly_equal(answer, reference)
            if decided is not None:
                assert decided == (compare(answer, reference)[0] == "correct"), (answer, reference)


HOSTILE = {
    "tower": (r"9^{9^{9^9}}", {"unverifiable", "wrong"}),
    "factorial": (r"(10^{10})!!!", {"unverifiable", "wrong"}),
    "1 MB of digits": ("9" * 1_000_000, {"unverifiable"}),
    "1 MB of braces": ("{" * 500_000 + "}" * 500_000, {"unverifiable"}),
    "10,000 nested": ("{" * 10_000 + "5" + "}" * 10_000, {"unverifiable"}),
    "100 nested brackets": ("(" * 100 + "x" + ")" * 100, {"unverifiable"}),
    "nested fractions": (r"\frac{1}{" * 35 + "x" + "}" * 35, {"unverifiable", "wrong"}),
    "NUL": ("\x00\x005\x00+", {"wrong", "unverifiable"}),
    "unbalanced LaTeX": (r"\frac{1}{\left(", {"wrong", "unverifiable"}),
    "right to left": ("\u202e5\u202c + \u200b", {"wrong", "unverifiable"}),
    "lone surrogate": ("\ud800 + x", {"wrong", "unverifiable"}),
    "newline in protocol": ('5"}\n{"answer": "5', {"wrong", "unverifiable"}),
    "import": ("__import__('os').system('touch pwned')", {"wrong", "unverifiable"}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_neither_hang_nor_crash_nor_win(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer, verdicts = HOSTILE[name]
    start = time.monotonic()
    result = grade(f"\\boxed{{{answer}}}", "1234567", timeout=1.0)
    assert time.monotonic() - start < 20  # 1 s, and a fresh worker's start on a busy machine
    assert result.verdict in verdicts
    assert not list(tmp_path.iterdir())
    assert grade(r"\boxed{\sqrt{16}}", "4").verdict == "correct"  # the next item finds a working process


def test_no_answer_from_a_generator_of_harm_hangs_crashes_or_wins():
    rng = random.Random(1)
    for _ in range(40):
        answer, start = hostile_answer(rng), time.monotonic()
        graded = grade(f"\\boxed{{{answer}}}", rng.choice(["5", r"\frac{1}{2}", "(1, 2)", "x^2 + 1"]), timeout=0.3)
        assert time.monotonic() - start < 10 and graded.verdict != "correct", answer[:100]


def test_extraction_is_linear_in_hostile_text():
    nested = r"\boxed{" * 300_000
    for text in (nested, nested + "}" * 300_000, r"\boxed{}" * 100_000, "\\" * 1_000_000 + "boxed{"):
        start = time.monotonic()
        extract_answer(text)
        assert time.monotonic() - start < 5
    assert extract_answer(r"\boxed{" + "{a}{{b}}" * 1000 + "}}} {}") == "{a}{{b}}" * 1000


def test_the_caller_is_answered_within_the_limit_and_a_killed_worker_ends():
    pool = Pool(1)
    pool.compare("x", "y", 5.0)  # imports
    waited, pids = [], set()
    for _ in range(6):
        pool.compare(r"\sqrt{16}", "4", 5.0)  # a fresh worker after each kill
        pids.add(pool._free[0].pid)
        start = time.monotonic()
        verdict, reason = pool.compare("9^{9^{9^9}}", "5", 0.4)
        waited.append(time.monotonic() - start)
        assert (verdict, reason) == ("unverifiable", "took longer than 0.4 s to compare")
    assert len(pids) == 6 and sorted(waited)[3] < 0.4  # the machine may be busy once or twice
    pool.close()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_killed_worker_is_replaced_and_no_other_item_is_lost():
    items = [(f"\\boxed{{\\sqrt{{{n * n}}}}}", str(n), "math") for n in range(1, 9)]
    items.insert(3, (r"\boxed{9^{9^{9^9}}}", "5", "math"))
    before = {worker.pid for worker in shared_pool()._free}
    results = grade_many(items, workers=2, timeout=2.0)
    assert [r.verdict for r in results] == ["correct"] * 3 + ["unverifiable"] + ["correct"] * 5
    assert "longer than 2 s" in results[3].reason
    assert {worker.pid for worker in shared_pool()._free} != before


def test_a_worker_that_dies_idle_costs_no_verdict():
    grade_many([(r"\boxed{\sqrt{16}}", "4", "math")] * 4)
    for worker in shared_pool()._free:
        os.kill(worker.pid, signal.SIGKILL)
    assert [grade(r"\boxed{\sqrt{16}}", "4").verdict for _ in range(4)] == ["correct"] * 4
    shared_pool()._template.process.kill()  # and so may the process that workers come from
    os.kill(shared_pool()._free[0].pid, signal.SIGKILL)
    assert [grade(r"\boxed{\sqrt{16}}", "4").verdict for _ in range(4)] == ["correct"] * 4


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr("evals.grading.pool.MEMORY_BYTES", 1 << 29)
    pool = Pool(1)
    verdict, _ = pool.compare(r"\binom{10^{9}}{5 \cdot 10^{8}}", "5", 5.0)
    assert verdict in ("unverifiable", "wrong")
    assert pool.compare(r"\sqrt{16}", "4", 5.0)[0] == "correct"
    pool.close()


def test_works_from_many_threads_at_once():
    errors = []

    def check(n: int) -> None:
        graded = grade(f"\\boxed{{{n} + \\sqrt{{4}}}}", str(n + 2))
        if graded.verdict != "correct":
            errors.append(graded)

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(check, range(60)))
    assert not errors
    assert len(shared_pool()._free) <= shared_pool().size
    assert threading.active_count() < 40


def test_workers_hold_no_secrets_of_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    pool = Pool(1)
    pool.compare("x", "y", 5.0)
    for pid in (pool._free[0].pid, pool._template.process.pid):
        assert b"hunter2" not in Path(f"/proc/{pid}/environ").read_bytes()
    pool.close()


def test_real_r1_answers_are_graded_as_their_authors_say():
    path = DATA / "traces" / "r1_normal.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no real traces in {DATA}")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows = [row for row in rows if "Error after" not in row["response"]]
    graded = grade_many([(row["response"], row["answer"], "math") for row in rows])
    boxed = [(row, g) for row, g in zip(rows, graded, strict=True) if g.extracted is not None]
    assert len(boxed) > 200 and all(g.reason == "no answer" for g in graded if g.extracted is None)
    assert sum(g.verdict == "correct" for _, g in boxed) / len(boxed) > 0.9
    assert not [g for g in graded if g.verdict == "unverifiable"]
    labelled = [(row, g) for row, g in boxed if row["eval_result"] is not None]  # 1: matches the reference, by GPT-4o
    agree = sum((g.verdict == "correct") == (int(row["eval_result"]) == 1) for row, g in labelled)
    assert not labelled or agree / len(labelled) > 0.9
