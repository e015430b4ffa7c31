"""count_bits: halve until nothing is left; every odd remainder is a 1 bit."""

from __future__ import annotations

import re

from distill.worked.steps import Worked


def solve(problem: str) -> Worked:
    """`... of the number 13?` -> `13=2*6+1 1`, `6=2*3+0 1`, `3=2*1+1 2`, `1=2*0+1 3`; the running count stands last."""
    match = re.search(r"number (\d+)", problem)
    assert match, f"no number in {problem!r}"
    number, count, lines = int(match[1]), 0, []
    while number:
        count += number % 2
        lines.append(f"{number}=2*{number // 2}+{number % 2} {count}")
        number //= 2
    return Worked(lines, str(count))
