"""Trainings in a child process that kills itself at a chosen moment, as kill -9 would.

Children are forked from a server that has imported everything but has run nothing: forking pytest itself would take
half-dead thread pools along.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from students.sft import SftSettings, sft
from tests.students.rows import rows

Moment = Literal["step", "rename", "published"]


def train(how: SftSettings, out: Path, log: Callable[[dict[str, Any]], None] | None = None) -> Any:
    return sft(how, rows(60), rows(6, first=60), out, log)


def killed(how: SftSettings, out: Path, moment: Moment, number: int = 1) -> None:
    """train(), killed after step `number`, instead of the `number`-th os.replace, or when `out` is just in place."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "accelerate", "peft", "students.loop", __name__])
    child = context.Process(target=_train_and_die, args=(how, out, moment, number))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL, f"ended with {child.exitcode}, not by a kill"


def _train_and_die(how: SftSettings, out: Path, moment: Moment, number: int) -> None:
    import torch

    import students.export

    torch.set_num_threads(1)
    if moment == "rename":
        os.replace = _die_at(number, os.replace)
    if moment == "published":
        students.export.sync_folder = lambda path: _die()
    train(how, out, lambda record: _die() if moment == "step" and record["step"] == number else None)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_at(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            _die()
        return function(*args, **kwargs)

    return counted
