"""What each filter rejected and accepted, a few traces of each, as the filter stage drew them by hash.

All text is plain data for the template, which escapes it.
"""

import json
from pathlib import Path
from typing import Any

from distill.report import words
from distill.report.readers import cut

Row = dict[str, Any]

_EACH = {"rejected": 5, "accepted": 3}
_LONGEST = {"reason": 300, "problem": 300, "excerpt": 700}  # characters; fifteen filters then take at most 200 kB


def read_examples(folder: Path, funnel: list[Row]) -> list[Row]:
    """One row a filter, in the ledger's order; empty if the filters have not run, or ran before examples were kept."""
    path = folder / "filter_examples.json"
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    steps = {step["filter"]: step for step in funnel}
    return [
        {
            "filter": name,
            "sentence": _sentence(steps.get(name)),
            "groups": [
                {"verdict": verdict, "examples": [_example(row) for row in rows[verdict][:most]]}
                for verdict, most in _EACH.items()
            ],
        }
        for name, rows in found.items()
    ]


def _sentence(step: Row | None) -> str:
    if step is None:
        return "measures, rejects nothing"
    dropped = step["in"] - step["out"]
    return f"drops {words.count(dropped)} of the {words.count(step['in'])} that reach it"


def _example(row: Row) -> Row:
    texts = {name: cut(str(row[name]), most) for name, most in _LONGEST.items()}
    return {"trace_id": str(row["trace_id"]), "sample": row["sample"], **texts}
