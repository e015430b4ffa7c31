"""leg_counting: legs of each kind of animal, then their running sum."""

from __future__ import annotations

import re

from distill.worked.steps import Worked, add


def solve(problem: str) -> Worked:
    """`... if you have 14 bees, 8 crabs?` -> `14 bees 14*6=84`, `8 crabs 8*10=80`, `84+80: ... =164`."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    listed = re.findall(r"(\d+) ([a-z ]+)", problem.rsplit(" have ", 1)[1])
    legs, lines = [], []
    for count, name in listed:
        each = ANIMALS[name] if name in ANIMALS else ANIMALS[name.removesuffix("s")]
        legs.append(int(count) * each)
        lines.append(f"{count} {name} {count}*{each}={legs[-1]}")
    total = legs[0]
    for more in legs[1:]:
        lines.append(add(total, more))
        total += more
    return Worked(lines, str(total))
