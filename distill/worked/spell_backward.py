"""spell_backward: number the letters, then read them from the last to the first."""

from __future__ import annotations

from distill.worked.steps import Worked


def solve(problem: str) -> Worked:
    """`... nus): star` -> `1s 2t 3a 4r`, `4r 3a 2t 1s`."""
    word = problem.rsplit(": ", 1)[1]
    numbered = [f"{place}{letter}" for place, letter in enumerate(word, start=1)]
    return Worked([" ".join(numbered), " ".join(reversed(numbered))], word[::-1])
