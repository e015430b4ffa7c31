"""Verdicts on final answers: the ground floor that filters, rewards and evaluations share.

    grade(text, answer, kind) -> Grade(verdict='correct' | 'wrong' | 'unverifiable', reason, extracted)

A cheap exact path decides almost everything in microseconds; what is left goes to math-verify, to scorers or to a
sandbox, in processes that can be killed, so that no model output can hang, exhaust or crash the caller.
"""

from evals.grading.extract import extract_answer
from evals.grading.grade import KINDS, Grade, grade, grade_async, grade_many
from evals.grading.judge import Judge

__all__ = ["KINDS", "Grade", "Judge", "extract_answer", "grade", "grade_async", "grade_many"]
