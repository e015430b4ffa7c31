"""Training jobs: on a CPU small models train at the same time, a process each with its share of the cores.

That is faster than one after the other on all cores, which small matrices do not keep busy. Whatever goes wrong in one
process ends all, as one error of the parent's; a killed parent takes its children along (students.child), so that a
new run never meets an old one's orphans. On a GPU, and for large models, jobs run here in turn.
"""

import multiprocessing
import os
import queue
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import UserError
from distill.jsonl import read_jsonl

if TYPE_CHECKING:
    from students.sft import SftResult, SftSettings

# Of all bases' weights: what is larger keeps the cores busy by itself, and may not fit in memory several times.
SMALL_ENOUGH_TO_SHARE = 256 * 2**20

Show = Callable[[str, dict[str, Any]], None]  # (job's name, a line of its training log)


@dataclass(frozen=True)
class Job:
    """One model to train; `tokens` is what it will see, planned beforehand."""

    name: str
    settings: "SftSettings"
    train: Path
    validation: Path | None
    out: Path
    notes: str
    tokens: int


def workers_for(jobs: Sequence[Job]) -> int:
    """Processes to train in; 1 means this one, with all the cores or the GPU."""
    import torch

    if torch.cuda.is_available() or len(jobs) < 2:
        return 1
    bases = {Path(job.settings.base) for job in jobs}
    sizes = [sum(path.stat().st_size for path in base.glob("*.safetensors")) for base in bases]
    # Nothing found: a hub name, of unknown size.
    if not all(sizes) or sum(sizes) > SMALL_ENOUGH_TO_SHARE:
        return 1
    return min(len(jobs), cores())


def cores() -> int:
    """Cores this process may use: containers often show more than they give."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(jobs: Sequence[Job], workers: int, show: Show) -> "dict[str, SftResult]":
    """Train all; `show` gets the log lines as they come. Returns each job's result by name.

    Raises what a job raised: UserError, OSError, RuntimeError with the job's traceback for a bug; and
    ChildProcessError (an OSError) if a process was killed.
    """
    if workers == 1:
        _quiet()
        return {job.name: _in_this_process(job, show) for job in jobs}
    context = multiprocessing.get_context("spawn")
    todo: Any = context.Queue()
    events: Any = context.Queue()
    for job in [*jobs, *[None] * workers]:
        todo.put(job)
    threads = max(1, cores() // workers)
    children = [context.Process(target=_work, args=(todo, events, threads), daemon=True) for _ in range(workers)]
    for child in children:
        child.start()
    results: dict[str, SftResult] = {}
    try:
        while len(results) < len(jobs):
            kind, name, payload = _next_event(events, children)
            if kind == "record":
                show(name, payload)
            elif kind == "result":
                results[name] = payload
            else:
                raise _as_error(name, *payload)
    finally:
        # Those that are done have gone or are about to; others stop where their last checkpoint lets them go on.
        todo.cancel_join_thread()
        for child in children:
            child.kill()
        for child in children:
            child.join()
    return results


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(path)]


def _train(job: Job, show: Show) -> "SftResult":
    from students.sft import sft

    held_out = read_rows(job.validation) if job.validation is not None else None
    return sft(
        job.settings, read_rows(job.train), held_out, job.out,
        log=lambda record: show(job.name, record), card_notes=job.notes, source=str(job.train),
    )  # fmt: skip


def _in_this_process(job: Job, show: Show) -> "SftResult":
    try:
        return _train(job, show)
    except ValueError as error:
        raise _as_error(job.name, "user", str(error), None) from error


def _work(todo: Any, events: Any, threads: int) -> None:
    """A child: take jobs until there are none, and stop at the first that fails."""
    import torch

    from students.child import exit_with_parent

    exit_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends us
    torch.set_num_threads(threads)
    _quiet()
    for job in iter(todo.get, None):
        try:
            result = _train(job, lambda name, record: events.put(("record", name, record)))
        except ValueError as error:
            events.put(("failure", job.name, ("user", str(error), None)))
            return
        except OSError as error:
            known = (error.errno, error.strerror or str(error), error.filename)
            events.put(("failure", job.name, ("system", str(error), known)))
            return
        except Exception:
            events.put(("failure", job.name, ("bug", traceback.format_exc(), None)))
            return
        events.put(("result", job.name, result))


def _next_event(events: Any, children: Sequence[Any]) -> tuple[str, str, Any]:
    while True:
        # Before each event: those left may keep the queue busy for as long as they train.
        codes = [child.exitcode for child in children if child.exitcode not in (None, 0)]
        if codes:
            raise ChildProcessError(
                f"a training process ended with exit code {codes[0]} (-9 is a kill, by the system when memory runs "
                "out); the same command goes on from the last checkpoint"
            )
        try:
            return events.get(timeout=1)
        except queue.Empty:
            continue


def _as_error(name: str, kind: str, message: str, known: tuple[int | None, str, str | None] | None) -> Exception:
    if kind == "user":
        return UserError(f"student {name}: {message}")
    if known is not None:
        return OSError(*known)
    return RuntimeError(f"student {name}: {message}")


def _quiet() -> None:
    """Our own progress line is the one to see; transformers and accelerate draw bars and note what we know."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
