"""The DeepSeek-V3 configuration: the fields of DeepSeek's and transformers' `config.json`, checked once, here."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What this architecture fixes. DeepSeek's files state these; a file that states something else is another model.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
_DTYPES = (None, "float32", "bfloat16", "float16", "float64")
# Two names of one field; a file may have both if they agree.
_SAME = (("num_nextn_predict_layers", "num_mtp_layers"), ("dtype", "torch_dtype"))
_ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
    "mscale", "mscale_all_dim", "attention_factor", "truncate", "partial_rotary_factor",
}  # fmt: skip


@dataclass(frozen=True)
class DeepseekV3Config:
    """Field names and defaults are those of `transformers.DeepseekV3Config` (DeepSeek-V3 671B).

    `rope_scaling` is None or DeepSeek's YaRN dictionary. Raises ValueError naming the field that is wrong.
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    num_key_value_heads: int | None = 128
    n_shared_experts: int = 1
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 3
    num_nextn_predict_layers: int = 1
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    attention_bias: bool = False
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_interleave: bool = True
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    pad_token_id: int | None = None
    dtype: str | None = None
    quantization_config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check what would otherwise fail far from here, or not at all."""
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for name in _POSITIVE:
            value = getattr(self, name)
            _require(type(value) is int and value > 0, name, value, "a positive integer")
        for name in ("first_k_dense_replace", "num_nextn_predict_layers", "n_shared_experts"):
            value = getattr(self, name)
            _require(type(value) is int and value >= 0, name, value, "an integer of at least 0")
        _require(
            self.q_lora_rank is None or (isinstance(self.q_lora_rank, int) and self.q_lora_rank > 0),
            "q_lora_rank", self.q_lora_rank, "a positive integer or null",
        )  # fmt: skip
        _require(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", self.qk_rope_head_dim, "an even number")
        _require(
            self.num_key_value_heads == self.num_attention_heads,
            "num_key_value_heads", self.num_key_value_heads, f"num_attention_heads ({self.num_attention_heads})",
        )  # fmt: skip
        group_size = self.n_routed_experts // self.n_group
        _require(
            self.n_routed_experts % self.n_group == 0 and group_size >= 2,
            "n_group", self.n_group,
            f"a divisor of n_routed_experts ({self.n_routed_experts}) in groups of 2 or more",
        )  # fmt: skip
        _require(self.topk_group <= self.n_group, "topk_group", self.topk_group, f"at most n_group ({self.n_group})")
        _require(
            self.num_experts_per_tok <= self.topk_group * group_size,
            "num_experts_per_tok", self.num_experts_per_tok,
            f"at most the {self.topk_group * group_size} experts of topk_group groups",
        )  # fmt: skip
        for name in ("rope_theta", "rms_norm_eps", "routed_scaling_factor", "initializer_range"):
            value = getattr(self, name)
            _require(type(value) in (int, float) and value > 0, name, value, "a positive number")
        for name in ("norm_topk_prob", "attention_bias", "rope_interleave"):
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        _require(self.dtype in _DTYPES, "dtype", self.dtype, f"one of {', '.join(map(str, _DTYPES[1:]))}")
        settings = self.quantization_config
        _require(settings is None or isinstance(settings, dict), "quantization_config", settings, "an object or null")
        _check_rope_scaling(self.rope_scaling)

    @property
    def qk_head_dim(self) -> int:
        """Dimension of one query or key head: the part without position, then the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values cached a token a layer: the compressed key-value latent and the shared rotary key (V2 section 2.1)."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` has routed experts; MTP layers, numbered after the others, do."""
        return layer >= self.first_k_dense_replace

    @classmethod
    def from_json(cls, path: str | Path) -> DeepseekV3Config:
        """Read `config.json`, or the folder that holds one. Raises ValueError naming the file and the field."""
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        if not path.is_file():
            raise ValueError(f"{path}: no such file; a model folder needs a config.json")
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{path}: expected a JSON object, found {type(fields).__name__}")
        try:
            return cls.from_dict(fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> DeepseekV3Config:
        """Build from the keys of a config.json; keys that do not concern the architecture are passed over."""
        found = fields.get("model_type")
        _require(found == "deepseek_v3", "model_type", found, "'deepseek_v3'")
        for name, expected in _FIXED.items():
            _require(fields.get(name, expected) in (expected, None), name, fields.get(name), repr(expected))
        for name, other in _SAME:
            if fields.get(name) is not None and fields.get(other) is not None:
                _require(fields[name] == fields[other], name, fields[name], f"{other} ({fields[other]!r})")
        known = {field.name: fields[field.name] for field in dataclasses.fields(cls) if field.name in fields}
        if "num_nextn_predict_layers" not in fields and "num_mtp_layers" in fields:
            known["num_nextn_predict_layers"] = fields["num_mtp_layers"]
        known["dtype"] = fields.get("dtype", fields.get("torch_dtype"))
        # transformers 5 writes one `rope_parameters` with theta inside; DeepSeek writes rope_theta and rope_scaling.
        rope = fields.get("rope_parameters") or fields.get("rope_scaling")
        _require(rope is None or isinstance(rope, dict), "rope_scaling", rope, "an object or null")
        _check_rope_agreement(fields)
        if rope is not None:
            rope = dict(rope)
            known["rope_theta"] = rope.pop("rope_theta", known.get("rope_theta", 10000.0))
            rope_type = rope.pop("rope_type", rope.get("type", "default"))
            known["rope_scaling"] = None if rope_type == "default" else rope | {"type": rope_type}
        config = cls(**known)
        for name, value in (("qk_head_dim", config.qk_head_dim), ("head_dim", config.qk_rope_head_dim)):
            found = fields.get(name)  # transformers writes these two, which follow from others
            _require(found in (None, value), name, found, f"{value}, as the other head dimensions have it")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The keys of a config.json that DeepSeek's code, transformers 4 and 5, vLLM and SGLang all read."""
        fields = dataclasses.asdict(self)
        for name in ("dtype", "quantization_config"):
            if fields[name] is None:
                del fields[name]
        return {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"} | fields | _FIXED

    def to_json(self, path: str | Path) -> None:
        """Write `path` whole or not at all."""
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(self.to_dict(), indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


_POSITIVE = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings",
)  # fmt: skip


def _check_rope_scaling(rope: dict[str, Any] | None) -> None:
    if rope is None:
        return
    rope_type = rope.get("type", rope.get("rope_type"))
    _require(rope_type == "yarn", "rope_scaling.type", rope_type, "'yarn', or no rope_scaling")
    for name in ("factor", "original_max_position_embeddings"):
        value: Any = rope.get(name)
        _require(type(value) in (int, float) and value >= 1, f"rope_scaling.{name}", value, "a number of at least 1")
    unknown = sorted(set(rope) - _ROPE_KEYS)
    _require(not unknown, "rope_scaling", unknown, "only YaRN's keys")
    _require(rope.get("partial_rotary_factor", 1.0) == 1.0, "rope_scaling.partial_rotary_factor", rope, "1.0")


def _check_rope_agreement(fields: dict[str, Any]) -> None:
    """That transformers' `rope_parameters` says what DeepSeek's `rope_theta` and `rope_scaling` beside it say."""
    parameters, scaling = fields.get("rope_parameters"), fields.get("rope_scaling")
    if not isinstance(parameters, dict):
        return
    beside = dict(scaling) if isinstance(scaling, dict) else {}
    if "type" in beside:
        beside.setdefault("rope_type", beside["type"])
    beside["rope_theta"] = fields.get("rope_theta", beside.get("rope_theta"))
    for name in sorted(set(parameters) & set(beside)):
        expected = f"what is stated beside it ({beside[name]!r})"
        _require(beside[name] in (None, parameters[name]), f"rope_parameters.{name}", parameters[name], expected)


def _require(condition: bool, field: str, found: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{field} is {found!r}; expected {expected}")
