"""What must be known of a model before vLLM is started on it: its context, its experts and its bytes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.shipped import configs_folder, resolve_model

# Of one architecture, size and precision, so that a launch can be planned where the hub cannot be reached.
_V3_SIZED = {f"deepseek-ai/DeepSeek-{name}" for name in ("R1", "R1-0528", "R1-Zero", "V3", "V3-0324", "V3-Base")}


@dataclass(frozen=True)
class Facts:
    """Of one model. Bytes as stored; None where nothing on this machine says."""

    model: str  # a folder or a hub name, as vLLM takes it
    revision: str | None
    context: int | None  # most tokens of a sequence
    heads: int  # what tensor parallelism must divide
    experts: bool
    # (kv_lora_rank, qk_rope_head_dim) of latent attention: its cache is small, but every tensor-parallel GPU holds all.
    latent: tuple[int, int] | None
    mtp_layers: int
    weights: int | None
    expert_weights: int  # the part of them that expert parallelism spreads over all GPUs
    cache_per_token: int  # in 16 bits a value


def read_facts(model: str, revision: str | None = None, field: str = "teacher.model") -> Facts:
    """From config.json and the weights' sizes. Raises UserError if there is no such model or no config."""
    found = resolve_model(model)
    if isinstance(found, Path) and not (found / "config.json").is_file():
        raise UserError(f"{field}: '{model}' has no config.json; expected a model folder or a hub name")
    config = _config(found, revision, field)
    text = config.get("text_config", config)  # of models that also see
    heads = int(text.get("num_attention_heads", 1))
    stored = sum(path.stat().st_size for path in found.glob("*.safetensors")) if isinstance(found, Path) else None
    weights, experts = _deepseek_bytes(config) or (stored or None, 0)
    latent = (int(text["kv_lora_rank"]), int(text["qk_rope_head_dim"])) if text.get("kv_lora_rank") else None
    if latent:
        values = sum(latent)
    else:
        width = text.get("head_dim") or int(text.get("hidden_size", 0)) // heads
        values = 2 * int(text.get("num_key_value_heads") or heads) * int(width)
    return Facts(
        model=str(found),
        revision=None if isinstance(found, Path) else revision,
        context=text.get("max_position_embeddings"),
        heads=heads,
        experts=any(text.get(name) for name in ("n_routed_experts", "num_experts", "num_local_experts")),
        latent=latent,
        mtp_layers=int(text.get("num_nextn_predict_layers") or 0),
        weights=weights,
        expert_weights=experts,
        cache_per_token=2 * values * int(text.get("num_hidden_layers", 1)),
    )


def _config(found: Path | str, revision: str | None, field: str) -> dict[str, Any]:
    if isinstance(found, Path) or found in _V3_SIZED:
        path = found / "config.json" if isinstance(found, Path) else configs_folder() / "teacher" / "deepseek-v3.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error})") from None
    else:
        from transformers import PretrainedConfig

        try:
            config = PretrainedConfig.get_config_dict(found, revision=revision, trust_remote_code=False)[0]
        except (OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{field}: '{found}' is neither a folder nor to be had from the hub ({reason})") from None
    if not isinstance(config, dict) or not config:
        raise UserError(f"{field}: the config.json of '{found}' is not that of a model")
    return config


def _deepseek_bytes(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """(all weights of the main model, its routed experts), for the architecture that we know tensor by tensor."""
    if config.get("model_type") != "deepseek_v3":
        return None
    from teacher import inspect
    from teacher.config import DeepseekV3Config

    parsed = DeepseekV3Config.from_dict(dict(config))
    quantised = (config.get("quantization_config") or {}).get("quant_method")
    stored = config.get("dtype") or config.get("torch_dtype")
    precision: inspect.Precision = "fp8" if quantised == "fp8" else "fp32" if stored == "float32" else "bf16"
    block = inspect.scale_block(parsed)
    sizes = [(t.kind, t.bytes(precision, block)) for t in inspect.tensors(parsed) if t.part == "main"]
    return sum(size for _, size in sizes), sum(size for kind, size in sizes if kind == "routed experts")
