"""Checkpoints that survive a kill at any moment: written aside, synced, then renamed into place.

    work_dir/checkpoint-150/     model, optimizer and random state as accelerate saves them; ema.safetensors;
                                 trainer.json: fingerprint, scheduler, and how far the run has come
    work_dir/training_log.jsonl  one line a logged step; on resuming, lines after the checkpoint are cut

Only the newest checkpoint is kept. Nothing in them is ever unpickled except by torch's weights-only loader.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from accelerate import Accelerator

    from students.ema import Ema


class Counted(Protocol):
    """What Progress.advance reads of a step."""

    @property
    def tokens(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def position(self) -> Any: ...


@dataclass
class Progress:
    """How far training has come. `slots` are positions computed, padding included; `loss` is the last step's."""

    step: int = 0
    tokens: int = 0
    slots: int = 0
    seconds: float = 0.0
    loss: float = float("nan")
    evaluation: dict[str, Any] = field(default_factory=dict)
    position: Any = None

    def advance(self, step: Counted, loss: float) -> None:
        self.step += 1
        self.tokens += step.tokens
        self.slots += step.slots
        self.position = step.position
        self.loss = loss

    @property
    def padding_fraction(self) -> float:
        return 1 - self.tokens / self.slots if self.slots else 0.0


def save_checkpoint(
    accelerator: "Accelerator", work_dir: Path, fingerprint: str, progress: Progress, scheduler: Any, ema: "Ema | None"
) -> None:
    """Write checkpoint-<step> whole and remove the one before. Every process must call it.

    Raises OSError if the device is full, whatever the libraries say of it.
    """
    final = work_dir / f"checkpoint-{progress.step}"
    aside = work_dir / f".{final.name}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(aside))
        if ema is not None and accelerator.is_main_process:
            from safetensors.torch import save_file

            save_file(ema.state_dict(), aside / "ema.safetensors")
    except Exception as error:
        _raise_if_full(aside, error)
        raise
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    state = {"fingerprint": fingerprint, "progress": asdict(progress), "scheduler": scheduler.state_dict()}
    (aside / "trainer.json").write_text(json.dumps(state))
    sync_tree(aside)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(aside, final)
    sync_folder(work_dir)
    _remove_others(work_dir, final)


def latest_checkpoint(
    accelerator: "Accelerator", work_dir: Path, fingerprint: str, scheduler: Any, ema: "Ema | None"
) -> Progress | None:
    """Load the newest checkpoint of the same fingerprint into what accelerate prepared; None if there is none."""
    folder = next((path for path, state in _checkpoints(work_dir) if state["fingerprint"] == fingerprint), None)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        work_dir.mkdir(parents=True, exist_ok=True)
        _remove_others(work_dir, folder)
    if folder is None:
        return None
    state = json.loads((folder / "trainer.json").read_text())
    accelerator.load_state(str(folder))
    scheduler.load_state_dict(state["scheduler"])
    if ema is not None:
        from safetensors.torch import load_file

        ema.load_state_dict(load_file(folder / "ema.safetensors"))
    return Progress(**state["progress"])


def _raise_if_full(folder: Path, error: Exception) -> None:
    """Torch's writer calls a full device an "unexpected pos": ask the system itself, and leave it its space."""
    try:
        with open(folder / "probe", "wb") as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as reason:
        raise OSError(reason.errno, reason.strerror, str(folder)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def saved_tokens(work_dir: Path) -> int:
    """Tokens seen up to the newest checkpoint in `work_dir`, whatever it was made from; 0 if there is none."""
    return next((int(state["progress"]["tokens"]) for _, state in _checkpoints(work_dir)), 0)


def _checkpoints(work_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Complete checkpoints, newest first. One without trainer.json was being removed when a kill came."""
    folders = sorted(work_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    whole = [path for path in folders if (path / "trainer.json").is_file()]
    return [(path, json.loads((path / "trainer.json").read_text())) for path in whole]


def _remove_others(work_dir: Path, keep: Path | None) -> None:
    for path in [*work_dir.glob("checkpoint-*"), *work_dir.glob(".checkpoint-*.tmp")]:
        if path != keep:
            (path / "trainer.json").unlink(missing_ok=True)  # first: what is left of it by a kill is no checkpoint
            shutil.rmtree(path)


class TrainingLog:
    """training_log.jsonl of the main process; on opening, lines after step `keep` (and a torn one) are cut."""

    def __init__(self, path: Path, keep: int, is_main: bool) -> None:
        self._file = None
        if not is_main:
            return
        lines = [line for line in _whole_lines(path) if json.loads(line)["step"] <= keep]
        aside = path.with_name(f".{path.name}.tmp")
        aside.write_text("".join(lines))
        os.replace(aside, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close(), with the loop)

    def append(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """On the disk before the checkpoint that counts on it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def sync_tree(folder: Path) -> None:
    """Every file below `folder`, and the folders, on the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync_folder(path)


def sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
