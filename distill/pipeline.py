"""The whole run: problems → traces → filter → train → eval → report, each skipped when done on the same inputs.

A stage's inputs are the parts of the recipe it reads and the content of the files it reads, as one hash. So a changed
filter re-filters and re-trains but leaves the traces, and an edited dataset re-trains.
"""

import difflib
import importlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from distill.errors import Unfinished, UserError
from distill.files import sha256_json, sha256_tree
from distill.progress import clock
from distill.recipe import ForeignTraces, ProblemSource, Recipe
from distill.runfolder import RunFolder, Shard
from distill.shipped import SHIPPED_MODELS, resolve_model

Inputs = Callable[[Recipe, RunFolder], list[Any]]
_HOW_IT_IS_ASKED: Any = {
    "batch_size": True, "endpoints": True, "stream": True, "idle_timeout": True, "timeout": True, "attempts": True,
    "device": True,
    "vllm": {"tensor_parallel", "pipeline_parallel", "data_parallel", "expert_parallel", "gpu_memory_utilization",
             "speculate", "python"},
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """`module` holds the stage's run(recipe, run); `inputs` is what it depends on, as JSON; `outputs` are its files."""

    name: str
    module: str
    inputs: Inputs
    outputs: Callable[[Recipe], list[str]]


def _problem_inputs(recipe: Recipe, run: RunFolder) -> list[Any]:
    asked: list[ProblemSource | ForeignTraces] = [*recipe.traces] if recipe.traces else [recipe.problems]
    sources = [*asked, recipe.evals.problems]
    return [[source.model_dump(), _source_hash(source)] if source else None for source in sources]


def _source_hash(source: ProblemSource | ForeignTraces) -> str | None:
    return None if source.source == "reasoning-gym" else sha256_tree(Path(source.source))


def _trace_inputs(recipe: Recipe, run: RunFolder) -> list[Any]:
    if recipe.traces:
        return [run.manifest.data.get("imported")]
    return [recipe.seed, *_teacher_hash(recipe), recipe.sampling.model_dump(), run.shard, _hash(run, "problems.jsonl")]


def _filter_inputs(recipe: Recipe, run: RunFolder) -> list[Any]:
    # traces.jsonl may hold traces of earlier settings too: which of them count follows from sampling and teacher.
    wanted = [recipe.seed, recipe.sampling.model_dump(), run.manifest.data.get("teacher")]
    settings: list[Any] = [recipe.filters.model_dump(), recipe.selection.model_dump()]
    settings += [_source_of_rates(recipe)] if recipe.selection.difficulty else []
    if recipe.filters.decontamination is not None:
        settings += [{"set": _source_hash(source)} for source in recipe.filters.decontamination.against]
    return [wanted, settings, _hash(run, "problems.jsonl"), _hash(run, "traces/traces.jsonl")]


def _source_of_rates(recipe: Recipe) -> str | None:
    rates = recipe.selection.difficulty and recipe.selection.difficulty.student
    return sha256_tree(Path(rates)) if rates else None


def _train_inputs(recipe: Recipe, run: RunFolder) -> list[Any]:
    students = [[student.model_dump(), _model_hash(student.base)] for student in recipe.students]
    # The rows, not the card: a funnel told otherwise must not train anew.
    rows = sorted(path.relative_to(run.path("dataset")) for path in run.path("dataset").rglob("*.jsonl"))
    return [recipe.seed, students, [[str(name), _hash(run, str("dataset" / name))] for name in rows]]


def _eval_inputs(recipe: Recipe, run: RunFolder) -> list[Any]:
    settings = [recipe.evals.model_dump(exclude={"batch_size", "bootstrap"}), recipe.sampling.instruction]
    bases = [_model_hash(student.base) for student in recipe.students]
    return [recipe.seed, settings, _teacher_hash(recipe), bases, _students_hash(run), _hash(run, "eval_problems.jsonl")]


def _report_inputs(recipe: Recipe, run: RunFolder) -> list[Any]:
    files = [_hash(run, name) for name in ("traces/traces.jsonl", "verdicts.jsonl", "evals")]
    return [recipe.model_dump(), files]


def _hash(run: RunFolder, name: str) -> str | None:
    return sha256_tree(run.path(name))


def _model_hash(name: str) -> str | None:
    """Content of a model's folder; None for a hub name or an endpoint, whose name alone stands for it."""
    model = resolve_model(name)
    return sha256_tree(model) if isinstance(model, Path) else None


def _teacher_hash(recipe: Recipe) -> list[Any]:
    """What the teacher writes; not where it runs, how many at once, what it costs and how patiently it is asked."""
    return [recipe.teacher.model_dump(exclude=_HOW_IT_IS_ASKED), _model_hash(recipe.teacher.model)]


def _students_hash(run: RunFolder) -> list[list[str | None]]:
    """The finished models only: logs, checkpoints and how long it took do not change what is measured."""
    files = sorted(
        p
        for p in run.path("students").glob("*/*")
        if p.suffix in (".safetensors", ".json", ".jinja") and p.name != "training.json"
    )
    return [[p.relative_to(run.folder).as_posix(), sha256_tree(p)] for p in files]


def _problem_outputs(recipe: Recipe) -> list[str]:
    imported = ["traces/traces.jsonl"] if recipe.traces else []
    return ["problems.jsonl", *imported] + (["eval_problems.jsonl"] if recipe.evals.problems else [])


def _train_outputs(recipe: Recipe) -> list[str]:
    names = [student.name for student in recipe.students]
    names += [f"{student.name}-answers_only" for student in recipe.students if "answers_only" in student.baselines]
    return [f"students/{name}/config.json" for name in names]


def _eval_outputs(recipe: Recipe) -> list[str]:
    models = ["teacher"] if recipe.evals.teacher else []
    for student in recipe.students:
        models += [student.name, *(f"{student.name}.{baseline}" for baseline in student.baselines)]
    return [f"evals/{model}.jsonl" for model in models]


STAGES = (
    Stage("problems", "distill.problems", _problem_inputs, _problem_outputs),
    Stage("traces", "distill.traces", _trace_inputs, lambda recipe: ["traces/traces.jsonl"]),
    Stage("filter", "distill.filtering", _filter_inputs, lambda recipe: ["dataset/train.jsonl", "verdicts.jsonl"]),
    Stage("train", "distill.train", _train_inputs, _train_outputs),
    Stage("eval", "distill.evaluate", _eval_inputs, _eval_outputs),
    Stage("report", "distill.report", _report_inputs, lambda recipe: ["results.json", "report.html"]),
)


def run_all(recipe: Recipe, folder: Path) -> Path:
    """Every stage in order, without students up to the dataset. Returns the run's folder."""
    names = [stage.name for stage in STAGES]
    run_stages(names if recipe.students else names[: names.index("train")], recipe, folder)
    return folder


def run_stages(
    names: Sequence[str], recipe: Recipe, folder: Path, *, force: bool = False, shard: Shard | None = None
) -> None:
    """Run the named stages, which are consecutive; those before them must be complete, or have been stopped.

    `force` runs what is done once more, on whatever the earlier stages left (a folder copied from elsewhere, say).
    `shard`: the folder is for this part of the traces. Raises UserError if an earlier stage is unfinished or was made
    from another recipe, or the folder is in use; Unfinished or KeyboardInterrupt if a stage stopped.
    """
    console = Console(stderr=True, highlight=False)
    if not recipe.students and {"train", "eval"} & set(names):
        raise UserError("students: the recipe names none to train or to evaluate")
    if not recipe.evals.tasks and "eval" in names:
        raise UserError("evals.tasks: the recipe names nothing to evaluate on")
    if "train" in names:
        _check_bases(recipe)
    order = [stage.name for stage in STAGES]
    first = order.index(names[0])
    if first and not any((folder / name).is_file() for stage in STAGES[:first] for name in stage.outputs(recipe)):
        raise UserError(f"{folder}: there is nothing to go on from; run `distill run` with the same recipe first")
    with RunFolder.open(folder, recipe, shard) as run:
        console.print(f"run {recipe.name} in {folder}", soft_wrap=True)
        for stage in STAGES[:first]:
            _require_complete(stage, recipe, run, needed=stage is STAGES[first - 1] and not force, fresh=not force)
        for stage in STAGES[first : first + len(names)]:
            inputs = stage_inputs(stage, recipe, run)
            if not force and is_done(stage, inputs, recipe, run):
                console.print(f"{stage.name:<8}  already done, skipped")
                continue
            _run_stage(stage, inputs, recipe, run)
            entry = run.manifest.stage(stage.name)
            if entry["status"] == "stopped" and not entry.get("interrupted"):
                raise Unfinished(f"{stage.name}: {entry['stopped']}")
            console.print(f"{stage.name:<8}  {entry.get('stopped') or 'done in ' + clock(entry['seconds'])}")
            if entry.get("interrupted"):
                raise KeyboardInterrupt


def _check_bases(recipe: Recipe) -> None:
    """Raise UserError for a base that is plainly not there: before the teacher's hours of work, not after."""
    from students.pretrained import check_base

    for index, student in enumerate(recipe.students):
        base = resolve_model(student.base)
        near = difflib.get_close_matches(str(base), SHIPPED_MODELS, n=1, cutoff=0.8) if isinstance(base, str) else []
        if near:
            raise UserError(f"students.{index}.base: no model '{base}'; did you mean '{near[0]}'?")
        try:
            check_base(base)
        except ValueError as error:
            raise UserError(f"students.{index}.base: {error}") from None


def _run_stage(stage: Stage, inputs: str, recipe: Recipe, run: RunFolder) -> None:
    function = importlib.import_module(stage.module).run
    run.begin(stage.name, inputs)
    try:
        facts = function(recipe, run) or {}
    except BaseException:
        with suppress(OSError):  # on a full device the seconds are the lesser loss; the first error is the one to tell
            run.beat()
        raise
    run.finish(stage.name, **facts)


def stage_inputs(stage: Stage, recipe: Recipe, run: RunFolder) -> str:
    return sha256_json([stage.name, stage.inputs(recipe, run)])


def is_done(stage: Stage, inputs: str, recipe: Recipe, run: RunFolder) -> bool:
    owed = run.manifest.stage(stage.name).get("unanswered")  # verdicts that a judge did not give yet
    return run.stage_done(stage.name, inputs) and not owed and _has_outputs(stage, recipe, run)


def _has_outputs(stage: Stage, recipe: Recipe, run: RunFolder) -> bool:
    return all(run.path(name).is_file() for name in stage.outputs(recipe))


def _require_complete(stage: Stage, recipe: Recipe, run: RunFolder, *, needed: bool, fresh: bool) -> None:
    """Raise UserError unless `stage` is done (on the present inputs if `fresh`).

    One that was stopped leaves what it has to those after it. It may be somebody else's work: files without an entry in
    the manifest are taken as they are. Only the stage just before (`needed`) must have left something; a dataset from
    elsewhere trains without traces and verdicts.
    """
    entry = run.manifest.data["stages"].get(stage.name)
    cure = f"run `distill {COMMANDS[stage.name]}` or `distill run` with the same recipe first"
    if needed and not any(run.path(name).is_file() for name in stage.outputs(recipe)):
        raise UserError(f"{run.folder}: stage '{stage.name}' has not been run; {cure}")
    if entry is None or not fresh:
        return
    if entry.get("status") not in ("done", "stopped"):
        raise UserError(f"{run.folder}: stage '{stage.name}' is unfinished; {cure}")
    if entry.get("inputs") != stage_inputs(stage, recipe, run):
        raise UserError(f"{run.folder}: stage '{stage.name}' was made from other settings or files; {cure}")


COMMANDS = {"problems": "traces", "traces": "traces", "filter": "filter", "train": "train", "eval": "eval"}
