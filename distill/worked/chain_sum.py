"""chain_sum: terms added from left to right, one running total a line."""

from __future__ import annotations

import re

from distill.worked.steps import Worked, signed_add


def solve(problem: str) -> Worked:
    """`... problem: 98 + 93 - 77 =` -> `98+93: ... =191`, `191-77: ... =114`."""
    expression = problem.split(":")[1].replace("=", "").replace(" ", "")
    total, *terms = (int(term) for term in re.findall(r"[+-]?\d+", expression))
    lines = []
    for term in terms:
        lines.append(signed_add(total, term))
        total += term
    return Worked(lines, str(total))
