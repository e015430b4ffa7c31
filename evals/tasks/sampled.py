"""Functions of the tasks in this folder: reading problems, and grading k samples of each.

Loaded by lm-eval from this path, also by the plain `lm-eval` command; it needs the installed package for
evals.grading only.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.grading import grade
from evals.grading.extract import THINK_CLOSE

if TYPE_CHECKING:
    from datasets import DatasetDict

R1_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."  # R1's usage notes


def problems(
    file: str | None = None,
    problems: str | None = None,
    benchmarks: str | None = None,
    instruction: str | None = None,
    **_: Any,
) -> DatasetDict:
    """The task's `custom_dataset`: one row a problem with id, prompt, answer, kind and family.

    file: name in the folder `benchmarks` (default: environment variable DISTILL_BENCHMARKS); without it, `problems`
    (default: DISTILL_PROBLEMS) is the path of a problems.jsonl. `instruction` goes on a line of its own behind each
    problem; default: R1's for benchmarks, none for a problems.jsonl. lm-eval passes all --metadata here, hence **_.
    Raises ValueError naming what is missing.
    """
    from datasets import Dataset, DatasetDict

    if file is not None:
        folder = benchmarks or os.environ.get("DISTILL_BENCHMARKS")
        if not folder:
            raise ValueError(
                f"no folder for {file}: pass --metadata '{{\"benchmarks\": FOLDER}}' or set DISTILL_BENCHMARKS"
            )
        path = Path(folder) / file
    else:
        named = problems or os.environ.get("DISTILL_PROBLEMS")
        if not named:
            raise ValueError("no problems: pass --metadata '{\"problems\": FILE}' or set DISTILL_PROBLEMS")
        path = Path(named)
    if instruction is None:
        instruction = R1_INSTRUCTION if file is not None else ""
    rows = [_row(number, row, path, instruction) for number, row in _lines(path)]
    if not rows:
        raise ValueError(f"{path}: no problems in it")
    seen: set[str] = set()
    for row in rows:
        identity = str(row["id"])
        if identity in seen:
            raise ValueError(f"{path}: two problems have the id {identity!r}; ids must differ")
        seen.add(identity)
    return DatasetDict({"test": Dataset.from_list(rows)})


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a JSONL file of problems")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not valid JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
            yield number, row


def _row(number: int, row: dict[str, Any], path: Path, instruction: str) -> dict[str, str | None]:
    """One problem in our form; published benchmarks name their fields problem or question, and answer."""
    text = row.get("problem", row.get("question"))
    if not isinstance(text, str):
        raise ValueError(f"{path}:{number}: no text field 'problem' or 'question'")
    answer = row.get("answer")
    kind = row.get("kind") or "math"
    if kind == "math" and isinstance(answer, str) and "####" in answer:  # GSM8K as published
        answer = answer.rsplit("####", 1)[1].replace(",", "").strip()
    meta = row.get("meta")
    family = meta.get("family") if isinstance(meta, dict) else None
    return {
        "id": str(row.get("id", row.get("unique_id", f"{path.stem}-{number}"))),
        "prompt": f"{text}\n{instruction}" if instruction else text,
        "answer": None if answer is None else str(answer),
        "kind": kind,
        "family": str(family or row.get("subject") or ""),
    }


def keep_all(responses: Iterable[list[str]], docs: Any) -> Iterable[list[str]]:
    """The filter that filters nothing: every one of the k samples is graded."""
    return responses


def process_results(doc: dict[str, Any], results: list[list[str]]) -> dict[str, float]:
    """Metrics of one problem, each a mean over its k samples, in [0, 1].

    Responses from our harness bring their grade and how they ended. Plain lm-eval hands over bare text; there a
    response counts as truncated if it neither closed its reasoning nor stated an answer.
    """
    correct = truncated = no_answer = 0
    samples = results[0]
    for text in samples:
        row = getattr(text, "row", None)
        if row is None:
            graded = grade(text, doc["answer"], doc["kind"])
            unfinished = graded.extracted is None and THINK_CLOSE not in text
            row = {
                "correct": graded.verdict == "correct",
                "truncated": unfinished,
                "no_answer": graded.extracted is None,
            }
        correct += row["correct"]
        truncated += row["truncated"]
        no_answer += row["no_answer"]
    return {
        "mean@k": correct / len(samples),
        "truncated": truncated / len(samples),
        "no_answer": no_answer / len(samples),
    }
