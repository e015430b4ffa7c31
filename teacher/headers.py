"""What a checkpoint's files hold, from their safetensors headers alone: no tensor is read, nothing is loaded. No torch.

Format: 8 bytes of header length (little endian), that much JSON, then the data (github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
# The format's own limit.
_LONGEST_HEADER = 100_000_000
# Tensors that are no parameters: FP8's scales, and a table that old exports store.
_NOT_PARAMETERS = ("weight_scale_inv", "rotary_emb.inv_freq")


@dataclass
class Stored:
    """Totals over the files of a folder, by the dtype that the headers name."""

    files: int = 0
    missing: list[str] = field(default_factory=list)  # files of the index that are not there
    tensors: dict[str, int] = field(default_factory=dict)
    values: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    parameters: int = 0  # all values but FP8's scales


def read_headers(folder: Path) -> Stored | None:
    """Totals of the folder's safetensors files; None if it has none.

    Raises ValueError naming a file that is not whole or an index that is none.
    """
    names = _index_names(folder / INDEX) if (folder / INDEX).is_file() else ["model.safetensors"]
    there = [name for name in names if (folder / name).is_file()]
    if not there:
        return None
    stored = Stored(len(there), [name for name in names if name not in there])
    seen: dict[str, str] = {}
    for name in there:
        for tensor, entry in _header(folder / name).items():
            if tensor in seen:
                raise ValueError(f"{folder / name}: tensor {tensor!r} is also in {seen[tensor]}")
            seen[tensor] = name
            dtype, size = entry["dtype"], prod(entry["shape"])
            start, end = entry["data_offsets"]
            stored.tensors[dtype] = stored.tensors.get(dtype, 0) + 1
            stored.values[dtype] = stored.values.get(dtype, 0) + size
            stored.bytes[dtype] = stored.bytes.get(dtype, 0) + end - start
            if not tensor.endswith(_NOT_PARAMETERS):
                stored.parameters += size
    return stored


def _index_names(path: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a safetensors index ({error!r})") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{path}: names {name!r}, which is not a file of that folder")
    return names


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """The header's entries, checked. Raises ValueError naming the file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"{path}: not a whole safetensors file ({size:,} bytes, header of {length:,})")
        text = file.read(length)
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a whole safetensors file (its header is no JSON: {error})") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: its header is a {type(entries).__name__}; expected an object")
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        if not _is_entry(entry):
            raise ValueError(f"{path}: its header's entry for {name!r} has no valid dtype, shape and data_offsets")
    held, promised = size - 8 - length, max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if held != promised:
        raise ValueError(f"{path}: not a whole safetensors file ({held:,} bytes of data; its header says {promised:,})")
    return entries


def _is_entry(entry: object) -> bool:
    """Whether dtype, shape and extent are there and agree; the bits of a value stand in its dtype's name."""
    if not isinstance(entry, dict) or not isinstance(dtype := entry.get("dtype"), str):
        return False
    shape: Any = entry.get("shape")
    extent: Any = entry.get("data_offsets")
    for numbers in (shape, extent):
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            return False
    bits = 8 if dtype == "BOOL" else int("".join(re.findall(r"^[A-Z]+(\d{1,3})(?:_\w+)?$", dtype)) or 0)
    return bits > 0 and len(extent) == 2 and 8 * (extent[1] - extent[0]) == bits * prod(shape)
