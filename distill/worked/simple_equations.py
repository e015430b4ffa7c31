"""simple_equations: a*x + b = c, a*x - b = c and b - a*x = c; move the constant, then count up the multiples of a."""

from __future__ import annotations

import re

from distill.worked.steps import Worked, signed_add


def solve(problem: str) -> Worked:
    """`Solve for t: 12*t - 7 = 53` -> `53+7: ... =60`, `12*t=60`, `12*1=12 ... 12*5=60`, `t=5`."""
    equation = problem.rsplit(": ", 1)[1]
    left, right = equation.split(" = ")
    c = int(right)
    first = re.fullmatch(r"(?:(\d+)\*)?([a-z]) ([+-]) (\d+)", left)
    if first:
        coefficient, name, sign, constant = int(first[1] or 1), first[2], first[3], int(first[4])
        moved = -constant if sign == "+" else constant
        lines, product = [signed_add(c, moved)], c + moved
    else:
        last = re.fullmatch(r"(\d+) - (?:(\d+)\*)?([a-z])", left)
        assert last, f"not an equation of the kinds solved here: {problem!r}"
        constant, coefficient, name = int(last[1]), int(last[2] or 1), last[3]
        lines, product = [signed_add(constant, -c)], constant - c
    lines.append(f"{coefficient}*{name}={product}")
    lines.append(" ".join(f"{coefficient}*{k}={coefficient * k}" for k in range(1, product // coefficient + 1)))
    return Worked([*lines, f"{name}={product // coefficient}"], str(product // coefficient))
