"""Reading a checkpoint: the model is built on the meta device, every fault is found from the headers, and then each
tensor is copied once, from the mapped file straight into its place, whatever the dtype and the device.

Never two copies of the model are held: beside it there is the part of a file that is mapped at the moment, a strip of
a matrix while FP8 is dequantised, and the scales (a 16,384th of the values).
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from teacher.checkpoint import (
    SCALE,
    Stored,
    checkpoint_files,
    disk_tensors,
    fp8_scales,
    mtp_copies,
    stored_tensors,
)
from teacher.config import DeepseekV3Config
from teacher.fp8 import WEIGHT_BLOCK, dequantize, quantize, scale_shape
from teacher.model import DeepseekV3
from teacher.quantized_experts import quantize_experts
from teacher.quantized_linear import quantize_linears

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SCALE_DTYPES = ("F32", "BF16", "F8_E8M0")
# A file is mapped anew after so many bytes, so that pages already copied leave the process.
_WINDOW = 64 * 1024**2


def load_checkpoint(
    source: str | Path | DeepseekV3Config,
    dtype: torch.dtype | str | None,
    device: torch.device | str,
    experts: Literal["fp8"] | None = None,
    weights: Literal["fp8"] | None = None,
) -> DeepseekV3:
    """See `teacher.load_model`."""
    wanted = _torch_dtype(dtype)
    for name, given in (("experts", experts), ("weights", weights)):
        if given not in ("fp8", None):
            raise ValueError(f"{name} is {given!r}; expected 'fp8' or None")
    if isinstance(source, DeepseekV3Config):
        model = _fresh(source, wanted or torch.float32, torch.device(device))
        _quantize(model, experts, weights)
        return model
    source = Path(source)
    if source.suffix == ".json":
        return load_checkpoint(DeepseekV3Config.from_json(source), wanted, device, experts, weights)
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder; expected a model folder with config.json and safetensors")
    config = DeepseekV3Config.from_json(source)
    block = _fp8_block(source / "config.json", config.quantization_config)
    stored = stored_tensors(checkpoint_files(source))
    first_mtp = f"model.layers.{config.num_hidden_layers}."
    if config.num_nextn_predict_layers and not any(name.startswith(first_mtp) for name in stored):
        # transformers writes the field but not the tensors.
        message = f"{source}: no MTP weights although num_nextn_predict_layers is set; loading without"
        warnings.warn(message, stacklevel=3)
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
    model = DeepseekV3.on_meta(dataclasses.replace(config, quantization_config=None))
    if (experts or weights) and block not in (None, WEIGHT_BLOCK):
        raise ValueError(f"{source}: its FP8 blocks are {list(block or ())}; what is kept in FP8 wants [128, 128]")
    _quantize(model, experts, weights)
    expected = {name: list(tensor.shape) for name, tensor in disk_tensors(model)}
    copies = mtp_copies(config)
    _check(source, config, expected | {copy: expected[name] for copy, name in copies.items()}, stored, set(copies))
    _check_fp8(source, stored, block)
    if wanted is None:
        wanted = _DTYPES.get(stored["model.embed_tokens.weight"].dtype, torch.bfloat16)
    model = _cast(model, wanted).to_empty(device=device)
    model.fill_rotation_table()
    if torch.device(device).type != "meta":
        _fill(model, stored, block)
    return model


def _fresh(config: DeepseekV3Config, dtype: torch.dtype, device: torch.device) -> DeepseekV3:
    """Fresh weights, drawn on the CPU so that a seed gives the same ones for every device; none on meta."""
    config = dataclasses.replace(config, quantization_config=None)
    model = DeepseekV3.on_meta(config) if device.type == "meta" else DeepseekV3(config)
    return _cast(model, dtype).to(device)


def _quantize(model: DeepseekV3, experts: str | None, weights: str | None) -> None:
    if experts or weights:
        quantize_experts(model, shared=weights is not None)
    if weights:
        quantize_linears(model)


def _torch_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None:
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in _DTYPES.values():
        known = ", ".join(repr(str(each).removeprefix("torch.")) for each in _DTYPES.values())
        raise ValueError(f"dtype is {dtype!r}; expected one of {known}")
    return found


def _cast(model: DeepseekV3, dtype: torch.dtype) -> DeepseekV3:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _fp8_block(path: Path, settings: dict[str, Any] | None) -> tuple[int, int] | None:
    """The block size that config.json's quantization_config states; None without one. Keys as DeepSeek's and
    transformers' (which adds modules_to_not_convert: what is FP8 is seen from the tensors)."""
    if settings is None:
        return None
    for name, allowed in (
        ("quant_method", ("fp8",)),
        ("fmt", ("e4m3", None)),
        ("activation_scheme", ("dynamic", None)),
        ("scale_fmt", ("float", "ue8m0", None)),
    ):
        if settings.get(name) not in allowed:
            expected = f"{allowed[0]!r}" if len(allowed) < 3 else " or ".join(repr(each) for each in allowed[:-1])
            raise ValueError(f"{path}: quantization_config.{name} is {settings.get(name)!r}; expected {expected}")
    block = settings.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise ValueError(f"{path}: quantization_config.weight_block_size is {block!r}; expected [128, 128]")
    return block[0], block[1]


def _check(
    folder: Path,
    config: DeepseekV3Config,
    expected: dict[str, list[int]],
    stored: dict[str, Stored],
    optional: set[str],
) -> None:
    """Names, shapes and dtypes of what the model takes; `optional` may be missing."""
    missing = sorted(set(expected) - set(stored) - optional)
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensor(s) missing, the first is {missing[0]}")
    extra = sorted(name for name in stored if name not in expected and not name.endswith(SCALE))
    if extra:
        layer = re.match(r"model\.layers\.(\d+)\.", extra[0])
        have = config.num_hidden_layers + config.num_nextn_predict_layers
        why = f"; config.json states {config.num_hidden_layers} layers and {have - config.num_hidden_layers} for MTP"
        where = f"{stored[extra[0]].path}: {len(extra)} tensor(s) not of this model, the first is {extra[0]}"
        raise ValueError(where + (why if layer and int(layer[1]) >= have else ""))
    for name, shape in expected.items():
        if name not in stored:
            continue
        path, found, dtype = stored[name]
        if found != shape:
            raise ValueError(f"{path}: tensor {name} has shape {found}; config.json asks for {shape}")
        if dtype not in _DTYPES and (dtype != "F8_E4M3" or len(shape) != 2):
            raise ValueError(f"{path}: tensor {name} is {dtype}; expected floating point, or F8_E4M3 for a matrix")


def _check_fp8(folder: Path, stored: dict[str, Stored], block: tuple[int, int] | None) -> None:
    """That FP8 matrices, their scales and config.json agree."""
    matrices = {name: where for name, where in stored.items() if where.dtype == "F8_E4M3"}
    scales = [name for name in stored if name.endswith(SCALE)]
    if block is None and (matrices or scales):
        name = next(iter(matrices or scales))
        raise ValueError(f"{stored[name].path}: {name} is of FP8, but config.json has no quantization_config")
    if block is not None and not matrices:
        raise ValueError(f"{folder}/config.json: quantization_config is set, but no stored matrix is in FP8 (F8_E4M3)")
    for name in scales:
        if name.removesuffix(SCALE) not in matrices:
            raise ValueError(f"{stored[name].path}: {name} belongs to no FP8 matrix of this checkpoint")
    for name, (path, shape, _) in matrices.items():
        if name + SCALE not in stored:
            raise ValueError(f"{path}: {name} is in FP8, but {name + SCALE} is missing")
        assert block is not None
        path, found, dtype = stored[name + SCALE]
        if found != scale_shape(shape, block):
            asked = f"{shape} in blocks of {list(block)} asks for {scale_shape(shape, block)}"
            raise ValueError(f"{path}: {name + SCALE} has shape {found}; a matrix of {asked}")
        if dtype not in _SCALE_DTYPES:
            raise ValueError(f"{path}: {name + SCALE} is {dtype}; expected one of {', '.join(_SCALE_DTYPES)}")


@torch.no_grad()
def _fill(model: DeepseekV3, stored: dict[str, Stored], block: tuple[int, int] | None) -> None:
    places, copies = dict(disk_tensors(model)), mtp_copies(model.config)
    scales: dict[str, Tensor] = {}
    # A matrix and its scale may lie in different shards, so scales come first.
    for name, tensor in _read(stored, [name for name in stored if name.endswith(SCALE)]):
        scales[name.removesuffix(SCALE)] = scale = tensor.float()
        if not (scale.isfinite() & (scale >= 0)).all():
            raise ValueError(f"{stored[name].path}: {name} holds a scale that is negative or not finite")

    kept = dict(fp8_scales(model))  # of matrices that stay in FP8

    def put(name: str, tensor: Tensor, place: Tensor) -> None:
        if name in kept:
            values, scale = (tensor, scales[name]) if name in scales else quantize(tensor.to(place.device))
            place.copy_(values)
            kept[name].copy_(scale)
            return
        if name not in scales:
            place.copy_(tensor)
            return
        assert block is not None
        # To the device in one byte a value, and dequantised there.
        dequantize(tensor.to(place.device), scales[name].to(place.device), block=block, out_RC=place)

    for name, tensor in _read(stored, [name for name in stored if name in places]):
        put(name, tensor, places[name])
    for name, tensor in _read(stored, [name for name in stored if name in copies]):
        place = places[copies[name]]
        if name in scales:
            found = torch.empty_like(place)
            put(name, tensor, found)
        else:
            found = tensor
        for part, shared in zip(found.split(4096), place.split(4096), strict=True):
            if not torch.equal(part.to(shared), shared):
                raise ValueError(f"{stored[name].path}: {name} differs from {copies[name]}; MTP modules must share it")


def _read(stored: dict[str, Stored], names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Each of `names`, memory-mapped; a tensor is to be used before the next is asked for."""
    position = 0
    while position < len(names):
        path, mapped = stored[names[position]].path, 0
        with safe_open(path, "pt") as file:
            while position < len(names) and stored[names[position]].path == path and mapped < _WINDOW:
                tensor = file.get_tensor(names[position])
                mapped += tensor.nbytes
                yield names[position], tensor
                position += 1
