"""Stage 'train': every student on the traces, and its baseline 'answers_only' on the answers, for as many tokens.

The models do not depend on each other, so they may train at the same time (distill.training_jobs).
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import UserError
from distill.recipe import Recipe, Student
from distill.shipped import resolve_model
from distill.training_jobs import Job, read_rows, run_jobs, workers_for

if TYPE_CHECKING:
    from distill.runfolder import RunFolder
    from students.sft import SftResult, SftSettings

NOTES = """Trained on `dataset/` of the run `{run}`: {rows}. The dataset's card says who wrote the traces, on what
problems, and how many of them each filter left; `verdicts.jsonl` has the reason for every trace left out."""


def run(recipe: Recipe, run: "RunFolder") -> dict[str, Any]:
    """Train into students/<name>/ and students/<name>-answers_only/; finished ones are kept, others resumed.

    Raises UserError for a base or dataset that cannot be trained on.
    """
    from students.checkpoints import saved_tokens

    jobs = list(plan_jobs(recipe, run))
    workers = workers_for(jobs)
    seen = {job.name: min(job.tokens, saved_tokens(job.out.with_name(job.out.name + ".partial"))) for job in jobs}
    with run.progress("train", sum(job.tokens for job in jobs), "tokens", done=sum(seen.values())) as progress:

        def show(name: str, record: dict[str, Any]) -> None:
            # After a resume with other settings a model starts anew: what it has seen before is not counted twice.
            progress.advance(max(0, record["tokens"] - seen[name]), **{name: record["loss"]})
            seen[name] = max(seen[name], record["tokens"])

        results = run_jobs(jobs, workers, show)
        progress.advance(sum(results[job.name].tokens - seen[job.name] for job in jobs))
    facts = {name: _facts(results[name]) for name in sorted(results)}
    slots = sum(r.tokens / (1 - r.padding_fraction) for r in results.values())
    tokens = sum(result.tokens for result in results.values())
    return {"tokens": tokens, "padding_fraction": round(1 - tokens / slots, 4), "workers": workers, "students": facts}


def plan_jobs(recipe: Recipe, run: "RunFolder") -> Iterator[Job]:
    """Every model the recipe asks for. The baseline's budget is the tokens its student will see."""
    from students.sft import plan

    for index, student in enumerate(recipe.students):
        name, settings = student.name, sft_settings(student, recipe.seed)
        traces = run.path("dataset")
        rows = read_rows(traces / "train.jsonl")
        size = plan(settings, rows, str(traces / "train.jsonl"))
        notes = NOTES.format(run=recipe.name, rows="the teacher's reasoning and answers")
        yield Job(name, settings, *_files(traces), run.path("students", name), notes, size.tokens)
        if "answers_only" in student.baselines:
            answers = traces / "answers_only"
            if not (answers / "train.jsonl").is_file():
                raise UserError(
                    f"students.{index}.baselines: 'answers_only' needs problems with a reference answer, and "
                    f"{answers / 'train.jsonl'} is not there"
                )
            settings = replace(settings, max_tokens=size.tokens)
            size = plan(settings, read_rows(answers / "train.jsonl"), str(answers / "train.jsonl"))
            notes = NOTES.format(run=recipe.name, rows="the same problems' answers alone, without the reasoning")
            name = f"{name}-answers_only"
            yield Job(name, settings, *_files(answers), run.path("students", name), notes, size.tokens)


def sft_settings(student: Student, seed: int) -> "SftSettings":
    """The recipe's student as the trainer's settings."""
    from students.loop import Optimisation
    from students.lora import Lora
    from students.sft import SftSettings

    lora = student.lora
    targets = lora.target_modules if isinstance(lora.target_modules, str) else tuple(lora.target_modules)
    return SftSettings(
        base=resolve_model(student.base),
        optimisation=Optimisation(
            learning_rate=student.learning_rate, schedule=student.schedule, warmup_fraction=student.warmup_fraction,
            weight_decay=student.weight_decay, grad_clip=student.grad_clip, dtype=student.dtype,
            checkpoint_every=student.checkpoint_every, recompute=student.recompute, seed=seed,
        ),
        method=student.method,
        lora=Lora(lora.r, lora.alpha, lora.dropout, targets) if student.method == "lora" else None,
        epochs=student.epochs, max_length=student.max_length, tokens_per_step=student.tokens_per_step,
        packing=student.packing,
    )  # fmt: skip


def _files(folder: Path) -> tuple[Path, Path | None]:
    validation = folder / "validation.jsonl"
    return folder / "train.jsonl", validation if validation.is_file() else None


def _facts(result: "SftResult") -> dict[str, Any]:
    keys = ("steps", "tokens", "examples", "too_long", "seconds", "padding_fraction", "loss", "validation_loss")
    return {key: getattr(result, key) for key in keys}
