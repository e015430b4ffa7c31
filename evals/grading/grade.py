"""One verdict an answer: extraction, the cheap path of its kind, then whatever the kind needs, in other processes."""

import json
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from evals.grading.choice import grade_choice
from evals.grading.exact import exactly_equal, normalise, plain_string
from evals.grading.extract import after_reasoning, extract_answer, last_code
from evals.grading.judge import Judge
from evals.grading.pool import shared_pool

Verdict = Literal["correct", "wrong", "unverifiable"]
KINDS = ("math", "exact", "choice", "regex", "code", "reasoning-gym", "judge", "open")
TIMEOUT_SECONDS = 5.0
MAX_CHARACTERS = 2000  # of a final answer that is worth parsing
MAX_DEPTH = 40  # of braces and brackets; the LaTeX parser recurses on them
SCORED_CHARACTERS = 20_000  # of an answer that reasoning-gym's scorers get
# Some of these scorers `eval` the answer. The worker cannot write, connect or start anything, but it could lie.
_CALLS = re.compile(r"__|\b(?:eval|exec|compile|getattr|setattr|globals|locals|vars|open|input|breakpoint)\s*\(|lambda")

Item = tuple[str, str | None, str] | tuple[str, str | None, str, str | None]


@dataclass(frozen=True)
class Grade:
    """A verdict, why in a few words, and the final answer it is about (None if the response states none)."""

    verdict: Verdict
    reason: str
    extracted: str | None


def _depth(text: str) -> int:
    deepest = depth = 0
    for character in text:
        if character in "{([":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "})]":
            depth -= 1
    return deepest


def _verdict(pair: tuple[str, str], extracted: str | None) -> Grade:
    verdict, reason = pair
    assert verdict in ("correct", "wrong", "unverifiable")
    return Grade(verdict, reason, extracted)  # type: ignore[arg-type]


def _quick(text: str, answer: str | None, kind: str) -> Grade | str | None:
    """The verdict where it needs no other process; else the final answer, which is None for kinds that need none."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of problem {kind!r}; expected one of {', '.join(KINDS)}")
    if kind == "judge":
        return None
    if kind == "open":
        return Grade("unverifiable", "the problem has no reference answer", extract_answer(text))
    extracted = extract_answer(text, kind)
    if answer is None:
        return Grade("unverifiable", "the problem has no reference answer", extracted)
    if extracted is None:
        return Grade("wrong", "no code block" if kind == "code" else "no answer", None)
    if kind == "exact":
        same = plain_string(extracted) == plain_string(answer)
        return Grade("correct" if same else "wrong", "equal" if same else "another string", extracted)
    if kind == "choice":
        return _verdict(grade_choice(extracted, answer), extracted)
    if kind == "math":
        return _quick_math(extracted, answer)
    if kind == "reasoning-gym" and (len(extracted) > SCORED_CHARACTERS or _CALLS.search(extracted)):
        return Grade("unverifiable", "an answer that is code, or too long, is not given to a scorer", extracted)
    return extracted


def _quick_math(extracted: str, answer: str) -> Grade | str:
    if len(extracted) > max(MAX_CHARACTERS, 4 * len(answer)):
        return Grade("unverifiable", f"an answer of {len(extracted)} characters is not parsed", extracted)
    equal = exactly_equal(extracted, answer)
    if equal is not None:
        return Grade("correct" if equal else "wrong", "equal" if equal else "another value", extracted)
    if not normalise(extracted):
        return Grade("wrong", "empty answer", extracted)
    if _depth(extracted) > MAX_DEPTH:
        return Grade("unverifiable", f"an answer with more than {MAX_DEPTH} nested brackets is not parsed", extracted)
    return extracted


def _slow(
    text: str,
    answer: str | None,
    kind: str,
    extracted: str | None,
    timeout: float,
    problem: str | None,
    judge: Judge | None,
    isolation: str | None,
) -> Grade:
    if kind == "judge":
        stated = extract_answer(text)
        if judge is None:
            return Grade("unverifiable", "there is no judge", stated)
        tail = after_reasoning(text).strip()
        if not tail:
            return Grade("wrong", "no answer", None)
        return _verdict(judge.ask(tail, answer, problem), stated if stated is not None else tail)
    assert extracted is not None and answer is not None
    if kind == "code":
        from evals.grading.code import grade_code

        source = last_code(after_reasoning(text), _function(answer)) or extracted
        return _verdict(grade_code(source, answer, isolation), source)
    if kind == "reasoning-gym":
        try:
            dataset = json.loads(answer)["metadata"]["source_dataset"]
            assert isinstance(dataset, str)
        except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
            problem = "the reference is no JSON of a reasoning-gym entry with metadata.source_dataset"
            return Grade("unverifiable", problem, extracted)
        return _verdict(shared_pool("gym").ask("gym", extracted, answer, timeout), extracted)
    if kind == "regex":
        return _verdict(shared_pool().ask("regex", plain_string(extracted), answer, timeout), extracted)
    return _verdict(shared_pool().compare(extracted, answer, timeout), extracted)


def _function(answer: str) -> str | None:
    """The function that a code problem's tests call."""
    try:
        name = json.loads(answer).get("function")
    except (ValueError, AttributeError, RecursionError):
        return None
    return name if isinstance(name, str) else None


def grade(
    response_text: str,
    answer: str | None,
    kind: str = "math",
    *,
    timeout: float = TIMEOUT_SECONDS,
    problem: str | None = None,
    judge: Judge | None = None,
    isolation: str | None = None,
) -> Grade:
    """Grade a response against a reference answer. Thread-safe; returns within about `timeout` seconds.

    `kind`: 'math' (equal as mathematics), 'exact' (equal as strings after collapsing whitespace), 'choice' (same
    letter, or option text), 'regex' (the reference is a pattern for the whole answer), 'code' (the reference is JSON
    with tests, and the limits that hold instead of `timeout`), 'reasoning-gym' (the reference is JSON of the entry;
    its own scorer), 'judge' (`judge` asks a model, which is shown `problem`), 'open' (unverifiable).
    A response without a final answer is wrong with reason 'no answer'; a comparison over the time or memory bound is
    unverifiable, never correct. `isolation`: the sandbox for code, by name; default: the best there is, or the
    variable DISTILL_SANDBOX. Raises ValueError for an unknown kind or isolation.
    """
    began = time.monotonic()
    known = _quick(response_text, answer, kind)
    if isinstance(known, Grade):
        return known
    left = max(0.0, timeout - (time.monotonic() - began))  # to find the answer in a megabyte takes its time too
    return _slow(response_text, answer, kind, known, left, problem, judge, isolation)


def grade_many(
    items: Iterable[Item],
    workers: int = 2,
    *,
    timeout: float = TIMEOUT_SECONDS,
    judge: Judge | None = None,
    isolation: str | None = None,
) -> list[Grade]:
    """Grades of (response text, reference answer, kind[, problem text]) in order, `workers` at once where it matters.

    What the cheap paths decide is decided here; threads wait only for other processes.
    """
    items = list(items)
    grades: list[Grade | None] = []
    with ThreadPoolExecutor(max_workers=max(1, workers)) as threads:
        waiting = []
        for number, (text, answer, kind, *rest) in enumerate(items):
            known = _quick(text, answer, kind)
            grades.append(known if isinstance(known, Grade) else None)
            if not isinstance(known, Grade):
                problem = rest[0] if rest else None
                given = (text, answer, kind, known, timeout, problem, judge, isolation)
                waiting.append((number, threads.submit(_slow, *given)))
        try:
            for number, future in waiting:
                grades[number] = future.result()
        except BaseException:  # a judge that is needed and not there, or Ctrl-C: the rest need not be tried
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return [graded for graded in grades if graded is not None]


_async_threads = ThreadPoolExecutor(max_workers=32, thread_name_prefix="grade")


async def grade_async(
    response_text: str,
    answer: str | None,
    kind: str = "math",
    *,
    timeout: float = TIMEOUT_SECONDS,
    problem: str | None = None,
    judge: Judge | None = None,
    isolation: str | None = None,
) -> Grade:
    """`grade` without blocking the event loop: the cheap paths at once, the rest in a thread.

    Cancelling the await gives up the verdict, not the work, which ends within its time-out.
    """
    known = _quick(response_text, answer, kind)
    if isinstance(known, Grade):
        return known
    given = (response_text, answer, kind, known, timeout, problem, judge, isolation)
    import asyncio

    return await asyncio.get_running_loop().run_in_executor(_async_threads, _slow, *given)
