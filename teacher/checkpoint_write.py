"""Writing a checkpoint that transformers, vLLM and SGLang read: config.json and safetensors, in shards if large.

Every file is whole on the disk before any takes its name, and a folder that is being rewritten has no index until its
new shards are in place: killed at any moment, it never passes for a checkpoint made of two.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from teacher.checkpoint import (
    FP32,
    INDEX,
    QUANTIZATION_CONFIG,
    SCALE,
    SINGLE,
    disk_tensors,
    fp8_scales,
    is_fp8_matrix,
    mtp_copies,
)
from teacher.fp8 import quantize, scale_shape
from teacher.model import DeepseekV3

SHARD_BYTES = 4 * 1024**3


def save_checkpoint(
    model: DeepseekV3,
    folder: str | Path,
    dtype: torch.dtype | str | None = None,
    shard_bytes: int = SHARD_BYTES,
    fp8: bool = False,
) -> None:
    """See `DeepseekV3.save_pretrained`. A shard holds at most `shard_bytes` of tensors, or one tensor."""
    if next(fp8_scales(model), None) is not None:
        raise ValueError(
            "a model that was loaded with weights or experts in FP8 is for inference; save one loaded without"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or model.lm_head.weight.dtype
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point or wanted.itemsize < 2:
        raise ValueError(f"dtype is {dtype!r}; expected a floating-point dtype of at least 16 bits such as 'bfloat16'")
    tensors = dict(disk_tensors(model))
    tensors |= {copy: tensors[original] for copy, original in mtp_copies(model.config).items()}
    shards = _plan(tensors, wanted, shard_bytes, fp8)
    for leftover in folder.glob("*.safetensors.tmp"):
        leftover.unlink()
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        block = {key: part for name in names for key, part in _on_disk(name, tensors[name], wanted, fp8)}
        weight_map |= dict.fromkeys(block, file)
        total += sum(part.nbytes for part in block.values())
        _write(block, folder / (file + ".tmp"))
    (folder / INDEX).unlink(missing_ok=True)
    _sync(folder)
    for file in sorted(set(weight_map.values())):
        os.replace(folder / (file + ".tmp"), folder / file)
    stated = QUANTIZATION_CONFIG if fp8 else None
    config = dataclasses.replace(model.config, dtype=str(wanted).removeprefix("torch."), quantization_config=stated)
    config.to_json(folder / "config.json")
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / (INDEX + ".tmp")).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        _sync(folder / (INDEX + ".tmp"))
        _sync(folder)
        os.replace(folder / (INDEX + ".tmp"), folder / INDEX)
    for old in folder.glob("model*.safetensors"):
        if old.name not in weight_map.values():
            old.unlink()
    _sync(folder)


def _plan(tensors: dict[str, Tensor], dtype: torch.dtype, shard_bytes: int, fp8: bool) -> list[list[str]]:
    """The names of each shard's tensors; a matrix and its scale go together."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if fp8 and is_fp8_matrix(name):
            rows, columns = scale_shape(tensor.shape)
            bytes_here = tensor.numel() + rows * columns * 4
        else:
            bytes_here = tensor.numel() * (4 if name.endswith(FP32) else dtype.itemsize)
        if shards[-1] and size + bytes_here > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_here
    return shards


def _on_disk(name: str, tensor: Tensor, dtype: torch.dtype, fp8: bool) -> Iterator[tuple[str, Tensor]]:
    """The tensor, or the FP8 matrix and its scale, on the CPU and in storage of their own (safetensors wants that)."""
    tensor = tensor.detach()
    if not (fp8 and is_fp8_matrix(name)):
        stored = torch.float32 if name.endswith(FP32) else dtype
        yield name, tensor.to("cpu", stored, copy=True).contiguous()
        return
    values, scale = quantize(tensor)
    if not scale.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite, which FP8 cannot store")
    yield name, values.cpu().contiguous()
    yield name + SCALE, scale.cpu()


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # how the library reports a full device
        raise OSError(f"{path}: {error}") from None
    _sync(path)


def _sync(path: Path) -> None:
    """Make a file's content, or a folder's names, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
