"""What a config says of its model before a weight is read: parameters, bytes, cache and work a token. No torch.

Published for DeepSeek-V3, and what is counted here:
- 671B parameters (arXiv 2412.19437): the main model, embedding and head each once: 671.03B.
- 37B activated: the parameters that one token is multiplied with. The head counts, the embedding counts as the one row
  that is looked up: 36.63B. (README_WEIGHTS.md says 36.7B "including embedding and head"; with the whole embedding
  table it is 37.55B.)
- MTP: README_WEIGHTS.md gives 11.5B unique and, with the shared embedding and head, 2.4B activated. Both leave out
  eh_proj (0.10B), with which they are 11.61B and 2.54B. On disk the module repeats embedding and head: 13.46B, "14B".
- The files on the Hub hold 680,571,043,840 FP8, 3,918,786,560 bf16 and 41,555,600 fp32 values: exactly what `tensors`
  gives, 688,574,839,360 bytes.

Letters as in teacher/attention.py: H heads, N = qk_nope_head_dim, D = qk_rope_head_dim, V = v_head_dim,
R = kv_lora_rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal

from teacher.config import DeepseekV3Config

Part = Literal["main", "mtp", "copies"]
Precision = Literal["fp32", "bf16", "fp8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp8")
KINDS = ("embedding", "attention", "dense FFN", "routed experts", "shared expert", "router", "norms", "head")


@dataclass(frozen=True)
class Tensors:
    """Equal tensors of a checkpoint. `part` "copies" are the embedding and head that MTP modules repeat on disk."""

    name: str  # on disk, behind the layer's prefix
    kind: str
    shape: tuple[int, ...]
    count: int  # how many the model has
    used: float  # how many of them one token meets: of a layer's routed experts only the chosen
    part: Part = "main"
    fp8: bool = False  # whether DeepSeek stores it in FP8; else bf16, where the model as such is not fp32
    fp32: bool = False  # whether it is fp32 whatever the model's dtype
    split: bool = False  # whether tensor or expert parallelism divides it among GPUs

    @property
    def parameters(self) -> int:
        """All values of all these tensors."""
        return self.count * prod(self.shape)

    @property
    def activated(self) -> int:
        """Values that one token meets."""
        return round(self.used * prod(self.shape))

    def bytes(self, precision: Precision, block: tuple[int, int] = (128, 128)) -> int:
        """Bytes stored; "fp8" is DeepSeek's mixture, with an fp32 scale for each block of an FP8 matrix."""
        values = prod(self.shape)
        if precision == "fp32" or self.fp32:
            return 4 * self.parameters
        if precision == "fp8" and self.fp8:
            rows, columns = self.shape
            return self.count * (values + 4 * -(-rows // block[0]) * -(-columns // block[1]))
        return 2 * self.parameters


def tensors(config: DeepseekV3Config) -> list[Tensors]:
    """Everything that a checkpoint of this config holds, equal tensors together."""
    vocabulary, hidden = config.vocab_size, config.hidden_size
    layers, modules = config.num_hidden_layers, config.num_nextn_predict_layers
    dense = min(config.first_k_dense_replace, layers)
    dense_modules = min(max(config.first_k_dense_replace - layers, 0), modules)
    embedding, head = (vocabulary, hidden), (vocabulary, hidden)
    return [
        Tensors("model.embed_tokens.weight", "embedding", embedding, 1, 1 / vocabulary, split=True),
        *_blocks(config, "main", dense, layers - dense),
        Tensors("model.norm.weight", "norms", (hidden,), 1, 1),
        Tensors("lm_head.weight", "head", head, 1, 1, split=True),
        *_some(
            modules,
            *_blocks(config, "mtp", dense_modules, modules - dense_modules),
            Tensors("eh_proj.weight", "projection", (hidden, 2 * hidden), modules, modules, "mtp"),
            *(
                Tensors(f"{name}.weight", "norms", (hidden,), modules, modules, "mtp")
                for name in ("enorm", "hnorm", "shared_head.norm")
            ),
            Tensors("embed_tokens.weight", "embedding", embedding, modules, modules / vocabulary, "copies", split=True),
            Tensors("shared_head.head.weight", "head", head, modules, modules, "copies", split=True),
        ),
    ]


def _blocks(config: DeepseekV3Config, part: Part, dense: int, moe: int) -> list[Tensors]:
    """The tensors of `dense` + `moe` decoder layers."""
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    inner, layers = config.moe_intermediate_size, dense + moe
    found: list[Tensors] = []

    def matrix(name: str, kind: str, rows: int, columns: int, count: int, used: int, split: bool = True) -> None:
        found.append(Tensors(f"{name}.weight", kind, (rows, columns), count, used, part, fp8=True, split=split))

    def vector(name: str, kind: str, size: int, fp32: bool = False, count: int = layers) -> None:
        found.append(Tensors(name, kind, (size,), count, count, part, fp32=fp32))

    def attention(name: str, rows: int, columns: int, split: bool = True, bias: bool = False) -> None:
        matrix(f"self_attn.{name}", "attention", rows, columns, layers, layers, split)
        if bias and config.attention_bias:
            vector(f"self_attn.{name}.bias", "attention", rows)

    if config.q_lora_rank is None:
        attention("q_proj", heads * config.qk_head_dim, hidden)
    else:
        attention("q_a_proj", config.q_lora_rank, hidden, split=False, bias=True)
        vector("self_attn.q_a_layernorm.weight", "norms", config.q_lora_rank)
        attention("q_b_proj", heads * config.qk_head_dim, config.q_lora_rank)
    attention("kv_a_proj_with_mqa", config.latent_dim, hidden, split=False, bias=True)
    vector("self_attn.kv_a_layernorm.weight", "norms", rank)
    attention("kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim), rank)
    attention("o_proj", hidden, heads * config.v_head_dim, bias=True)

    feed_forwards = [
        ("mlp", "dense FFN", config.intermediate_size, dense, dense),
        (
            "mlp.experts.*", "routed experts", inner,
            moe * config.n_routed_experts, moe * config.num_experts_per_tok,
        ),
        ("mlp.shared_experts", "shared expert", inner * config.n_shared_experts, moe, moe),
    ]  # fmt: skip
    for name, kind, size, count, used in feed_forwards:
        for projection in ("gate_proj", "up_proj"):
            matrix(f"{name}.{projection}", kind, size, hidden, count, used)
        matrix(f"{name}.down_proj", kind, hidden, size, count, used)
    experts = config.n_routed_experts
    found.append(Tensors("mlp.gate.weight", "router", (experts, hidden), moe, moe, part))
    vector("mlp.gate.e_score_correction_bias", "router", experts, fp32=True, count=moe)
    vector("input_layernorm.weight", "norms", hidden)
    vector("post_attention_layernorm.weight", "norms", hidden)
    return list(_some(layers, *found))


def _some(layers: int, *found: Tensors) -> Iterable[Tensors]:
    """Those that exist: nothing of layers that are not there, no shared expert of size 0."""
    return (tensor for tensor in found if layers and tensor.parameters)


@dataclass(frozen=True)
class Count:
    """Parameters of one kind, and how many of them one token meets."""

    kind: str
    total: int
    activated: int


def count(config: DeepseekV3Config, *parts: Part) -> Count:
    """Parameters of these parts together; without parts, of the main model."""
    chosen = [tensor for tensor in tensors(config) if tensor.part in (parts or ("main",))]
    return Count("all", sum(t.parameters for t in chosen), sum(t.activated for t in chosen))


def count_by_kind(config: DeepseekV3Config) -> list[Count]:
    """The main model's parameters, kind by kind; kinds that it does not have are left out."""
    main = [tensor for tensor in tensors(config) if tensor.part == "main"]
    rows = []
    for kind in KINDS:
        chosen = [tensor for tensor in main if tensor.kind == kind]
        if chosen:
            rows.append(Count(kind, sum(t.parameters for t in chosen), sum(t.activated for t in chosen)))
    return rows


def scale_block(config: DeepseekV3Config) -> tuple[int, int]:
    """Rows and columns that share an FP8 scale. Raises ValueError if quantization_config is none of DeepSeek's."""
    stated = config.quantization_config
    if stated is None:
        return 128, 128
    if not isinstance(stated, dict) or stated.get("quant_method") != "fp8":
        raise ValueError(f"quantization_config is {stated!r}; expected quant_method 'fp8', as DeepSeek's")
    block = stated.get("weight_block_size", [128, 128])
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise ValueError(f"quantization_config.weight_block_size is {block!r}; expected two positive integers")
    return block[0], block[1]


def weight_bytes(config: DeepseekV3Config, precision: Precision, *parts: Part) -> int:
    """Bytes of the weights of these parts; without parts, of the main model."""
    block = scale_block(config)
    return sum(t.bytes(precision, block) for t in tensors(config) if t.part in (parts or ("main",)))


@dataclass(frozen=True)
class CacheForm:
    """One way to remember a token: values a layer, and bytes over all layers in bf16."""

    name: str
    values: int
    bytes_per_token: int


def cache_forms(config: DeepseekV3Config) -> list[CacheForm]:
    """What is cached a token: the latent (V2 section 2.1.4), and what other attention with these heads would keep.

    MHA, GQA and MQA as in V2's table 1: a key and a value for each head or group, keys with the rotary part inside
    qk_nope_head_dim. "MLA expanded" is this model's own keys and values of every head, as attention without absorption
    reads them.
    """
    heads, pair = config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim
    groups = max((size for size in range(2, min(8, heads - 1) + 1) if heads % size == 0), default=None)
    values = {"MLA latent": config.latent_dim, "MLA expanded": heads * (config.qk_head_dim + config.v_head_dim)}
    if heads > 1:
        values[f"MHA, {heads} heads"] = heads * pair
    if groups:
        values[f"GQA, {groups} groups"] = groups * pair
    values["MQA"] = pair
    return [CacheForm(name, size, 2 * size * config.num_hidden_layers) for name, size in values.items()]


def cache_bytes(config: DeepseekV3Config) -> int:
    """Bytes of the bf16 latent cache a token, without the MTP modules."""
    return 2 * config.latent_dim * config.num_hidden_layers


@dataclass(frozen=True)
class Flops:
    """Floating-point operations a token of the main model at a context length; a multiply-add is two.

    Norms, softmax and rotations, which are no products, are left out, as is usual.
    """

    context: int
    matrices: int  # 2 x activated matrix parameters; the same in both forms of attention
    attention_expanded: int  # scores and values of the last token, keys and values of each head at hand
    attention_absorbed: int  # the same in the latent space, as at decode over a latent cache
    prefill: int  # mean over a prompt of `context` tokens, causal, expanded
    training: int  # three times that: forward, gradient of inputs, gradient of weights; nothing recomputed


def flops(config: DeepseekV3Config, context: int) -> Flops:
    """Work a token. V3 at 4,096 tokens trains with 250 GFLOPs a token by DeepSeek's count too (2505.09343, table 2).

    Absorbing kv_b_proj moves its product from the cached token to the query and the output at the same cost
    (2 R H (N + V)), so `matrices` serves both.
    """
    matrices = 2 * sum(
        t.activated for t in tensors(config) if t.part == "main" and len(t.shape) == 2 and t.kind != "embedding"
    )
    a_pair_of_tokens = 2 * config.num_hidden_layers * config.num_attention_heads
    expanded = a_pair_of_tokens * (config.qk_head_dim + config.v_head_dim)
    absorbed = a_pair_of_tokens * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
    prefill = matrices + expanded * (context + 1) // 2
    return Flops(context, matrices, expanded * context, absorbed * context, prefill, 3 * prefill)
