"""One model on our lm-eval tasks: sampled, resumed, graded.

We call lm_eval's `evaluate` rather than `simple_evaluate`: the latter spends three seconds a model on a
description of the environment (pip list and the like) that the run's manifest has already.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evals.lm import Backend, Row

TASKS_FOLDER = Path(__file__).with_name("tasks")


@dataclass(frozen=True)
class Evaluation:
    """`rows`: one a sample, in the order of problems and samples; `metrics`: task -> metric -> value in [0, 1]."""

    rows: list[Row]
    metrics: dict[str, dict[str, float]]


def evaluate(
    backend: Backend,
    *,
    model_name: str,
    revision: str,
    tasks: list[str],
    problems: str | Path | None = None,
    benchmarks: str | Path | None = None,
    samples: int = 4,
    temperature: float = 0.6,
    top_p: float = 0.95,
    max_tokens: int = 32768,
    seed: int = 0,
    instruction: str | None = None,
    done: Iterable[Row] = (),
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> Evaluation:
    """Run tasks of evals/tasks on one model and return every sample's row with the metrics.

    problems: the file of task distill_problems; benchmarks: the folder of the others; instruction: goes on a line
    of its own behind each problem (None: what the task does by itself).
    revision: a hash of the weights, so that rows of other weights are not taken for this model's.
    done: rows of earlier attempts, those that still fit are not sampled again; keep(rows) is called as samples
    finish and must have them on disk when it returns.
    Raises ValueError for an unknown task or a file that is missing or does not parse.
    """
    from lm_eval.evaluator import evaluate as run_tasks

    from evals.lm import SamplingLM

    loaded = _load(tasks, {"problems": problems, "benchmarks": benchmarks, "instruction": instruction})
    settings = {"do_sample": temperature > 0, "temperature": temperature, "top_p": top_p, "max_gen_toks": max_tokens}
    for task in loaded["tasks"].values():
        task.set_config("repeats", samples)
        task.set_config("generation_kwargs", settings, update=True)
    finished = {row["id"]: row for row in done}
    lm = SamplingLM(backend, model_name=model_name, revision=revision, seed=seed, done=finished, keep=keep)
    results = run_tasks(lm=lm, task_dict=loaded, log_samples=False, bootstrap_iters=0, apply_chat_template=True)
    assert results is not None
    metrics = {
        task: {name.removesuffix(",all"): value for name, value in values.items() if name in _METRICS}
        for task, values in results["results"].items()
    }
    return Evaluation(lm.rows, metrics)


def count_problems(
    tasks: list[str], problems: str | Path | None = None, benchmarks: str | Path | None = None
) -> dict[str, int]:
    """Task -> number of its problems. Raises ValueError as `evaluate` does, before any model is loaded."""
    loaded = _load(tasks, {"problems": problems, "benchmarks": benchmarks})
    return {name: len(task.eval_docs) for name, task in loaded["tasks"].items()}


def _load(tasks: list[str], metadata: dict[str, Any]) -> Any:
    """lm-eval's loaded tasks; `metadata` reaches tasks/sampled.py."""
    from lm_eval.tasks import TaskManager

    given = {key: str(value) for key, value in metadata.items() if value is not None}
    manager = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False, metadata=given)
    for task in tasks:
        if task not in manager.all_subtasks:
            raise ValueError(f"no task {task!r}; there are {', '.join(manager.all_subtasks)}")
    return manager.load(tasks)


_METRICS = ("mean@k,all", "truncated,all", "no_answer,all")


@contextmanager
def quiet() -> Iterator[None]:
    """Within it lm-eval shows no bar over prompts and no notes: for callers that show their own progress."""
    import lm_eval.api.task as task_module

    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, task_module.tqdm
    logger.setLevel(logging.ERROR)
    task_module.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        logger.setLevel(level)
        task_module.tqdm = bar
