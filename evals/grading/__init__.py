"""Verdicts on final answers: the ground floor that filters, rewards and evaluations share.

    grade(text, answer, kind) -> Grade(verdict='correct' | 'wrong' | 'unverifiable', reason, extracted)

A cheap exact path decides almost everything in microseconds; what is left goes to math-verify in killable
worker processes, so that no model output can hang, exhaust or crash the caller.
"""

from evals.grading.extract import extract_answer
from evals.grading.grade import Grade, grade, grade_many

__all__ = ["Grade", "extract_answer", "grade", "grade_many"]
