"""One verdict an answer: extraction, the cheap exact path, then math-verify in the pool."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from evals.grading.exact import choice_letter, exactly_equal, normalise, plain_string
from evals.grading.extract import extract_answer
from evals.grading.pool import shared_pool

Verdict = Literal["correct", "wrong", "unverifiable"]
KINDS = ("math", "exact", "choice", "open", "code")
TIMEOUT_SECONDS = 5.0
MAX_CHARACTERS = 2000  # of a final answer that is worth parsing
MAX_DEPTH = 40  # of braces and brackets; the LaTeX parser recurses on them


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


def _grade_math(extracted: str, answer: str, timeout: float) -> tuple[Verdict, str]:
    if len(extracted) > max(MAX_CHARACTERS, 4 * len(answer)):
        return "unverifiable", f"an answer of {len(extracted)} characters is not parsed"
    equal = exactly_equal(extracted, answer)
    if equal is not None:
        return ("correct", "equal") if equal else ("wrong", "another number")
    if not normalise(extracted):
        return "wrong", "empty answer"
    if _depth(extracted) > MAX_DEPTH:
        return "unverifiable", f"an answer with more than {MAX_DEPTH} nested brackets is not parsed"
    verdict, reason = shared_pool().compare(extracted, answer, timeout)
    assert verdict in ("correct", "wrong", "unverifiable")
    return verdict, reason  # type: ignore[return-value]


def grade(response_text: str, answer: str | None, kind: str = "math", *, timeout: float = TIMEOUT_SECONDS) -> Grade:
    """Grade a response against a reference answer. Thread-safe; returns within about `timeout` seconds.

    `kind`: 'math' (equal as mathematics), 'exact' (equal as strings after collapsing whitespace), 'choice' (same
    letter), 'open' and 'code' (unverifiable so far, with the reason). A response without a final answer is wrong with
    reason 'no answer'; a comparison over the time or memory bound is unverifiable, never correct.
    Raises ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of problem {kind!r}; expected one of {', '.join(KINDS)}")
    if kind == "code":
        return Grade("unverifiable", "code is not run yet: grading it needs a sandbox", None)
    extracted = extract_answer(response_text, kind)
    if kind == "open" or answer is None:
        return Grade("unverifiable", "the problem has no reference answer", extracted)
    if extracted is None:
        return Grade("wrong", "no answer", None)
    if kind == "exact":
        same = plain_string(extracted) == plain_string(answer)
        return Grade("correct" if same else "wrong", "equal" if same else "another string", extracted)
    if kind == "choice":
        letter, expected = choice_letter(extracted), choice_letter(answer)
        if expected is None:
            return Grade("unverifiable", f"the reference {answer[:40]!r} is not a choice letter", extracted)
        same = letter == expected
        return Grade("correct" if same else "wrong", "equal" if same else "another choice", extracted)
    verdict, reason = _grade_math(extracted, answer, timeout)
    return Grade(verdict, reason, extracted)


def grade_many(
    items: Iterable[tuple[str, str | None, str]], workers: int = 2, *, timeout: float = TIMEOUT_SECONDS
) -> list[Grade]:
    """Grades of (response text, reference answer, kind) in order, on up to `workers` comparisons at once."""
    with ThreadPoolExecutor(max_workers=max(1, workers)) as threads:
        return list(threads.map(lambda item: grade(*item, timeout=timeout), items))
