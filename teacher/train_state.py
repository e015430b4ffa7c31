"""Checkpoints of a training run: everything the next step depends on, in safetensors and JSON.

A checkpoint is a folder `step-00001200` that appears by one rename when all its files are on the disk, so a kill at
any moment leaves the previous one or the new one whole. Weights, AdamW's moments and the averaged weights are kept
in their own precision: a resumed run continues bit for bit.
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from teacher.batches import Cursor

STEP_FOLDER = re.compile(r"step-(\d{8})")


@dataclass
class Progress:
    """Where a run stands between two steps."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    cursor: Cursor = field(default_factory=Cursor)


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, or None. Remains of a write that was killed are removed."""
    if not folder.is_dir():
        return None
    found = []
    for entry in folder.iterdir():
        if STEP_FOLDER.fullmatch(entry.name):
            found.append(entry)
        elif entry.name.startswith(".writing-"):
            shutil.rmtree(entry)
    return max(found, default=None, key=lambda p: p.name)


def save(
    folder: Path,
    progress: Progress,
    settings: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, torch.Tensor] | None,
) -> Path:
    """Write the checkpoint of `progress.step` and remove older ones; returns its folder. OSError if that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{progress.step:08d}"
    if final.exists():  # a finished run started again: nothing has changed
        return final
    draft = folder / f".writing-{final.name}"
    draft.mkdir()
    _save_file(weights(model), draft / "weights.safetensors")
    _save_file(_moments(model, optimizer), draft / "optimizer.safetensors")
    if average is not None:
        _save_file(average, draft / "average.safetensors")
    random_state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_state["cuda"] = torch.cuda.get_rng_state()
    _save_file(random_state, draft / "random.safetensors")
    (draft / "state.json").write_text(json.dumps({"progress": asdict(progress), "settings": settings}, indent=1))
    for path in [*draft.iterdir(), draft]:
        _fsync(path)
    os.replace(draft, final)
    _fsync(folder)
    for entry in folder.iterdir():
        if STEP_FOLDER.fullmatch(entry.name) and entry != final:
            shutil.rmtree(entry)
    return final


def read(checkpoint: Path) -> tuple[Progress, dict[str, Any]]:
    """The progress and the settings that a checkpoint was written with."""
    state = json.loads((checkpoint / "state.json").read_text())
    fields = state["progress"]
    at = fields.pop("cursor")
    return Progress(cursor=Cursor(at["next_index"], tuple(at["pending"])), **fields), state["settings"]


def load(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, torch.Tensor] | None,
) -> None:
    """Put a checkpoint's tensors in place. ValueError naming the first tensor that does not fit the model."""
    _copy(load_file(checkpoint / "weights.safetensors"), weights(model), checkpoint / "weights.safetensors")
    moments = load_file(checkpoint / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        found = [key for key in ("step", "exp_avg", "exp_avg_sq", "momentum") if f"{name}.{key}" in moments]
        if found:  # fused AdamW keeps its step count on the parameter's device too
            optimizer.state[parameter] = {key: moments[f"{name}.{key}"].to(parameter.device) for key in found}
    if average is not None:
        _copy(load_file(checkpoint / "average.safetensors"), average, checkpoint / "average.safetensors")
    random_state = load_file(checkpoint / "random.safetensors")
    torch.set_rng_state(random_state["cpu"])
    if torch.cuda.is_available() and "cuda" in random_state:
        torch.cuda.set_rng_state(random_state["cuda"])


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Each parameter and persistent buffer once, by its first name (tied ones have several)."""
    kept: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor.detach()
    return kept


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _copy(stored: dict[str, torch.Tensor], target: dict[str, torch.Tensor], path: Path) -> None:
    for name in sorted(stored.keys() | target.keys()):
        found = tuple(stored[name].shape) if name in stored else "nothing"
        expected = tuple(target[name].shape) if name in target else "nothing"
        if found != expected:
            raise ValueError(f"{path} does not fit the model: {name} is {found}, expected {expected}")
    for name, tensor in target.items():
        tensor.copy_(stored[name])


def _save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # how the library reports a full device
        raise OSError(f"{path}: {error}") from None


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
