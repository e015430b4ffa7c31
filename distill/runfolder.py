"""A run's folder: one process at a time, its recipe, its manifest, and which stages are done.

A stage is a function `run(recipe, run) -> dict | None`. The pipeline calls it between begin() and finish() and hands
its dict ({"tokens": int, ...facts}) to the manifest; a stage itself calls neither. It is called only when not done,
maybe after an earlier attempt was killed: what it finds in its files it keeps if it still fits, and does the rest.
"""

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from distill.errors import UserError
from distill.files import write_atomic
from distill.manifest import Manifest, environment, peak_rss_bytes, utc_now
from distill.progress import Progress
from distill.recipe import Recipe
from distill.recipe_load import dump_recipe, recipe_hash

Shard = tuple[int, int]  # the n-th of so many, from 1


class RunFolder:
    """Made by RunFolder.open(); a context manager that gives the lock back on leaving."""

    def __init__(self, folder: Path, recipe: Recipe, lock: int, shard: Shard | None = None) -> None:
        self.folder, self.recipe, self._lock = folder, recipe, lock
        self.manifest = Manifest(folder / "manifest.json")
        self.shard = _same_shard(folder, self.manifest, shard)
        self._running: tuple[str, float, float] | None = None  # stage, monotonic start, seconds of earlier attempts
        self._environment: dict[str, Any] | None = None

    @classmethod
    def open(cls, path: Path | str, recipe: Recipe, shard: Shard | None = None) -> "RunFolder":
        """Create the folder if need be and lock it.

        `shard`: the folder is for this part of the plan, which it then stays. Raises UserError if another process
        holds it, `path` is not a folder, or the folder is for another part.
        """
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{folder}: is a file, expected a run folder") from None
        lock = _lock(folder)
        try:
            return cls(folder, recipe, lock, shard)
        except BaseException:
            os.close(lock)
            raise

    def path(self, *parts: str) -> Path:
        """A path inside the run folder; nothing is created."""
        return self.folder.joinpath(*parts)

    def progress(self, stage: str, total: int | None, unit: str, *, done: int = 0) -> Progress:
        """A Progress whose ticks also keep the running stage's seconds, so that a kill loses two of them at most."""
        return Progress(stage, total, unit, done=done, beat=self.beat)

    def stage_done(self, stage: str, inputs: str) -> bool:
        """Whether the stage finished on exactly these inputs (a hash)."""
        entry = self.manifest.data["stages"].get(stage, {})
        return entry.get("status") == "done" and entry.get("inputs") == inputs

    def begin(self, stage: str, inputs: str) -> None:
        """Mark the stage as running, and write down the recipe and the environment that it runs with.

        Seconds go on from an unfinished attempt on the same inputs, else from zero.
        """
        self.write_recipe()
        if self._environment is None:
            self._environment = environment()
        entry = self.manifest.stage(stage)
        same = entry.get("inputs") == inputs and entry.get("status") in ("running", "stopped")
        earlier = float(entry.get("seconds", 0.0)) if same else 0.0
        attempts = int(entry.get("attempts", 0)) + 1 if same else 1
        self.manifest.data["stages"][stage] = {
            "status": "running", "inputs": inputs, "seconds": earlier, "attempts": attempts,
            "commit": self._environment["commit"], "started": utc_now(),
        }  # fmt: skip
        self._running = (stage, time.monotonic(), earlier)
        identity = {"name": self.recipe.name, "recipe": recipe_hash(self.recipe), "seed": self.recipe.seed}
        self.manifest.update(**identity, environment=self._environment)

    def write_recipe(self) -> None:
        write_atomic(self.folder / "recipe.yaml", dump_recipe(self.recipe).encode())

    def beat(self) -> None:
        """Write down the seconds so far."""
        if self._running is not None:
            stage, start, earlier = self._running
            self.manifest.stage(stage)["seconds"] = round(earlier + time.monotonic() - start, 3)
            self.manifest.save()

    def finish(self, stage: str, tokens: int = 0, **facts: Any) -> None:
        """Mark the stage as done, with its tokens and whatever else is worth keeping.

        With a fact "stopped", a sentence that says why, it is marked as stopped: the next start goes on.
        """
        assert self._running is not None and self._running[0] == stage, f"finish({stage!r}) without begin"
        _, start, earlier = self._running
        self.manifest.stage(stage).update(
            facts, status="stopped" if "stopped" in facts else "done", tokens=tokens,
            seconds=round(earlier + time.monotonic() - start, 3),
            peak_rss_bytes=peak_rss_bytes(),
        )  # fmt: skip
        self._running = None
        self.manifest.save()

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _same_shard(folder: Path, manifest: Manifest, shard: Shard | None) -> Shard | None:
    """The part of the plan that the folder is for: the one it was first opened with."""
    if not manifest.data["stages"] and shard is not None:
        manifest.update(shard=list(shard))
    known = manifest.data.get("shard")
    if shard is not None and known != list(shard):
        there = f"for shard {known[0]}/{known[1]}" if known else "for the whole plan"
        raise UserError(f"{folder}: is {there}, not for shard {shard[0]}/{shard[1]}; each shard has its own folder")
    return None if known is None else (known[0], known[1])


def _lock(folder: Path) -> int:
    """An exclusive flock on folder/.lock: the kernel drops it when the process dies, however it dies."""
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.pread(handle, 32, 0).decode(errors="replace").strip()
        os.close(handle)
        raise UserError(f"another process (pid {pid or 'unknown'}) is using {folder}") from None
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
    except OSError as error:
        os.close(handle)
        raise OSError(error.errno, error.strerror, str(folder / ".lock")) from error
    return handle
