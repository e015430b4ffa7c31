"""products: long multiplication, one partial product a line, then their sum."""

from __future__ import annotations

import re

from distill.worked.steps import Worked, add, digit, multiply


def solve(problem: str) -> Worked:
    """`... multiplication: 98 * 93. ...` -> `98*3: ... =294`, `98*9: ... =882`, `294+8820: ... =9114`."""
    match = re.search(r"(\d+) \* (\d+)\.", problem)
    assert match, f"not a product of two numbers: {problem!r}"
    a, b = int(match[1]), int(match[2])
    lines, total = [], 0
    for place in range(len(str(b))):
        partial = a * digit(b, place)
        lines.append(multiply(a, digit(b, place)))
        if place:
            lines.append(add(total, partial * 10**place))
        total += partial * 10**place
    return Worked(lines, str(total))
