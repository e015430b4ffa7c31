"""What `decontamination`, `agreement` and `outliers` say of the labelled problems and samples, beside the labels."""

import gzip
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

from distill.filters import agreement, decontamination, outliers
from distill.recipe import AgreementFilter, DecontaminationFilter, OutliersFilter
from distill.records import Problem, Trace
from tests.data.labelled import Counts

HERE = Path(__file__).parent
Row = dict[str, Any]


def read(name: str) -> list[Row]:
    with gzip.open(HERE / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def traces(rows: Iterable[Row]) -> tuple[list[Trace], dict[str, Problem]]:
    """Problems without a reference answer; the response is the boxed answer."""
    made, problems = [], {}
    for number, row in enumerate(rows):
        key = row["problem"]
        problems[key] = {"id": key, "problem": key, "answer": None, "kind": "math", "source": "", "meta": {}}
        boxed = row.get("boxed")
        response = "" if boxed is None else f"\\boxed{{{boxed}}}"
        made.append(
            {"id": str(number), "problem_id": key, "sample": number, "finish_reason": "stop", "response": response,
             "reasoning_tokens": row.get("reasoning_tokens", 0)}
        )  # fmt: skip
    return cast(list[Trace], made), cast(dict[str, Problem], problems)


def count(rows: list[Row], passed: list[bool], bad: Callable[[Row], bool], name: Callable[[Row], str]) -> Counts:
    counts = Counts()
    for row, ok in zip(rows, passed, strict=True):
        place = (
            (counts.missed if bad(row) else counts.passed) if ok else (counts.hits if bad(row) else counts.false_alarms)
        )
        place.append(name(row))
    return counts


def score_decontamination(**settings: Any) -> tuple[Counts, dict[str, Counts]]:
    """All, and by part of the sample or change made."""
    rows = read("labelled_problems")
    asked = [row for row in rows if row["part"] != "evaluation"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "evaluation.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["part"] == "evaluation"))
        chosen = DecontaminationFilter.model_validate({"against": [{"source": str(path)}], **settings})
        passed = [verdict.passed for verdict in decontamination.check(*traces(asked), chosen)]

    def counted(keep: Callable[[Row], bool]) -> Counts:
        kept = [number for number, row in enumerate(asked) if keep(row)]
        return count(
            [asked[n] for n in kept], [passed[n] for n in kept], lambda r: r["contaminated"], lambda r: r["problem"]
        )

    parts = dict.fromkeys(_part(row) for row in asked)
    return counted(lambda _: True), {part: counted(_is(_part, part)) for part in parts}


def _part(row: Row) -> str:
    return row["change"] or row["part"]


def _rounds(row: Row) -> str:
    return f"{row['circles']} times"


def _is(what: Callable[[Row], str], wanted: str) -> Callable[[Row], bool]:
    return lambda row: what(row) == wanted


def score_agreement(**settings: Any) -> Counts:
    """Of the samples of problems whose four samples all have a boxed answer."""
    rows = [row for row in read("labelled_samples") if " x" not in row["problem"]]
    silent = {row["problem"] for row in rows if row["boxed"] is None}
    rows = [row for row in rows if row["problem"] not in silent]
    passed = [v.passed for v in agreement.check(*traces(rows), AgreementFilter.model_validate(settings))]
    return count(rows, passed, lambda row: not row["right"], lambda row: f"{row['model']}/{row['problem']}")


def score_outliers(**settings: Any) -> tuple[Counts, dict[str, Counts]]:
    """All, and by how often the reasoning goes round."""
    rows = read("labelled_samples")
    passed = [v.passed for v in outliers.check(*traces(rows), OutliersFilter.model_validate(settings))]

    def counted(keep: Callable[[Row], bool]) -> Counts:
        kept = [number for number, row in enumerate(rows) if keep(row)]
        chosen = [rows[n] for n in kept], [passed[n] for n in kept]
        return count(*chosen, lambda row: row["circles"] > 1, lambda row: f"{row['model']}/{row['problem']}")

    return counted(lambda _: True), {rounds: counted(_is(_rounds, rounds)) for rounds in map(_rounds, rows)}
