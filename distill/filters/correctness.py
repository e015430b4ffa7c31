"""correctness: the final answer is the reference answer, as evals.grading judges it."""

from pathlib import Path

from distill.filters.asking import needing, open_judge
from distill.recipe import CorrectnessFilter
from distill.records import Problem, Trace, Verdict
from distill.reference import shown_reference

VERSION = 4

_CUT = Verdict(False, "wrong: did not end by itself, so it has no final answer")
_OPEN = Verdict(True, "not judged: the problem has no reference answer")


def check(
    traces: list[Trace],
    problems: dict[str, Problem],
    settings: CorrectnessFilter | None,
    replies: Path | None = None,
) -> list[Verdict]:
    """Pass only 'correct': what cannot be verified is not learnt from. A sample that was cut off is never correct.

    Where nobody recorded the end ("unknown"), the answer is judged; `truncation` judges the end.

    With `without_reference: pass`, traces of problems without a reference answer pass unjudged. With a `judge`, it is
    asked about the kind 'judge', about 'open' problems with a reference, and, with `without_reference: judge`, about
    all without. Its votes are kept in `replies`. Raises ConnectionError if it is not there.
    """
    settings = settings or CorrectnessFilter()
    verdicts: dict[int, Verdict] = {}
    graded: dict[int, str] = {}  # row -> kind
    judged: dict[int, str] = {}
    for row, trace in enumerate(traces):
        problem = problems[trace["problem_id"]]
        kind = _kind(problem, settings)
        if trace["finish_reason"] not in ("stop", "unknown"):
            verdicts[row] = _CUT
        elif kind is None:
            verdicts[row] = _OPEN
        else:
            (judged if kind == "judge" else graded)[row] = kind
    verdicts |= _grade(traces, problems, graded, settings, replies)
    verdicts |= _grade(traces, problems, judged, settings, replies)
    return [verdicts[row] for row in range(len(traces))]


def _kind(problem: Problem, settings: CorrectnessFilter) -> str | None:
    """How the answer is graded; None for not at all."""
    if problem["answer"] is None and not (problem["kind"] == "judge" and settings.judge):
        if settings.without_reference == "pass":
            return None
        return "judge" if settings.without_reference == "judge" else problem["kind"]
    return "judge" if problem["kind"] == "open" else problem["kind"]  # without a judge it says that there is none


def _grade(
    traces: list[Trace],
    problems: dict[str, Problem],
    rows: dict[int, str],
    settings: CorrectnessFilter,
    replies: Path | None,
) -> dict[int, Verdict]:
    from evals.grading import grade_many

    asked = [problems[traces[row]["problem_id"]] for row in rows]
    items = [
        (traces[row]["response"], problem["answer"], kind, problem["problem"])
        for (row, kind), problem in zip(rows.items(), asked, strict=True)
    ]
    if settings.judge is None or "judge" not in rows.values():
        grades = grade_many(items)
    else:
        with needing(settings.judge, "filters.correctness.judge"):
            grades = grade_many(items, settings.judge.at_once, judge=open_judge(settings.judge, replies))
    return {
        row: _verdict(grade.verdict, grade.reason, grade.extracted, problem)
        for row, grade, problem in zip(rows, grades, asked, strict=True)
    }


def _verdict(verdict: str, why: str, extracted: str | None, problem: Problem) -> Verdict:
    from evals.grading.judge import NO_VERDICT

    if extracted is None or problem["answer"] is None:
        reason = f"{verdict}: {why}"
    else:
        sign = {"correct": "=", "wrong": "≠", "unverifiable": "?"}[verdict]
        reason = f"{verdict}: {_short(extracted)} {sign} {_short(shown_reference(problem) or '')} ({why})"
    return Verdict(verdict == "correct", reason, settled=not why.startswith(NO_VERDICT))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."
