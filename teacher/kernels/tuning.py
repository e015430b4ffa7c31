"""Which tile a grouped product takes: measured ones from a file for each GPU, a rule for every other shape.

`tests.bench.kernels_tune` measures and writes the files. One is shipped for R1's shapes (configs/); one in the user's
cache, or at DISTILL_KERNEL_CONFIGS, goes before it. Files hold, for each kind of product and its N and K, the tile for
so many rows an expert and fewer (`up_to`), smallest first.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

KINDS = ("gemm", "swiglu")


@dataclass(frozen=True)
class Tile:
    """How a grouped product is cut up; see `teacher.kernels.grouped_gemm`."""

    rows: int
    columns: int  # of one half
    halves: int
    swap: bool = False
    group: int = 8  # row tiles that take turns over all columns
    resident: int = 1  # programs on a multiprocessor
    warps: int = 8
    stages: int = 3
    specialize: bool = False  # the kernel of grouped_gemm_hopper: 128 x (2 * 128), 4 warps a group


def tile_for(kind: str, n: int, k: int, rows: int, experts: int, device: torch.device) -> Tile:
    """The tile for `rows` rows over `experts` experts; the host knows no more than their average."""
    average = rows / max(1, experts)
    if device.type == "cuda":
        for table in (_table(cache_file(_name(device))), _table(_shipped(_name(device)))):
            entries = table.get(f"{kind} {n} {k}", [])
            for up_to, tile in entries:
                if average <= up_to:
                    return tile
    return default(kind, average)


def default(kind: str, average: float) -> Tile:
    """Without a measurement: tokens on the free dimension while they are few, large tiles where arithmetic binds."""
    if average <= 16:
        return Tile(16, 128, 2 if kind == "swiglu" else 1, swap=True, group=64, resident=2, warps=4, stages=4)
    if average <= 64:
        return Tile(64, 128, 2 if kind == "swiglu" else 1, group=64, resident=1, warps=4, stages=4)
    return Tile(128, 128, 2)


def cache_file(gpu: str) -> Path:
    folder = os.environ.get("DISTILL_KERNEL_CONFIGS") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "distill", "kernels"
    )
    return Path(folder, gpu + ".json")


def save(path: Path, found: dict[str, list[tuple[float, Tile]]], about: dict[str, str]) -> None:
    """Write what was measured; `found` is by "kind N K"."""
    entries: dict[str, list[dict[str, object]]] = {}
    for key, tiles in found.items():
        rising = sorted(tiles, key=lambda each: each[0])
        # Of neighbours with the same tile the last says it for all.
        last = [each for each, after in zip(rising, [*rising[1:], (0.0, None)], strict=True) if each[1] != after[1]]
        entries[key] = [{"up_to": up_to, **tile.__dict__} for up_to, tile in last]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"about": about, "tiles": entries}, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device).replace(" ", "_").replace("/", "_")


def _shipped(gpu: str) -> Path:
    return Path(__file__).parent / "configs" / (gpu + ".json")


@functools.cache
def _table(path: Path) -> dict[str, list[tuple[float, Tile]]]:
    if not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["tiles"]
        return {
            key: [(float(entry.pop("up_to")), Tile(**entry)) for entry in entries] for key, entries in stored.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a file of tiles as tests.bench.kernels_tune writes them ({error!r})") from None
