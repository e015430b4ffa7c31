"""What a DeepSeek-V3 checkpoint holds: safetensors, one file or sharded, under DeepSeek's tensor names.

Three things differ between disk and memory. On disk each expert has its own gate, up and down matrix; in memory a
layer's experts are stacked. On disk an MTP module carries copies of embedding and head; in memory it uses the main
model's. On disk a matrix may be in block FP8 (`teacher.fp8`) with its scales beside it; in memory it is not,
unless it is asked for so (`load_model(experts="fp8")`, `weights="fp8"`).
Reading: `teacher.checkpoint_read`. Writing: `teacher.checkpoint_write`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from teacher.config import DeepseekV3Config
from teacher.experts import Experts
from teacher.fp8 import WEIGHT_BLOCK
from teacher.model import DeepseekV3
from teacher.quantized_experts import QuantizedExperts
from teacher.quantized_linear import QuantizedLinear

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Kept in fp32 in memory and on disk: it is moved in steps of 1e-3, below bf16's resolution near 1.
FP32 = "e_score_correction_bias"
# A scale's name is its matrix's with this at the end: `weight` and `weight_scale_inv`.
SCALE = "_scale_inv"
# DeepSeek's FP8 checkpoints quantise the projections of attention and feed-forward. Embedding, head, norms, gate,
# biases and the MTP modules' eh_proj stay in high precision (V3 section 3.3.1), and vLLM expects them so.
_FP8_NAME = re.compile(r"\.(self_attn|mlp)\.(.+\.)?\w+_proj(_with_mqa)?\.weight")
QUANTIZATION_CONFIG: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": list(WEIGHT_BLOCK),
}


class Stored(NamedTuple):
    """Where a tensor lies and what it is, from a file's header."""

    path: Path
    shape: list[int]
    dtype: str  # as safetensors calls it: "BF16", "F32", "F8_E4M3", …


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. Raises ValueError if there are none, or one of the index is missing."""
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
            if not names:
                raise ValueError("its weight_map is empty")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / INDEX}: not a safetensors index ({error!r})") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
                raise ValueError(f"{folder / INDEX}: names {name!r}, which is not a file of that folder")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise ValueError(f"{folder}: expected safetensors, found a pickle ({pickles[0]}), which can run code when read")
    raise ValueError(f"{folder}: no {SINGLE} and no {INDEX}")


def stored_tensors(files: list[Path]) -> dict[str, Stored]:
    """Everything that `files` hold, by name, in the order of the files and of the tensors in them.

    Reads headers alone. Raises ValueError naming a file that is not a whole safetensors file, or repeats a tensor.
    """
    found: dict[str, Stored] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.offset_keys():
                    if name in found:
                        raise ValueError(f"{path}: tensor {name} is also in {found[name].path.name}")
                    part = file.get_slice(name)
                    found[name] = Stored(path, part.get_shape(), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    # Old exports store this table; it follows from the config.
    return {name: where for name, where in found.items() if not name.endswith("rotary_emb.inv_freq")}


def disk_tensors(model: DeepseekV3) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint by its name on disk, as a view into the model; MTP copies and scales left out."""
    modules = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        module = modules[owner]
        if leaf.endswith("_scale") and isinstance(module, QuantizedExperts | QuantizedLinear):
            continue
        if not isinstance(module, Experts | QuantizedExperts):
            yield name, tensor
            continue
        for expert in range(tensor.shape[0]):
            of = _expert_name(owner, module, expert)
            if leaf == "down_proj":
                yield f"{of}.down_proj.weight", tensor[expert]
            else:
                gate, up = tensor[expert].chunk(2)
                yield f"{of}.gate_proj.weight", gate
                yield f"{of}.up_proj.weight", up


def fp8_scales(model: DeepseekV3) -> Iterator[tuple[str, Tensor]]:
    """The scales of what is held in FP8, by the matrices' names on disk, as views into the model."""
    for owner, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield f"{owner}.weight", module.weight_scale
        if isinstance(module, QuantizedExperts):
            for expert in range(len(module.down_proj)):
                of = _expert_name(owner, module, expert)
                gate, up = module.gate_up_scale[expert].chunk(2)
                yield f"{of}.gate_proj.weight", gate
                yield f"{of}.up_proj.weight", up
                yield f"{of}.down_proj.weight", module.down_scale[expert]


def _expert_name(owner: str, module: Experts | QuantizedExperts, expert: int) -> str:
    """What an expert of a stack is called on disk; a shared one of one piece may stand at the end."""
    if isinstance(module, QuantizedExperts) and module.shared and expert == len(module.down_proj) - 1:
        assert module.shared == 1
        return owner.removesuffix("experts") + "shared_experts"
    return f"{owner}.{expert}"


def mtp_copies(config: DeepseekV3Config) -> dict[str, str]:
    """Names on disk of the copies that MTP modules carry, with the tensor that each repeats."""
    copies = {}
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"model.layers.{layer}.shared_head.head.weight"] = "lm_head.weight"
    return copies


def is_fp8_matrix(name: str) -> bool:
    """Whether DeepSeek's FP8 checkpoints hold the tensor of this name in FP8."""
    return _FP8_NAME.search(name) is not None
