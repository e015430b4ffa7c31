"""results.json: what a run found, from the files in its folder.

The numbers are evals.compare's; this module finds out what there is to compare, puts funnel, times and tokens
beside it, and lists in words what is missing, so that a half-finished run has results too. The keys are an
interface for other tools: later versions add some and rename none.
"""

import json
from pathlib import Path
from typing import Any

from distill.generation.past import generation
from distill.jsonl import read_jsonl
from distill.recipe import Recipe, Student
from distill.shipped import resolve_model

Row = dict[str, Any]


def build(recipe: Recipe, folder: Path, manifest: Row) -> Row:
    """The contents of results.json. All rates are fractions in [0, 1]; a run's missing parts are named in `missing`.

    Raises UserError for a file that does not parse, ValueError if evaluations of one student are of different problems.
    """
    missing: list[str] = []
    stages = manifest.get("stages", {})
    funnel = _funnel(folder, missing)
    missing += [f"student {s.name} has not been trained" for s in recipe.students if not _is_trained(folder, s.name)]
    compared = _compare(recipe, folder, missing)
    missing += [f"stage '{name}' is unfinished" for name, entry in stages.items() if _is_open(name, entry)]
    told = {name: entry for name, entry in stages.items() if name != "report" and "seconds" in entry}
    return {
        "run": recipe.name,
        "problems": _problems(folder, manifest),
        "teacher": {"name": _teacher_name(recipe), "mean": None, "ci95": None} | (compared["teacher"] or {}),
        "funnel": funnel,
        "students": compared["students"],
        "seconds": {name: entry["seconds"] for name, entry in told.items()},
        "tokens": {name: entry.get("tokens", 0) for name, entry in told.items()},
        "families": compared["families"],
        "tasks": compared["tasks"],
        "evals": recipe.evals.model_dump(include={"samples", "temperature", "top_p", "max_tokens", "bootstrap"}),
        "trained_on": _lines(folder / "dataset" / "train.jsonl"),
        "peak_rss_bytes": {name: entry["peak_rss_bytes"] for name, entry in told.items() if "peak_rss_bytes" in entry},
        "generation": generation(folder, manifest, funnel[-1]["out"] if funnel else None),
        "missing": missing,
    }


def _is_trained(folder: Path, student: str) -> bool:
    return (folder / "students" / student / "config.json").is_file()


def _is_open(name: str, entry: Row) -> bool:
    return name != "report" and entry.get("status") != "done"


def _problems(folder: Path, manifest: Row) -> Row:
    return {
        "train": _lines(folder / "problems.jsonl"),
        "eval": _lines(folder / "eval_problems.jsonl"),
        "overlap": (manifest.get("problems") or {}).get("overlap"),
    }


def _lines(path: Path) -> int:
    return sum(1 for _ in read_jsonl(path, torn_ok=True)) if path.is_file() else 0


def _funnel(folder: Path, missing: list[str]) -> list[Row]:
    if not (folder / "traces" / "traces.jsonl").is_file():
        missing.append("no traces yet: 'distill traces' has not run")
    path = folder / "funnel.json"
    if not path.is_file():
        missing.append("no verdicts and no dataset yet: 'distill filter' has not run")
        return []
    return json.loads(path.read_bytes())


def _teacher_name(recipe: Recipe) -> str:
    return Path(recipe.teacher.model).name


def _compare(recipe: Recipe, folder: Path, missing: list[str]) -> Row:
    """evals.compare over the models whose evaluations are complete; the others go to `missing` with the reason."""
    from evals.compare import TEACHER, Compared, compare

    evals = folder / "evals"
    if not evals.is_dir():
        missing.append("no comparison yet: 'distill eval' has not run")
        return {"teacher": None, "students": [], "families": [], "tasks": []}
    students: list[Compared] = []
    for student in recipe.students:
        if _usable(evals, student.name, missing):
            baselines = [name for name in student.baselines if _usable(evals, f"{student.name}/{name}", missing)]
            students.append(Compared(student.name, architecture(student, folder), baselines))
    teacher = _teacher_name(recipe) if recipe.evals.teacher and _usable(evals, TEACHER, missing) else None
    return compare(evals, students, teacher_name=teacher, bootstrap=recipe.evals.bootstrap, seed=recipe.seed)


def _usable(evals: Path, model: str, missing: list[str]) -> bool:
    from evals.compare import load_scored, samples_file

    path = samples_file(evals, model)
    try:
        load_scored(path)
    except ValueError as error:
        missing.append(f"evaluation of {model}: {str(error).removeprefix(f'{path}: ')}")
        return False
    return True


def architecture(student: Student, folder: Path) -> str:
    """`model_type` ('qwen2', 'llama') of the student's own configuration, else of its base's; 'unknown' without."""
    for model in (folder / "students" / student.name, resolve_model(student.base)):
        path = Path(model) / "config.json"
        if path.is_file():
            return str(json.loads(path.read_bytes()).get("model_type", "unknown"))
    return "unknown"
