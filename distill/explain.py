"""`distill filter RECIPE --explain TRACE_ID`: why one trace was accepted or rejected, from the ledger, judging nothing.

Each filter's verdict with what it measured, the settings it rests on and whether the recipe still has these; where in
the funnel the trace went out; and, beside it, the other text where the reason is one: the trace or problem that was
kept, the evaluation problem that it is.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.filters import COMPARING
from distill.jsonl import read_jsonl
from distill.judging import enabled_filters, filter_bases, plain
from distill.lines import Lines
from distill.recipe import Recipe
from distill.visible import visible

_OTHER = re.compile(r"\btrace ([^\s,)]+)")


def explain(recipe: Recipe, folder: Path, identity: str) -> Iterator[str]:
    """Lines to print. `identity` may be the beginning of a trace's id. Raises UserError if no one trace is meant."""
    path = folder / "verdicts.jsonl"
    if not path.is_file():
        raise UserError(f"{folder}: the traces have no verdicts yet; run `distill filter` first")
    line = _one(path, identity)
    enabled = enabled_filters(recipe.filters)
    bases = filter_bases(enabled)
    failed = [name for name, verdict in line["verdicts"].items() if not verdict["pass"]]
    fate = "accepted" if line["accepted"] else f"rejected, first by {failed[0]}"
    yield f"trace {line['trace_id']}, sample {line['sample']} of problem {line['problem_id']}: {fate}"
    yield f"problem: {_short(_problem(folder, line['problem_id']))}"
    for name, verdict in line["verdicts"].items():
        yield ""
        yield f"{'pass' if verdict['pass'] else 'FAIL'}  {name}: {visible(_one_line(verdict['reason']))}"
        for key, value in (verdict.get("measured") or {}).items():
            yield f"        {key} {value:g}"
        if name not in enabled:
            yield "        the recipe no longer has this filter"
            continue
        settings = plain(enabled[name])
        if settings:
            yield f"        settings {json.dumps(settings)}"
        if not verdict["key"]:
            yield "        not settled; `distill filter` asks when the trace gets this far"
        elif name not in COMPARING and not verdict["key"].startswith(bases[name]):
            yield "        judged under other settings; `distill filter` judges it again"
        yield from (f"        {text}" for text in _beside(folder, line, name, verdict))
    for name in enabled:
        if name not in line["verdicts"]:
            yield f"\nnot judged yet by {name}; `distill filter` does"


def _one(path: Path, identity: str) -> dict[str, Any]:
    """The ledger's line of a trace, read from an index unless only the beginning of its id is given."""
    import numpy as np

    from distill.lines import key

    lines = Lines(path, ("trace_id",))
    place = int(lines.find("trace_id", np.array([key(identity)], dtype=np.int64))[0])
    if place >= 0:
        return dict(json.loads(lines.read(place)))
    found = [row for _, row in read_jsonl(path) if row["trace_id"].startswith(identity)][:2]
    if not found:
        raise UserError(f"{path}: no trace's id begins with '{identity}'")
    if len(found) > 1:
        raise UserError(f"{path}: more than one trace's id begins with '{identity}': {found[0]['trace_id']} and others")
    return found[0]


def _problem(folder: Path, identity: str) -> str:
    for _, row in read_jsonl(folder / "problems.jsonl"):
        if row["id"] == identity:
            return str(row["problem"])
    return "(not in problems.jsonl any more)"


def _beside(folder: Path, line: dict[str, Any], name: str, verdict: dict[str, Any]) -> Iterator[str]:
    """The other text that a rejection speaks of."""
    if verdict["pass"]:
        return
    if name == "decontamination" and (folder / "contamination.jsonl").is_file():
        for _, row in read_jsonl(folder / "contamination.jsonl"):
            if row["problem_id"] == line["problem_id"]:
                yield f"{row['benchmark']}, row {row['row']}: {_short(row['evaluation_problem'])}"
    elif name in ("duplicates", "near_duplicates", "near_duplicate_problems"):
        other = _OTHER.search(verdict["reason"])
        for _, row in read_jsonl(folder / "traces" / "traces.jsonl", torn_ok=True) if other else ():
            if row["id"] == other[1].rstrip(","):  # type: ignore[index]
                text = _problem(folder, row["problem_id"]) if name == "near_duplicate_problems" else row["reasoning"]
                yield f"{row['id']}: {_short(text)}"
                return


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _short(text: str) -> str:
    text = visible(_one_line(text))
    return text if len(text) <= 300 else text[:297] + "..."
