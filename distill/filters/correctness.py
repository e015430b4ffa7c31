"""correctness: the final answer is the reference answer, as evals.grading judges it."""

from distill.recipe import CorrectnessFilter
from distill.records import Problem, Trace, Verdict

VERSION = 2


def check(traces: list[Trace], problems: dict[str, Problem], settings: CorrectnessFilter | None) -> list[Verdict]:
    """Pass only 'correct': what cannot be verified is not learnt from. A sample that was cut off is never correct.

    Where nobody recorded the end ("unknown"), the answer is judged; `truncation` judges the end.

    With `without_reference: pass`, traces of problems without a reference answer pass unjudged.
    """
    from evals.grading import grade_many

    whole = [trace for trace in traces if trace["finish_reason"] in ("stop", "unknown")]
    asked = [problems[trace["problem_id"]] for trace in whole]
    grades = grade_many([(t["response"], p["answer"], p["kind"]) for t, p in zip(whole, asked, strict=True)])
    left_open = settings is not None and settings.without_reference == "pass"
    verdicts = {}
    for trace, problem, grade in zip(whole, asked, grades, strict=True):
        if left_open and problem["answer"] is None:
            verdicts[trace["id"]] = Verdict(True, "not judged: the problem has no reference answer")
            continue
        if grade.extracted is None or problem["answer"] is None:
            reason = f"{grade.verdict}: {grade.reason}"
        else:
            sign = {"correct": "=", "wrong": "≠", "unverifiable": "?"}[grade.verdict]
            found, expected = _short(grade.extracted), _short(problem["answer"])
            reason = f"{grade.verdict}: {found} {sign} {expected} ({grade.reason})"
        verdicts[trace["id"]] = Verdict(grade.verdict == "correct", reason)
    cut = Verdict(False, "wrong: did not end by itself, so it has no final answer")
    return [verdicts.get(trace["id"], cut) for trace in traces]


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."
