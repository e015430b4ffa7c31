r"""Multiple choice, regular expressions, reasoning-gym's scorers, several boxes, and grading from async code."""

import asyncio
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from evals.grading import extract_answer, grade, grade_async, grade_many
from evals.grading.choice import choice_letter
from evals.grading.pool import TRIES, Pool, shared_pool


@pytest.mark.parametrize(
    ("text", "answer", "verdict"),
    [
        (r"\boxed{A}", "A", "correct"),
        (r"\boxed{\text{B}}", "B", "correct"),
        (r"\boxed{(C)}", "C", "correct"),
        (r"\boxed{\textbf{(D) } 12}", "D", "correct"),
        (r"\boxed{B: because}", "B", "correct"),
        (r"\boxed{Option B}", "B", "correct"),
        (r"\boxed{A}", "B", "wrong"),
        ("Answer: A", "A", "correct"),
        ("**Answer:** (b)", "B", "correct"),
        ("The correct answer is **C**.", "C", "correct"),
        ("The answer is option D", "D", "correct"),
        ("the answer is $\\text{B}$", "B", "correct"),
        ("I think that\n\n(A)", "A", "correct"),
        ("**C**", "C", "correct"),
        ("The answer is a dog.", "A", "wrong"),
        ("My answer: I do not know", "I", "wrong"),
        ("Answer: A\n... no, Answer: B", "B", "correct"),
        ("<think>Answer: A</think>Answer: B", "A", "wrong"),
        (r"\boxed{blue}", "B. blue", "correct"),
        (r"\boxed{\text{Blue}}", '{"answer": "B", "options": ["red", "blue"]}', "correct"),
        (r"\boxed{red}", '{"answer": "B", "options": ["red", "blue"]}', "wrong"),
        (r"\boxed{B}", '{"answer": "blue", "options": {"A": "red", "B": "blue"}}', "correct"),
        (r"\boxed{A, C}", "C, A", "correct"),
        (r"\boxed{A \text{ and } C}", "A, C", "correct"),
        (r"\boxed{A}", "A, C", "wrong"),
        (r"\boxed{A}", '{"answer": "purple", "options": ["red"]}', "unverifiable"),
        (r"\boxed{" + "A, " * 100_000 + "}", "A", "wrong"),
        (r"\boxed{(A) or (B)}", "A", "wrong"),
        (r"\boxed{A) or B)}", "A", "wrong"),
        (r"\boxed{A. Organic}", "A", "correct"),
        (r"\boxed{(A) or more}", "A", "correct"),
    ],
)
def test_choices(text, answer, verdict):
    start = time.monotonic()
    assert grade(text, answer, "choice").verdict == verdict
    assert time.monotonic() - start < 2


def test_no_sentence_is_a_letter():
    for text in ("an apple", "Because", "5", "", "(1)", "A man, a plan"):
        assert choice_letter(text) is None, text


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"$\boxed{3}$ and $\boxed{5}$", "3, 5"),
        (r"\boxed{3}, \boxed{5}", "3, 5"),
        (r"\[\boxed{3} \quad \text{or} \quad \boxed{5}\]", "3, 5"),
        (r"\boxed{3}. \boxed{3}", "3"),
        (r"first \boxed{3}, so the sum is \boxed{5}", "5"),
        (r"\boxed{3} and $y = \boxed{5}$", "5"),
        (r"\boxed{a \boxed{b} c}", r"a \boxed{b} c"),
    ],
)
def test_boxes_side_by_side_are_one_answer(text, box):
    assert extract_answer(text) == box


def test_a_hedge_is_no_answer():
    assert grade(r"\boxed{4} or \boxed{5}", "5").verdict == "wrong"
    assert grade(r"\boxed{4} and \boxed{5}", "5, 4").verdict == "correct"


def test_regular_expressions_match_the_whole_answer_and_cannot_hang():
    assert grade(r"\boxed{colour}", "colou?r", "regex").verdict == "correct"
    assert grade(r"\boxed{a colour}", "colou?r", "regex").verdict == "wrong"
    assert grade(r"\boxed{x}", "(", "regex").verdict == "unverifiable"
    start = time.monotonic()
    graded = grade("\\boxed{" + "a" * 40 + "!}", "(a+)+b", "regex", timeout=1.0)
    assert graded.verdict == "unverifiable" and "longer than 1 s" in graded.reason
    assert time.monotonic() - start < 10


def test_reasoning_gym_scores_its_own_families(tmp_path):
    import reasoning_gym

    for family in ("countdown", "spiral_matrix", "word_ladder", "zebra_puzzles", "knights_knaves", "arc_agi"):
        entry = reasoning_gym.create_dataset(family, size=1, seed=3)[0]
        reference = json.dumps(entry)
        right = grade(f"<answer>{entry['answer']}</answer>", reference, "reasoning-gym")
        assert right.verdict == "correct" and right.reason == "reasoning-gym scores 1", family
        assert grade(f"\\boxed{{{entry['answer']}}}", reference, "reasoning-gym").verdict == "correct"
        assert grade("<answer>no idea</answer>", reference, "reasoning-gym").verdict == "wrong"
    assert grade("<answer>1</answer>", "5", "reasoning-gym").verdict == "unverifiable"
    unknown = grade("<answer>1</answer>", '{"metadata": {"source_dataset": "no such"}}', "reasoning-gym")
    assert unknown.verdict == "unverifiable" and "no family no such" in unknown.reason


# Of these an entry has no answer to compare with: any that solves it is right. 'composite' is made of others.
WITHOUT_ANSWER = {"boxnet", "composite", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}


def test_every_family_of_reasoning_gym_scores_its_own_answer():
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    from evals.grading.worker import score

    assert DATASETS.keys() > WITHOUT_ANSWER and len(DATASETS) > 100
    wrong = {}
    for family in sorted(DATASETS.keys() - WITHOUT_ANSWER):
        entry = reasoning_gym.create_dataset(family, size=1, seed=3)[0]
        verdict, reason = score(str(entry["answer"]), json.dumps(entry, default=str))
        if verdict != "correct":
            wrong[family] = reason
    assert not wrong


def test_a_scorer_that_evaluates_the_answer_can_do_nothing_with_it(tmp_path):
    import reasoning_gym

    entry = json.dumps(reasoning_gym.create_dataset("spiral_matrix", size=1, seed=1)[0])
    hostile = [
        f"open({str(tmp_path / 'x')!r}, 'w')",
        f"__import__('os').mkdir({str(tmp_path / 'x')!r})",
        f"__import__('os').system('touch {tmp_path / 'x'}')",
        "__import__('socket').create_connection(('127.0.0.1', 9))",
        f"__import__('os').kill({os.getpid()}, 15)",
        "[0] * 10**10",
    ]
    for answer in hostile:
        assert grade(f"<answer>{answer}</answer>", entry, "reasoning-gym").verdict != "correct"
        assert shared_pool("gym").ask("gym", answer, entry, 5.0)[0] != "correct"  # also past the look at the text
    assert not list(tmp_path.iterdir())


def test_async_grading_does_not_block_the_loop():
    async def main() -> tuple[list[str], float]:
        longest, last = 0.0, time.monotonic()

        async def heartbeat() -> None:
            nonlocal longest, last
            while True:
                await asyncio.sleep(0.01)
                now = time.monotonic()
                longest, last = max(longest, now - last), now

        beat = asyncio.create_task(heartbeat())
        tasks = [grade_async(r"\boxed{9^{9^{9^9}}}", "5", timeout=1.0)]
        tasks += [grade_async(f"\\boxed{{{n} + \\sqrt{{4}}}}", str(n + 2)) for n in range(12)]
        verdicts = [graded.verdict for graded in await asyncio.gather(*tasks)]
        beat.cancel()
        return verdicts, longest

    verdicts, longest = asyncio.run(main())
    assert verdicts == ["unverifiable"] + ["correct"] * 12
    assert longest < 0.9  # the slow item alone takes a second


def test_a_killed_worker_is_replaced_within_a_second():
    pool = Pool(1)
    try:
        assert pool.compare(r"\sqrt{16}", "4", 5.0)[0] == "correct"
        for _ in range(3):
            pool.compare("9^{9^{9^9}}", "5", 0.3)
            start = time.monotonic()
            assert pool.compare(r"\sqrt{16}", "4", 5.0)[0] == "correct"
            assert time.monotonic() - start < 1.0
    finally:
        pool.close()


def test_workers_killed_from_outside_lose_no_item():
    pool = shared_pool()
    items = [(f"\\boxed{{\\sqrt{{{n * n}}} + x}}", f"x + {n}", "math") for n in range(2, 40)]
    killed: list[int] = []

    def sabotage() -> None:
        """As often as an item may be unlucky: TRIES - 1 times."""
        deadline = time.monotonic() + 30
        while len(killed) < TRIES - 1 and time.monotonic() < deadline:
            time.sleep(0.2)
            template = pool._template
            if template is not None:
                path = Path(f"/proc/{template.process.pid}/task/{template.process.pid}/children")
                if children := [int(pid) for pid in path.read_text().split() if int(pid) not in killed]:
                    os.kill(children[-1], signal.SIGKILL)
                    killed.append(children[-1])

    saboteur = threading.Thread(target=sabotage)
    saboteur.start()
    graded = grade_many(items, workers=2, timeout=20)
    saboteur.join()
    assert [g.verdict for g in graded] == ["correct"] * len(items)
    assert len(killed) == TRIES - 1
