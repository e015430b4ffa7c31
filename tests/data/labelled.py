"""The labelled sample as traces, and what the filters say of it beside what its labels say."""

import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from distill.filters import COMPARING, filter_module
from distill.reasoning import split_reasoning
from distill.recipe import Filters
from distill.records import Problem, Trace, Verdict

PATH = Path(__file__).with_name("labelled_traces.jsonl.gz")
JUDGED = ("truncation", "format", "correctness", "repetition", "language", "readability", "near_duplicates")

Row = dict[str, Any]


@dataclass
class Counts:
    """Of one filter: rejected rightly, rejected wrongly, passed wrongly, passed rightly; with the traces' ids."""

    hits: list[str] = field(default_factory=list)
    false_alarms: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)

    @property
    def precision(self) -> float | None:
        found = len(self.hits) + len(self.false_alarms)
        return len(self.hits) / found if found else None

    @property
    def recall(self) -> float | None:
        wanted = len(self.hits) + len(self.missed)
        return len(self.hits) / wanted if wanted else None


def read_sample() -> list[Row]:
    with gzip.open(PATH, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def as_traces(rows: Iterable[Row]) -> tuple[list[Trace], dict[str, Problem]]:
    """As an import makes them: nobody recorded how they ended. A copy has its base's problem."""
    traces, problems = [], {}
    for row in rows:
        reasoning, response = split_reasoning(row["text"])
        key = row["problem"]
        problems[key] = {
            "id": key, "problem": row["problem"], "answer": row["answer"], "kind": "math", "source": "", "meta": {},
        }  # fmt: skip
        traces.append(
            {
                "id": row["id"], "problem_id": key, "sample": len(traces), "messages": [], "reasoning": reasoning,
                "response": response, "finish_reason": "unknown", "prompt_tokens": 0, "cost": 0.0, "seconds": 0.0,
                "reasoning_tokens": len(reasoning) // 4, "answer_tokens": len(response) // 4, "teacher": "",
                "sampling": {}, "text": row["text"],
            }
        )  # fmt: skip
    return cast(list[Trace], traces), cast(dict[str, Problem], problems)


def judge(rows: list[Row], settings: dict[str, dict[str, Any]]) -> dict[str, list[Verdict]]:
    """Every filter's verdicts, with its defaults where `settings` says nothing."""
    filters = Filters.model_validate({name: settings.get(name, {}) for name in JUDGED if name != "truncation"})
    traces, problems = as_traces(rows)
    return {name: filter_module(name).check(traces, problems, getattr(filters, name, None)) for name in JUDGED}


def should_fail(row: Row, name: str) -> bool:
    return bool(row["near_copy"]) if name in COMPARING else name in row["fails"]


def score(rows: list[Row], verdicts: dict[str, list[Verdict]], part: str = "") -> dict[str, Counts]:
    """By filter. Near copies are counted among real traces and copies nearly like their base alone."""
    found = {name: Counts() for name in verdicts}
    for name, counts in found.items():
        for row, verdict in zip(rows, verdicts[name], strict=True):
            if (part and row["part"] != part) or (name in COMPARING and row["base"] and not row["near_copy"]):
                continue
            bad = should_fail(row, name)
            where = (counts.missed if bad else counts.passed) if verdict.passed else None
            where = where if where is not None else (counts.hits if bad else counts.false_alarms)
            where.append(row["id"])
    return found
