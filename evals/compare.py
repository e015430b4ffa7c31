"""From samples on disk to the comparison: each student against its baselines and its teacher, paired per problem.

The samples of model 'tiny-qwen/base' lie in evals/tiny-qwen.base.jsonl. What is returned are the parts `teacher`,
`students` and `families` of results.json; all rates are fractions in [0, 1].
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evals.stats import mean_at_k, paired_difference

Row = dict[str, Any]
Problem = tuple[str, str]  # task, problem id
TEACHER = "teacher"


@dataclass(frozen=True)
class Compared:
    """A student, its architecture family ('qwen2', 'llama', ...) and which baselines it is compared with."""

    name: str
    family: str
    baselines: Sequence[str]


@dataclass(frozen=True)
class Scored:
    """One model's samples, in order of problems and sample indices."""

    rows: list[Row]
    problems: list[Problem]
    families: list[str]
    correct_PK: np.ndarray

    @property
    def rates(self) -> Row:
        """How the samples ended. Tokens are generated tokens, the reasoning included."""
        return {
            "truncated": _mean(row["truncated"] for row in self.rows),
            "no_answer": _mean(row["no_answer"] for row in self.rows),
            "tokens_mean": _mean(row["tokens"] for row in self.rows),
            "samples": self.correct_PK.shape[1],
        }


def samples_file(folder: Path, model: str) -> Path:
    """Where a model's samples lie in the folder of evaluations."""
    return folder / f"{model.replace('/', '.')}.jsonl"


def compare(
    folder: Path,
    students: Iterable[Compared],
    *,
    teacher_name: str | None = None,
    bootstrap: int = 2000,
    seed: int = 0,
) -> Row:
    """The comparison of all students in `folder`; `teacher_name` None where the teacher was not evaluated.

    Returns {"teacher", "students", "families", "tasks"}; see results.json in the README. Differences are student minus
    baseline. Raises ValueError naming file and problem where an evaluation is missing, unfinished or on other problems.
    """
    scored: dict[str, Scored] = {}
    if teacher_name is not None:
        scored[TEACHER] = load_scored(samples_file(folder, TEACHER))
    entries = []
    for student in students:
        own = scored[student.name] = load_scored(samples_file(folder, student.name))
        entry = {"name": student.name, "family": student.family, **_score(own, bootstrap, seed), "baselines": []}
        for baseline in student.baselines:
            model = f"{student.name}/{baseline}"
            other = scored[model] = load_scored(samples_file(folder, model))
            pair = _pair(own, other, samples_file(folder, model), bootstrap, seed)
            entry["baselines"].append({"name": baseline, **_score(other, bootstrap, seed), **pair})
        if TEACHER in scored:
            path = samples_file(folder, TEACHER)
            entry["against_teacher"] = _pair(own, scored[TEACHER], path, bootstrap, seed)
        entries.append(entry)
    teacher = {"name": teacher_name, **_score(scored[TEACHER], bootstrap, seed)} if TEACHER in scored else None
    return {
        "teacher": teacher,
        "students": entries,
        "families": _means_by("family", scored, {m: s.families for m, s in scored.items()}),
        "tasks": _means_by("task", scored, {m: [task for task, _ in s.problems] for m, s in scored.items()}),
    }


def load_scored(path: Path) -> Scored:
    """Read one model's samples. Raises ValueError if the file is missing, does not parse or has uneven samples."""
    by_problem: dict[Problem, list[Row]] = defaultdict(list)
    for number, row in _lines(path):
        try:
            by_problem[row.get("task", ""), row["problem_id"]].append(row)
        except KeyError:
            raise ValueError(f"{path}:{number}: no field 'problem_id'") from None
    if not by_problem:
        raise ValueError(f"{path}: no samples in it; the evaluation has not run")
    problems = sorted(by_problem)
    count = max(len(rows) for rows in by_problem.values())
    for problem in problems:
        by_problem[problem].sort(key=lambda row: row["sample"])
        if [row["sample"] for row in by_problem[problem]] != list(range(count)):
            have = len(by_problem[problem])
            raise ValueError(
                f"{path}: problem {problem[1]} has {have} of {count} samples; the evaluation is unfinished"
            )
    return Scored(
        rows=[row for problem in problems for row in by_problem[problem]],
        problems=problems,
        families=[str(by_problem[problem][0].get("family") or "") for problem in problems],
        correct_PK=np.array([[bool(row["correct"]) for row in by_problem[problem]] for problem in problems]),
    )


def _lines(path: Path) -> Iterable[tuple[int, Row]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; the evaluation has not run")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not valid JSON ({error.msg})") from None


def _score(scored: Scored, bootstrap: int, seed: int) -> Row:
    estimate = mean_at_k(scored.correct_PK, resamples=bootstrap, seed=seed)
    return {"mean": estimate.mean, "ci95": [estimate.low, estimate.high], **scored.rates}


def _pair(own: Scored, other: Scored, path: Path, bootstrap: int, seed: int) -> Row:
    if own.problems != other.problems:
        differ = sorted(set(own.problems) ^ set(other.problems))
        raise ValueError(
            f"{path}: {len(differ)} problems differ from the student's (first: {differ[0][1]}); evaluate both alike"
        )
    difference = paired_difference(own.correct_PK, other.correct_PK, resamples=bootstrap, seed=seed)
    ours_P, theirs_P = own.correct_PK.mean(axis=1), other.correct_PK.mean(axis=1)
    return {
        "paired_diff": difference.mean,
        "paired_ci95": [difference.low, difference.high],
        "min_detectable_diff": difference.min_detectable,
        "higher": int((ours_P > theirs_P).sum()),
        "same": int((ours_P == theirs_P).sum()),
        "lower": int((ours_P < theirs_P).sum()),
    }


def _means_by(name: str, scored: dict[str, Scored], labels: dict[str, list[str]]) -> list[Row]:
    """[{name: label, "problems": P, "means": {model: mean}}] for each label, sorted."""
    table: dict[str, Row] = {}
    for model, samples in scored.items():
        groups: dict[str, list[float]] = defaultdict(list)
        for label, score in zip(labels[model], samples.correct_PK.mean(axis=1).tolist(), strict=True):
            groups[label].append(score)
        for label, scores in groups.items():
            row = table.setdefault(label, {name: label, "problems": len(scores), "means": {}})
            row["means"][model] = float(np.mean(scores))
    return [table[label] for label in sorted(table)]


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
