"""From the chosen traces to the dataset's: problems of the wanted difficulty, and sources in the wanted proportion.

R1's own: 600k samples of reasoning to 200k of everything else. A part that has less than its share shrinks the others
with it, so that the proportion holds; nothing is repeated. Whole problems are taken, those with the smallest hash of
seed and problem, so that a larger budget adds problems and exchanges none.
"""

import hashlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import groupby
from typing import TYPE_CHECKING, Any

from distill.errors import UserError
from distill.recipe import Selection
from distill.recipe_data import MixturePart
from distill.records import Problem, Trace

if TYPE_CHECKING:
    import numpy as np


def mix(
    selected: Sequence[Trace],
    problems: Mapping[str, Problem],
    settings: Selection,
    seed: int,
    allowed: Callable[[str], bool] | None = None,
) -> tuple[list[Trace], dict[str, Any]]:
    """The traces kept, in their order, and what was counted. `selected` has each problem's traces side by side.

    `allowed` says whether a problem has the wanted difficulty. Raises UserError if a weighted part has no trace, or
    nothing is left.
    """
    import numpy as np

    parts = settings.mixture or [MixturePart(sources=["*"])]
    part, rank = array("b" if len(parts) < 128 else "q"), array("Q")
    count, tokens = array("q"), array("q")
    facts: dict[str, Any] = {}
    too_easy_or_hard = elsewhere = 0
    for problem_id, own in groupby(selected, key=lambda trace: trace["problem_id"]):
        sizes = [trace["reasoning_tokens"] + trace["answer_tokens"] for trace in own]
        number = -1
        if allowed is not None and not allowed(problem_id):
            too_easy_or_hard += 1
        else:
            number = _part_of(problems[problem_id], parts) if settings.mixture else 0
            elsewhere += number < 0
        part.append(number)
        rank.append(int(hashlib.sha256(f"{seed}/mixture/{problem_id}".encode()).hexdigest()[:16], 16))
        count.append(len(sizes))
        tokens.append(sum(sizes))
    for number, wanted in enumerate(parts):
        if wanted.weight is not None and number not in part:
            there = sorted({problems[trace["problem_id"]]["source"].partition("/")[0] for trace in selected})
            raise UserError(
                f"selection.mixture.{number}: no accepted trace is of {', '.join([*wanted.sources, *wanted.kinds])}, "
                f"by the source and kind of its problem; there are {', '.join(there[:10])}"
            )
    columns = [
        np.array(column, dtype=np.uint64 if column is rank else np.int64) for column in (part, rank, count, tokens)
    ]
    keep = _within_budgets(settings, parts, *columns)
    if allowed is not None:
        facts["outside_difficulty"] = too_easy_or_hard
    if settings.mixture:
        facts["in_no_part"] = elsewhere
        facts["mixture"] = [
            {
                "sources": wanted.sources,
                "kinds": wanted.kinds,
                "problems": int(keep[columns[0] == number].sum()),
                "traces": int(columns[2][keep & (columns[0] == number)].sum()),
                "tokens": int(columns[3][keep & (columns[0] == number)].sum()),
            }
            for number, wanted in enumerate(parts)
        ]
    if not keep.any():
        raise UserError(
            "selection: no accepted trace is left: of the problems, "
            f"{too_easy_or_hard} are outside of `difficulty`, {elsewhere} in no part of `mixture`, "
            "the others larger than the budgets"
        )
    kept = np.repeat(keep, columns[2])
    return [trace for trace, keeps in zip(selected, kept.tolist(), strict=True) if keeps], facts


def _part_of(problem: Problem, parts: Sequence[MixturePart]) -> int:
    """The first part with this kind and source: 'am' stands for 'am/OpenHermes' too, patterns for what they match."""
    source = problem["source"]
    for number, part in enumerate(parts):
        if part.kinds and problem["kind"] not in part.kinds:
            continue
        for wanted in part.sources:
            if source == wanted or source.startswith(wanted + "/") or fnmatchcase(source, wanted):
                return number
    return -1


def _within_budgets(
    settings: Selection, parts: Sequence[MixturePart], part: "np.ndarray", rank: "np.ndarray", count: "np.ndarray",
    tokens: "np.ndarray",
) -> "np.ndarray":  # fmt: skip
    """Which problems are kept."""
    import numpy as np

    keep = np.zeros(len(part), dtype=bool)
    own = [np.flatnonzero(part == number) for number in range(len(parts))]
    own = [rows[np.argsort(rank[rows], kind="stable")] for rows in own]
    for number, (rows, wanted) in enumerate(zip(own, parts, strict=True)):
        own[number] = _first(_first(rows, count, wanted.traces), tokens, wanted.tokens)
    unit = tokens if settings.mixture_by == "tokens" else count
    if all(wanted.weight is not None for wanted in parts):
        # The largest total at which every part still has its share.
        scale = min(
            float(unit[rows].sum()) / float(wanted.weight or 1) for rows, wanted in zip(own, parts, strict=True)
        )
        own = [_first(rows, unit, int(scale * float(w.weight or 1) + 1e-6)) for rows, w in zip(own, parts, strict=True)]
    if settings.max_tokens is not None:
        total = sum(int(tokens[rows].sum()) for rows in own)
        if total > settings.max_tokens:  # every part gives up the same share
            share = settings.max_tokens / total
            own = [_first(rows, tokens, int(share * int(tokens[rows].sum()))) for rows in own]
    for rows in own:
        keep[rows] = True
    return keep


def _first(rows: "np.ndarray", size: "np.ndarray", most: int | None) -> "np.ndarray":
    """Rows from the beginning, as many as have no more than `most` together."""
    import numpy as np

    if most is None:
        return rows
    return rows[: int(np.searchsorted(np.cumsum(size[rows]), most, side="right"))]
