"""Reading and writing DeepSeek-V3 checkpoints: safetensors, one file or sharded, under DeepSeek's tensor names.

Two things differ between disk and memory. On disk each expert has its own gate, up and down matrix; in memory a layer's
experts are stacked. On disk an MTP module carries copies of embedding and head; in memory it uses the main model's.
Loading maps the files and copies each tensor once, straight into its place.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from teacher.config import DeepseekV3Config
from teacher.experts import Experts
from teacher.model import DeepseekV3

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 * 1024**3
# Kept in fp32 in memory and on disk: it is moved in steps of 1e-3, below bf16's resolution near 1.
_FP32 = "e_score_correction_bias"


def load_checkpoint(
    source: str | Path | DeepseekV3Config, dtype: torch.dtype | str | None, device: torch.device | str
) -> DeepseekV3:
    """See `teacher.load_model`."""
    wanted = _torch_dtype(dtype)
    if isinstance(source, DeepseekV3Config):
        return _cast(DeepseekV3(source), wanted or torch.float32).to(device)
    source = Path(source)
    if source.suffix == ".json":
        return load_checkpoint(DeepseekV3Config.from_json(source), wanted, device)
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder; expected a model folder with config.json and safetensors")
    config = DeepseekV3Config.from_json(source)
    if config.quantization_config is not None:
        raise ValueError(f"{source}/config.json: quantization_config is set; quantised checkpoints are not read yet")
    files = checkpoint_files(source)
    found = _stored_shapes(files)
    first_mtp = f"model.layers.{config.num_hidden_layers}."
    if config.num_nextn_predict_layers and not any(name.startswith(first_mtp) for name in found):
        # transformers writes the field but not the tensors.
        message = f"{source}: no MTP weights although num_nextn_predict_layers is set; loading without"
        warnings.warn(message, stacklevel=3)
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
    with torch.device("meta"):
        model = DeepseekV3(config)
    _check_names(source, {name: list(t.shape) for name, t in disk_tensors(model)}, found, set(mtp_copies(config)))
    if wanted is None:
        with safe_open(found["model.embed_tokens.weight"][0], "pt") as file:
            wanted = file.get_slice("model.embed_tokens.weight")[:1].dtype
    model = _cast(model, wanted).to_empty(device=device)
    model.fill_rotation_table()
    _fill(model, files)
    return model


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. Raises ValueError if there are none, or one of the index is missing."""
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / INDEX}: not a safetensors index ({error!r})") from None
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise ValueError(f"{folder / INDEX}: names {name!r}, which is not a file of that folder")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise ValueError(f"{folder}: expected safetensors, found a pickle ({pickles[0]}), which can run code when read")
    raise ValueError(f"{folder}: no model.safetensors and no {INDEX}")


def disk_tensors(model: DeepseekV3) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint by its name on disk, as a view into the model; MTP copies left out."""
    modules = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if not isinstance(modules[owner], Experts):
            yield name, tensor
            continue
        for expert in range(tensor.shape[0]):
            if leaf == "down_proj":
                yield f"{owner}.{expert}.down_proj.weight", tensor[expert]
            else:
                gate, up = tensor[expert].chunk(2)
                yield f"{owner}.{expert}.gate_proj.weight", gate
                yield f"{owner}.{expert}.up_proj.weight", up


def mtp_copies(config: DeepseekV3Config) -> dict[str, str]:
    """Names on disk of the copies that MTP modules carry, with the tensor that each repeats."""
    copies = {}
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"model.layers.{layer}.shared_head.head.weight"] = "lm_head.weight"
    return copies


def save_checkpoint(
    model: DeepseekV3, folder: str | Path, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write config.json and the weights. Each file appears whole; the index, if any, last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or model.lm_head.weight.dtype
    tensors = dict(disk_tensors(model))
    tensors |= {copy: tensors[original] for copy, original in mtp_copies(model.config).items()}

    def stored(name: str) -> torch.dtype:
        return torch.float32 if name.endswith(_FP32) else dtype

    shards: list[list[str]] = [[]]
    size = total = 0
    for name, tensor in tensors.items():
        bytes_here = tensor.numel() * stored(name).itemsize
        if shards[-1] and size + bytes_here > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_here
        total += bytes_here
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        # clone: views of one stacked tensor share storage, which safetensors refuses.
        block = {name: tensors[name].detach().to("cpu", stored(name), copy=True).contiguous() for name in names}
        save_file(block, folder / (file + ".tmp"), metadata={"format": "pt"})
        os.replace(folder / (file + ".tmp"), folder / file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / (INDEX + ".tmp")).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        os.replace(folder / (INDEX + ".tmp"), folder / INDEX)
    else:
        (folder / INDEX).unlink(missing_ok=True)
    for old in folder.glob("model*.safetensors"):
        if old.name not in weight_map.values():
            old.unlink()
    config = dataclasses.replace(model.config, dtype=str(dtype).removeprefix("torch."))
    config.to_json(folder / "config.json")


def _torch_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype is {dtype!r}; expected the name of a torch dtype such as 'float32' or 'bfloat16'")
    return found


def _cast(model: DeepseekV3, dtype: torch.dtype) -> DeepseekV3:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _stored_shapes(files: list[Path]) -> dict[str, tuple[Path, list[int]]]:
    """Name -> (file, shape) of everything stored, from the headers alone."""
    found: dict[str, tuple[Path, list[int]]] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118, not a mapping
                    if name in found:
                        raise ValueError(f"{path}: tensor {name} is also in {found[name][0].name}")
                    found[name] = (path, file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    # Old exports store this table; it follows from the config.
    return {name: where for name, where in found.items() if not name.endswith("rotary_emb.inv_freq")}


def _check_names(
    folder: Path, expected: dict[str, list[int]], found: dict[str, tuple[Path, list[int]]], optional: set[str]
) -> None:
    quantised = sorted(name for name in found if name.endswith("weight_scale_inv"))
    if quantised:
        raise ValueError(f"{found[quantised[0]][0]}: holds FP8 weights ({quantised[0]}), which are not read yet")
    missing = sorted(set(expected) - set(found))
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensor(s) missing, the first is {missing[0]}")
    extra = sorted(set(found) - set(expected) - optional)
    if extra:
        raise ValueError(f"{found[extra[0]][0]}: {len(extra)} tensor(s) not of this model, the first is {extra[0]}")
    for name, shape in expected.items():
        path, stored = found[name]
        if stored != shape:
            raise ValueError(f"{path}: tensor {name} has shape {stored}; config.json asks for {shape}")


@torch.no_grad()
def _fill(model: DeepseekV3, files: list[Path]) -> None:
    places = dict(disk_tensors(model))
    copies = mtp_copies(model.config)
    later: dict[str, tuple[Path, Tensor]] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118, not a mapping
                if name in places:
                    places[name].copy_(file.get_tensor(name))
                elif name in copies:
                    later[name] = (path, file.get_tensor(name))
    for name, (path, tensor) in later.items():
        place = places[copies[name]]
        if tensor.shape != place.shape or not torch.equal(tensor.to(place), place):
            raise ValueError(f"{path}: {name} differs from {copies[name]}; MTP modules must share it")
