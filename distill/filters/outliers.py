"""outliers: a reasoning much longer (or shorter) than the other samples of its problem.

A sample four times as long as the median of its problem's has mostly lost its way, whatever the absolute number is.
Compared with the samples that passed every filter before, at least `min_samples` of them.
"""

import sys

from distill.filters.comparing import Judgement, Rows, by_problem, check_all, no_digest
from distill.recipe import OutliersFilter
from distill.records import Problem, Trace, Verdict

VERSION = 1
WIDTH = 0

digest = no_digest


def check(traces: list[Trace], problems: dict[str, Problem], settings: OutliersFilter) -> list[Verdict]:
    return check_all(sys.modules[__name__], traces, problems, settings)


def compare(rows: Rows, settings: OutliersFilter) -> Judgement:
    import numpy as np

    medians = np.zeros(len(rows.tokens))
    everything = np.arange(len(rows.tokens))
    for group in by_problem(rows, everything):
        compared = group[rows.passed[group]]
        if len(compared) >= settings.min_samples:
            medians[group] = np.median(rows.tokens[compared])
    ratios = np.divide(rows.tokens, medians, out=np.ones(len(medians)), where=medians > 0)
    passed = (ratios <= settings.max_ratio) & (ratios >= settings.min_ratio)

    def reason(row: int) -> str:
        if not medians[row]:
            return f"fewer than {settings.min_samples} samples to compare with"
        said = f"{rows.tokens[row]} reasoning tokens, {ratios[row]:.2g} times the median of its problem"
        if passed[row]:
            return said
        bound = "more" if ratios[row] > settings.max_ratio else "less"
        return f"{said}, {bound} than {settings.max_ratio if bound == 'more' else settings.min_ratio:g}"

    return Judgement(passed, reason, lambda row: {"ratio": round(float(ratios[row]), 3)} if medians[row] else None)
