"""Stage 'eval': teacher, students and their baselines on the same held-out problems, sampled in the same way.

Small models on a CPU are decoded side by side, one model a thread with one torch thread each: their matrices are too
small for two cores to share, and torch's own threads wait for each other by spinning (two of them were 2 to 10 times
slower than one on a machine that was busy otherwise). A GPU takes the models one after the other.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.jsonl import Appender, read_jsonl, write_jsonl_atomic
from distill.problems import read_problems
from distill.recipe import Recipe, Sampling, Student, Teacher
from distill.records import Ask as TeacherAsk
from distill.shipped import resolve_model
from distill.training_jobs import cores
from evals.grading.extract import THINK_OPEN

if TYPE_CHECKING:
    from distill.progress import Progress
    from distill.runfolder import RunFolder
    from evals.lm import Answer, Ask, Backend

Row = dict[str, Any]
SMALL_BYTES = 200_000_000  # weights of a model that is decoded beside others


@dataclass(frozen=True)
class Model:
    """One model to evaluate: its name in the results, what identifies its weights, and how it is made ready."""

    name: str
    revision: str
    open: Callable[[], Backend]
    small: bool


def run(recipe: Recipe, run: RunFolder) -> dict[str, Any]:
    """Sample what is missing of every model's evaluation. Returns the stage's facts.

    A sample is counted only after its line is on the disk. Samples of other settings, weights or problems than the
    recipe's move to evals/superseded/, where going back to the old settings finds them.
    """
    from transformers.utils import logging as transformers_logging

    from evals.harness import count_problems, quiet

    settings, problems = recipe.evals, run.path("eval_problems.jsonl")
    if "distill_problems" in settings.tasks:
        read_problems(problems)  # says which line is wrong, before any model is loaded
    transformers_logging.disable_progress_bar()
    with quiet():
        counts = count_problems(settings.tasks, problems)
        models = _models(recipe, run)
        files = {model.name: _Samples(run, model.name) for model in models}
        each = sum(counts.values()) * settings.samples
        reusable = sum(min(each, files[model.name].fitting(model.revision, recipe)) for model in models)
        with run.progress("eval", each * len(models), "answers", done=reusable) as progress:
            shown = _Shown(progress)

            def work(model: Model) -> None:
                _evaluate(model, recipe, problems, files[model.name], shown)

            _side_by_side(models, work, shown.stop)
    return {
        "tokens": sum(file.tokens for file in files.values()),
        "problems": counts,
        "samples": settings.samples,
        "made": sum(file.made for file in files.values()),
        "torn": sum(file.torn for file in files.values()),
        "models": {model.name: {"revision": model.revision, **files[model.name].metrics} for model in models},
    }


def _side_by_side(models: list[Model], work: Callable[[Model], None], stop: threading.Event) -> None:
    """Small models as many at once as there are cores, then the others one by one. Raises the first failure.

    On a failure, or Ctrl-C, `stop` is set, so that the others end at their next finished samples.
    """
    import torch

    together = [] if torch.cuda.is_available() else [model for model in models if model.small]
    threads = torch.get_num_threads()

    def work_on_one_core(model: Model) -> None:
        torch.set_num_threads(1)
        if not stop.is_set():
            work(model)

    with ThreadPoolExecutor(min(max(1, len(together)), cores())) as pool:
        futures = [pool.submit(work_on_one_core, model) for model in together]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            stop.set()
            raise
    torch.set_num_threads(threads)
    for model in models:
        if model not in together:
            work(model)


def _models(recipe: Recipe, run: RunFolder) -> list[Model]:
    """Teacher first, as it takes longest; then each student between its floor and what it is compared with."""
    models = [_teacher(recipe)] if recipe.evals.teacher else []
    for student in recipe.students:
        folder = run.path("students", student.name)
        if "base" in student.baselines:
            models.append(_dense(f"{student.name}/base", resolve_model(student.base), student, folder, recipe))
        models.append(_dense(student.name, folder, student, folder, recipe))
        if "answers_only" in student.baselines:
            other = run.path("students", f"{student.name}-answers_only")
            models.append(_dense(f"{student.name}/answers_only", other, student, folder, recipe))
    return models


def _dense(name: str, weights: Path | str, student: Student, trained: Path, recipe: Recipe) -> Model:
    """A model of the student's architecture, asked in the chat form that the student was trained on."""
    from students.pretrained import content_hash, load_model, load_tokenizer

    def open_backend() -> Backend:
        import torch

        from evals.hf import HFBackend

        tokenizer = load_tokenizer(weights)
        return HFBackend(
            tokenizer,
            lambda: load_model(weights, tokenizer, student.dtype),
            batch_size=recipe.evals.batch_size,
            device="cuda" if torch.cuda.is_available() else "cpu",
            chat_template=load_tokenizer(trained).chat_template,
        )

    return Model(name, content_hash(weights)[:12], open_backend, _is_small(weights))


def _teacher(recipe: Recipe) -> Model:
    from distill.traces import identify_teacher

    teacher, evals = recipe.teacher, recipe.evals
    revision, small = identify_teacher(teacher)["id"], _is_small(resolve_model(teacher.model))
    asked = {name: getattr(evals, name) for name in ("samples", "temperature", "top_p", "max_tokens")}
    return Model("teacher", revision, lambda: _TeacherBackend(teacher, Sampling(**asked)), small)


def _is_small(weights: Path | str) -> bool:
    return isinstance(weights, Path) and sum(f.stat().st_size for f in weights.glob("*.safetensors")) <= SMALL_BYTES


class _TeacherBackend:
    """The traces stage's teacher as an evals backend. Its prompt is the chat itself, as any kind of teacher takes.

    The `<think>` behind it says what a teacher's template does: what is generated begins with reasoning.
    """

    def __init__(self, teacher: Teacher, sampling: Sampling) -> None:
        self._teacher, self._sampling = teacher, sampling

    def render(self, messages: list[dict[str, str]]) -> str:
        return json.dumps(messages, ensure_ascii=False) + THINK_OPEN

    def generate(self, asks: Iterable[Ask]) -> Iterator[Answer]:
        from distill.generation.asks import ListedAsks
        from distill.traces import open_teacher
        from evals.lm import Answer

        wanted = [
            TeacherAsk(
                ask.id,
                json.loads(ask.prompt.removesuffix(THINK_OPEN)),
                ask.temperature,
                ask.top_p,
                ask.max_tokens,
                ask.seed,
            )
            for ask in asks
        ]
        for replies in open_teacher(self._teacher, self._sampling).generate(ListedAsks(wanted)):
            for reply in replies:
                if reply.finish_reason == "failed":
                    raise ConnectionError(f"the teacher gave no answer to {reply.id} ({reply.error}); start again")
                tokens = reply.reasoning_tokens + reply.answer_tokens
                yield Answer(reply.id, reply.text, reply.finish_reason, tokens, reply.seconds)


class _Samples:
    """evals/<model>.jsonl: samples of earlier attempts, and what this one adds."""

    def __init__(self, run: RunFolder, model: str) -> None:
        from evals.compare import samples_file

        self.path = samples_file(run.path("evals"), model)
        self.superseded = samples_file(run.path("evals", "superseded"), model)
        self.tokens = self.made = 0
        self.metrics: Row = {}
        with Appender(self.path) as file:
            self.torn = file.torn
        # A kill in settle() may have left a sample in both files.
        files = [path for path in (self.superseded, self.path) if path.exists()]
        self.rows = list({row["id"]: row for path in files for _, row in read_jsonl(path)}.values())

    def fitting(self, revision: str, recipe: Recipe) -> int:
        """How many of the rows this recipe asks for, near enough for a progress bar."""
        evals = recipe.evals
        sampling = {"temperature": evals.temperature, "top_p": evals.top_p, "max_tokens": evals.max_tokens}
        wanted = {"revision": revision, "sampling": {**sampling, "seed": recipe.seed}}
        return sum(wanted.items() <= row.items() and row["sample"] < evals.samples for row in self.rows)

    def settle(self, current: list[Row]) -> None:
        """Leave exactly `current` in the file; others go to `superseded`. At any moment each sample is in one."""
        ids = {row["id"] for row in current}
        others = [row for row in self.rows if row["id"] not in ids]
        in_file = {row["id"] for _, row in read_jsonl(self.path)}
        if in_file != ids:
            write_jsonl_atomic(self.superseded, [*others, *current])
            write_jsonl_atomic(self.path, current)
            write_jsonl_atomic(self.superseded, others)


class _Shown:
    """The stage's one progress display, advanced from several threads."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._lock = progress, threading.Lock()
        self.stop = threading.Event()

    def advance(self, model: str, rows: list[Row]) -> None:
        with self._lock:
            self._progress.advance(len(rows), model=model)


def _evaluate(model: Model, recipe: Recipe, problems: Path, samples: _Samples, shown: _Shown) -> None:
    from evals.harness import evaluate

    settings = recipe.evals
    with Appender(samples.path) as file:

        def keep(rows: list[Row]) -> None:
            file.append_many(rows)
            samples.rows += rows
            samples.made += len(rows)
            shown.advance(model.name, rows)
            if shown.stop.is_set():
                raise InterruptedError(f"evaluation of {model.name} stopped because another one did")

        result = evaluate(
            model.open(), model_name=model.name, revision=model.revision, tasks=settings.tasks, problems=problems,
            samples=settings.samples, temperature=settings.temperature, top_p=settings.top_p,
            max_tokens=settings.max_tokens, seed=recipe.seed, instruction=recipe.sampling.instruction,
            done=samples.rows, keep=keep,
        )  # fmt: skip
    samples.settle(result.rows)
    samples.tokens = sum(row["tokens"] for row in result.rows)
    samples.metrics = {"tasks": result.metrics, "tokens": samples.tokens}
