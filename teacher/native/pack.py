"""A model's weights as the C step reads them: float32, transposed to (in, out), with MLA's up-projections absorbed.

Legend: H hidden, A heads, Q q_lora_rank, N, D, V and R as in teacher/attention.py, E experts, I expert intermediate.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from teacher.attention import MultiHeadLatentAttention
from teacher.config import DeepseekV3Config
from teacher.experts import MLP, MoE
from teacher.layer import DecoderLayer
from teacher.model import DeepseekV3
from teacher.mtp import MTPLayer

_POINTERS = (
    "input_norm", "post_norm", "down", "down_bias", "q_norm", "kv_norm", "query", "out", "out_bias", "gate",
    "gate_bias", "expert_up", "expert_down", "up", "down_proj", "enorm", "hnorm", "joint", "head_norm",
)  # fmt: skip


class LayerStruct(ctypes.Structure):
    """`Layer` of step.c."""

    _fields_ = [(name, c_void_p) for name in _POINTERS] + [("inner", c_int64)]


class ModelStruct(ctypes.Structure):
    """`Model` of step.c."""

    _fields_ = [
        *((name, c_void_p) for name in ("embed", "norm", "head", "cosine", "sine", "cache", "layers", "sgemm")),
        *((name, c_int64) for name in ("depth", "layer_stride", "widest")),
        *((name, c_float) for name in ("eps", "scale", "routed_scale")),
        ("norm_topk", c_int32),
    ]


def sizes(config: DeepseekV3Config, page_size: int) -> dict[str, int]:
    """The macros of step.c."""
    return {
        "HIDDEN": config.hidden_size, "VOCAB": config.vocab_size, "HEADS": config.num_attention_heads,
        "RANK": config.kv_lora_rank, "ROPE": config.qk_rope_head_dim, "QRANK": config.q_lora_rank or 0,
        "EXPERTS": config.n_routed_experts, "TOP_K": config.num_experts_per_tok, "GROUPS": config.n_group,
        "TOP_GROUPS": config.topk_group, "INNER": config.moe_intermediate_size, "PAGE": page_size,
    }  # fmt: skip


class Packed:
    """The weights of `model`, kept alive beside the structures that point to them."""

    def __init__(self, model: DeepseekV3) -> None:
        self.model = model
        self._kept: list[Tensor] = []
        layers = [self._layer(layer) for layer in (*model.main_layers, *model.mtp_layers[:1])]
        self._layers = (LayerStruct * len(layers))(*layers)
        self.widest = max(layer.inner for layer in layers)
        self._head_HV = model.lm_head.weight.detach().t().contiguous()

    def struct(self, cache_LPGC: Tensor, sgemm: int) -> ModelStruct:
        """The model over this cache."""
        model, config = self.model, self.model.config
        return ModelStruct(
            embed=self._keep(model.model.embed_tokens.weight), norm=self._keep(model.model.norm.weight),
            head=self._keep(self._head_HV), cosine=self._keep(model.cos_TD), sine=self._keep(model.sin_TD),
            cache=self._keep(cache_LPGC), layers=ctypes.addressof(self._layers), sgemm=sgemm,
            depth=config.num_hidden_layers, layer_stride=cache_LPGC[0].numel(), widest=self.widest,
            eps=config.rms_norm_eps, scale=model.main_layers[0].self_attn.scale,
            routed_scale=config.routed_scaling_factor, norm_topk=config.norm_topk_prob,
        )  # fmt: skip

    def _keep(self, tensor: Tensor) -> int:
        tensor = tensor.detach().float().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _layer(self, layer: DecoderLayer) -> LayerStruct:
        found: dict[str, Tensor] = {
            "input_norm": layer.input_layernorm.weight, "post_norm": layer.post_attention_layernorm.weight
        } | _attention(layer.self_attn)  # fmt: skip
        mlp: Any = layer.mlp
        if isinstance(mlp, MoE):
            found["gate"], found["gate_bias"] = mlp.gate.weight.t(), mlp.gate.e_score_correction_bias
            found["expert_up"] = mlp.experts.gate_up_proj.transpose(1, 2)
            found["expert_down"] = mlp.experts.down_proj.transpose(1, 2)
            mlp = mlp.shared_experts
        inner = 0
        if isinstance(mlp, MLP):
            found["up"] = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)).t()
            found["down_proj"] = mlp.down_proj.weight.t()
            inner = mlp.down_proj.weight.shape[1]
        if isinstance(layer, MTPLayer):
            found["enorm"], found["hnorm"] = layer.enorm.weight, layer.hnorm.weight
            found["joint"], found["head_norm"] = layer.eh_proj.weight.t(), layer.shared_head.norm.weight
        return LayerStruct(inner=inner, **{name: self._keep(tensor) for name, tensor in found.items()})


def _attention(attention: MultiHeadLatentAttention) -> dict[str, Tensor]:
    config = attention.config
    heads, rank, rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    halves = torch.arange(rope)
    if config.rope_interleave:
        halves = torch.cat((halves[0::2], halves[1::2]))
    kv_a = attention.kv_a_proj_with_mqa
    rows = torch.cat((torch.arange(rank), rank + halves))
    down, down_bias = [kv_a.weight[rows]], [None if kv_a.bias is None else kv_a.bias[rows]]
    found: dict[str, Tensor] = {"kv_norm": attention.kv_a_layernorm.weight}
    if config.q_lora_rank is None:
        q_AKX = attention.q_proj.weight.unflatten(0, (heads, -1))
    else:
        down.insert(0, attention.q_a_proj.weight)
        down_bias.insert(0, attention.q_a_proj.bias)
        found["q_norm"] = attention.q_a_layernorm.weight
        q_AKX = attention.q_b_proj.weight.unflatten(0, (heads, -1))
    found["down"] = torch.cat(down).t()
    if kv_a.bias is not None:
        found["down_bias"] = torch.cat([bias for bias in down_bias if bias is not None])
    # Products of weights in float64: what is absorbed should not be rounded twice.
    q_nope_ANX, q_rope_ADX = q_AKX.double().split((config.qk_nope_head_dim, rope), dim=1)
    kv_b_AXR = attention.kv_b_proj.weight.double().unflatten(0, (heads, -1))
    up_k_ANR, up_v_AVR = kv_b_AXR.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
    query_ACX = torch.cat((up_k_ANR.transpose(1, 2) @ q_nope_ANX, q_rope_ADX[:, halves]), dim=1)
    found["query"] = query_ACX.flatten(0, 1).t()
    o_AVH = attention.o_proj.weight.double().t().unflatten(0, (heads, -1))
    found["out"] = (up_v_AVR.transpose(1, 2) @ o_AVH).flatten(0, 1)
    if attention.o_proj.bias is not None:
        found["out_bias"] = attention.o_proj.bias
    return found


def absorbed_parameters(config: DeepseekV3Config) -> tuple[int, int]:
    """Parameters of a layer's query and output products: absorbed, and as they are in the checkpoint."""
    heads, rank, width = config.num_attention_heads, config.kv_lora_rank, config.q_lora_rank or config.hidden_size
    absorbed = width * heads * config.latent_dim + heads * rank * config.hidden_size
    plain = width * heads * config.qk_head_dim + heads * config.v_head_dim * config.hidden_size
    plain += rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    return absorbed, plain
