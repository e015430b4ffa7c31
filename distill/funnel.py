"""What each filter leaves: rows, problems and generated tokens before and after it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from distill.records import FunnelRow

if TYPE_CHECKING:
    import numpy as np


def count_funnel(passed: "Mapping[str, np.ndarray]", problem: "np.ndarray", tokens: "np.ndarray") -> list[FunnelRow]:
    """By filter in order; a trace is out if it passed this one and all before. What only measures is left out.

    `passed` has a bool a trace, `problem` a number a problem, `tokens` the generated ones; all of shape (traces,).
    """
    import numpy as np

    def counts(left: "np.ndarray") -> tuple[int, int, int]:
        return int(left.sum()), len(np.unique(problem[left])), int(tokens[left].sum())

    found: list[FunnelRow] = []
    left = np.ones(len(problem), dtype=bool)
    for name, flags in passed.items():
        if name == "reflection":
            continue
        before, left = counts(left), left & flags
        after = counts(left)
        found.append(
            {
                "filter": name, "in": before[0], "out": after[0], "problems_in": before[1],
                "problems_out": after[1], "tokens_in": before[2], "tokens_out": after[2],
            }
        )  # fmt: skip
    return found
