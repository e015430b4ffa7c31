"""A few accepted and rejected traces of every filter, for people who want to see what a filter does before trusting it.

filter_examples.json: {filter: {"rejected": [...], "accepted": [...]}}, drawn by a hash of the trace, so that the same
traces give the same examples.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distill.records import Problem, Trace

if TYPE_CHECKING:
    import numpy as np

EACH = 5
_EXCERPT = 600  # characters

Wanted = dict[int, list[tuple[str, str]]]


def choose_examples(passed: "Mapping[str, np.ndarray]", accepted: "np.ndarray", identity: "np.ndarray") -> Wanted:
    """By row: (filter, "accepted" or "rejected") for which it is an example. Accepted ones passed every filter."""
    import numpy as np

    wanted: Wanted = {}
    for number, (name, flags) in enumerate(passed.items()):
        rank = (identity * np.uint64(0x9E3779B97F4A7C15 + 2 * number)) >> np.uint64(8)
        for verdict, among in (("rejected", np.flatnonzero(~flags)), ("accepted", np.flatnonzero(accepted))):
            for row in among[np.argsort(rank[among], kind="stable")[:EACH]].tolist():
                wanted.setdefault(row, []).append((name, verdict))
    return wanted


def make_example(line: Mapping[str, Any], name: str, trace: Trace, problem: Problem) -> dict[str, Any]:
    """The trace's identity, the filter's verdict, and the part of the text that it is about, else beginning and end."""
    verdict = line["verdicts"][name]
    text = f"{trace['reasoning']}\n{trace['response']}"
    place = (verdict.get("measured") or {}).get("character")
    if place is not None:
        begin = max(0, int(place) - _EXCERPT // 3)
        excerpt = ("…" if begin else "") + text[begin : begin + _EXCERPT]
    elif len(text) <= _EXCERPT:
        excerpt = text
    else:
        excerpt = f"{text[: _EXCERPT // 2]} … {text[-_EXCERPT // 2 :]}"
    return {
        "trace_id": trace["id"], "problem_id": problem["id"], "sample": trace["sample"], "reason": verdict["reason"],
        "problem": problem["problem"][:_EXCERPT], "excerpt": excerpt,
    }  # fmt: skip
