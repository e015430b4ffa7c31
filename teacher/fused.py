"""A decoding step by few kernels: the model's layers as some fourteen launches each where operators of torch are sixty.

For decoding on a GPU in bf16, with or without weights in FP8, over a paged cache that the MLA kernel reads; what a step
computes is `DecoderLayer.extend`, rounded in the same places but for products whose parts are added in fp32:

    norm | q_a and kv_a | norms, rotation, cache | q_b | absorb, rotate | attend, merge | values | o | norm
    gate | choose | experts, shared ones included | the next layer's norm adds what comes of them

Between layers the residual stream x and what is still to be added to it go side by side: each norm adds first. Norms
give FP8 where a product in FP8 reads them, so that no activation is rounded by a launch of its own.

Shapes: N = B T tokens, H hidden, Q query latent (or all queries), R, D, C as in teacher.attention, S parts, I inner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teacher.attention import PagedView
from teacher.experts import MLP, Experts, MoE
from teacher.kernels.operands import Fp8
from teacher.layer import DecoderLayer
from teacher.model import DeepseekV3
from teacher.norm import RMSNorm
from teacher.quantized_experts import QuantizedExperts
from teacher.quantized_linear import QuantizedLinear, all_rows, row_numbers, tile
from teacher.routing import Routing, router_obstacle


def fused_obstacle(model: DeepseekV3) -> str | None:
    """Why the kernels of this file cannot run the model's steps, or None. The MLA kernel's own reasons come first."""
    config = model.config
    if model.lm_head.weight.dtype != torch.bfloat16:
        return f"the model is in {model.lm_head.weight.dtype}, they take bfloat16"
    if config.attention_bias:
        return "its attention has biases"
    if config.hidden_size % 16 or config.kv_lora_rank % 16 or config.qk_rope_head_dim % 4:
        found = f"hidden size {config.hidden_size}, ranks of {config.kv_lora_rank} + {config.qk_rope_head_dim}"
        return f"{found}, they take multiples of 16, 16 and 4"
    queries = config.q_lora_rank or config.num_attention_heads * config.qk_head_dim
    if queries % 128 and isinstance(model.main_layers[0].self_attn.kv_a_proj_with_mqa, QuantizedLinear):
        return f"in FP8 they take whole blocks of 128 for the first projection of queries, not {queries}"
    if config.moe_intermediate_size % 16:
        return f"experts of {config.moe_intermediate_size} hidden values, they take multiples of 16"
    if any(isinstance(layer.mlp, MoE) for layer in (*model.main_layers, *model.mtp_layers)):
        return router_obstacle(config, model.lm_head.weight.device)
    return None


# Tokens whose experts are computed pair by pair (see expert_pairs).
MOST_PAIRED = 2
# More tokens are too if the experts that they visit have no more bytes than this, each counted anew.
MOST_PAIRED_BYTES = 16 * 2**20
# Experts of a layer, gate and up, beside which the shared one is put: what is put together is there twice for a while.
MOST_STACKED_BYTES = 256 * 2**20


class Matrix:
    """A weight, or two with the same input one under the other, which then share their storage with the modules."""

    def __init__(self, *linears: nn.Module) -> None:
        self.fp8: Fp8 | None = None
        if all(isinstance(each, QuantizedLinear) for each in linears):
            joint = [_join([getattr(each, name) for each in linears]) for name in ("weight", "weight_scale")]
            self.weight = joint[0]
            self.fp8 = Fp8(joint[0], joint[1])
            for name, whole in zip(("weight", "weight_scale"), joint, strict=True):
                for each, part in zip(
                    linears, whole.split([len(getattr(each, name)) for each in linears]), strict=True
                ):
                    setattr(each, name, part)
        else:
            weights: list[Tensor] = [each.get_parameter("weight") for each in linears]
            self.weight = _join([weight.data for weight in weights])
            for weight, part in zip(weights, self.weight.split([len(each) for each in weights]), strict=True):
                weight.data = part

    def product(self, x: Tensor | Fp8, one: bool = False) -> Tensor:
        """x W^T in parts (S, N, O): fp32, or bf16 where there is one (as there is with `one`)."""
        from teacher.kernels.grouped_gemm import grouped_gemm
        from teacher.kernels.quantize import quantize_activations
        from teacher.kernels.row_product import MOST_ROWS, row_product

        if self.fp8 is None:
            assert isinstance(x, Tensor)
            return F.linear(x, self.weight).unsqueeze(0)
        x8 = x if isinstance(x, Fp8) else Fp8(*quantize_activations(x))
        rows = len(x8.values)
        if rows <= MOST_ROWS:
            return row_product(x8, self.fp8, 1 if one else None, torch.bfloat16)
        w = Fp8(self.fp8.values[None], self.fp8.scales[None])
        chosen = tile("gemm", self.weight.shape[0], self.weight.shape[1], rows, self.weight.device)
        return grouped_gemm(x8, w, all_rows(rows, self.weight.device), None, chosen).unsqueeze(0)


def _join(parts: list[Tensor]) -> Tensor:
    """Rows of all parts, one under the other: a view of them where they lie so already."""
    first, ends = parts[0], [part.data_ptr() + part.nbytes for part in parts]
    beside = all(part.data_ptr() == end for part, end in zip(parts[1:], ends, strict=False))
    same = all(part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for part in parts)
    if beside and same and all(part.is_contiguous() for part in parts):
        return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
    return torch.cat(parts)


@dataclass
class Step:
    """What all layers of a step are told."""

    cos_ND: Tensor
    sin_ND: Tensor
    rows: int  # sequences
    numbers_N: Tensor  # 0, 1, …: places of the tokens among themselves


class FusedLayer:
    """`DecoderLayer.extend` by kernels; see the module."""

    def __init__(self, layer: DecoderLayer) -> None:
        attention = layer.self_attn
        self.layer, self.attention, self.config = layer, attention, attention.config
        first = attention.q_proj if self.config.q_lora_rank is None else attention.q_a_proj
        self.joint = Matrix(first, attention.kv_a_proj_with_mqa)
        self.q_b = None if self.config.q_lora_rank is None else Matrix(attention.q_b_proj)
        self.out = Matrix(attention.o_proj)
        self.up_k_HNR, self.up_v_HVR = attention._up()
        self.moe = layer.mlp if isinstance(layer.mlp, MoE) else None
        mlp = layer.mlp if self.moe is None else self.moe.shared_experts
        self.stacks = None if self.moe is None else _stacks(self.moe)
        self.mlp = None if mlp is None else FusedMLP(mlp)  # type: ignore[arg-type]

    def extend(
        self, x_NH: Tensor, parts_SNH: Tensor | None, step: Step, view: PagedView
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream and what is to be added to it, from those of the layer before."""
        from teacher.kernels.expert_pairs import expert_pairs
        from teacher.kernels.rms_norm import add_rms_norm

        norm = self.layer.input_layernorm
        normed = add_rms_norm(x_NH, parts_SNH, norm.weight, norm.eps, self.joint.fp8 is not None)
        parts_SNH = self._attend(normed.in_fp8 or normed.normed_NH, step, view)
        norm = self.layer.post_attention_layernorm
        experts = None if self.moe is None else self.moe.experts
        pairs = self._paired(len(x_NH))
        in_fp8 = (pairs and isinstance(experts, QuantizedExperts)) or (
            self.mlp is not None and self.mlp.gate_up.fp8 is not None
        )
        normed = add_rms_norm(normed.sum_NH, parts_SNH, norm.weight, norm.eps, in_fp8)
        if self.moe is None:
            assert self.mlp is not None
            return normed.sum_NH, self.mlp(normed.in_fp8 or normed.normed_NH)
        routing = self._route(normed.normed_NH)
        if pairs and isinstance(experts, QuantizedExperts):
            assert normed.in_fp8 is not None
            out_SNH = experts.pairs(normed.in_fp8, routing)
        elif pairs:
            assert isinstance(experts, Experts)
            stacks = self.stacks or (experts.gate_up_proj, experts.down_proj)
            shared = len(stacks[0]) - self.config.n_routed_experts
            out_SNH = expert_pairs(normed.normed_NH, routing.indices_NK, routing.weights_NK, *stacks, shared)
        else:
            out_SNH = self.moe.experts(normed.normed_NH, routing).unsqueeze(0)
        if self.mlp is None or (pairs and self.stacks):
            return normed.sum_NH, out_SNH
        shared_SNH = self.mlp((self.mlp.gate_up.fp8 and normed.in_fp8) or normed.normed_NH)
        return normed.sum_NH, torch.cat((out_SNH.float(), shared_SNH.float()))

    def _attend(self, x: Tensor | Fp8, step: Step, view: PagedView) -> Tensor:
        from teacher.kernels.heads import absorb, values
        from teacher.kernels.latents import Rotation, write_latents
        from teacher.kernels.mla_append import append
        from teacher.kernels.mla_decode import mla_decode

        attention, config = self.attention, self.config
        turn = Rotation(step.cos_ND, step.sin_ND, config.rope_interleave)
        joint_SNX, place_N = self.joint.product(x), view.write_BT.flatten()
        q_norm = None if self.q_b is None else attention.q_a_layernorm
        in_fp8 = self.q_b is not None and self.q_b.fp8 is not None
        kv_norm, tokens = attention.kv_a_layernorm, joint_SNX.shape[1]
        if view.cache_PGW.dtype == torch.uint8:
            latent_NC = torch.empty(tokens, config.latent_dim, dtype=torch.bfloat16, device=joint_SNX.device)
            q = write_latents(joint_SNX, q_norm, kv_norm, turn, step.numbers_N, latent_NC, in_fp8)
            append(view.cache_PGW, place_N, latent_NC, config.kv_lora_rank)
        else:
            q = write_latents(joint_SNX, q_norm, kv_norm, turn, place_N, view.cache_PGW.flatten(0, 1), in_fp8)
        if self.q_b is not None:
            q = self.q_b.product(q, one=True)
        assert isinstance(q, Tensor)
        q_latent_NHR, q_rope_NHD = absorb(q.view(tokens, config.num_attention_heads, -1), self.up_k_HNR, turn)
        q_latent_BTHR, q_rope_BTHD = (each.unflatten(0, (step.rows, -1)) for each in (q_latent_NHR, q_rope_NHD))
        attended_BTHR = mla_decode(
            q_latent_BTHR, q_rope_BTHD, view.cache_PGW, view.table_BP, view.position_BT, attention.scale, view.first_B
        )
        tiles = self.out.fp8 is not None and config.v_head_dim == 128
        return self.out.product(values(attended_BTHR.flatten(0, 1), self.up_v_HVR, tiles))

    def _paired(self, tokens: int) -> bool:
        """Whether experts go pair by pair: very few tokens do, and more of small experts, which lie in the L2."""
        if self.moe is None:
            return False
        experts, pairs = self.moe.experts, tokens * self.config.num_experts_per_tok
        each = experts.gate_up_proj[0].nbytes + experts.down_proj[0].nbytes
        return tokens <= MOST_PAIRED or pairs * each <= MOST_PAIRED_BYTES

    def _route(self, x_NH: Tensor) -> Routing:
        from teacher.kernels.router import choose
        from teacher.kernels.row_product import MOST_ROWS, row_product

        assert self.moe is not None
        gate = self.moe.gate
        if len(x_NH) > MOST_ROWS:
            return gate(x_NH)
        logits_SNE = row_product(x_NH, gate.weight)
        indices_NK, weights_NK = choose(logits_SNE, gate.e_score_correction_bias, self.config)
        return Routing(indices_NK, weights_NK, weights_NK)


def _stacks(moe: MoE) -> tuple[Tensor, Tensor] | None:
    """Small experts in bf16, and after them the shared one as wide as they are, put side by side in memory: gate and
    up, and down. So it rides in the launches of those that go pair by pair."""
    experts, shared = moe.experts, moe.shared_experts
    if not isinstance(experts, Experts) or shared is None or shared.down_proj.in_features != experts.down_proj.shape[2]:
        return None
    if experts.gate_up_proj.nbytes > MOST_STACKED_BYTES:
        return None
    found = []
    for stack, *linears in (
        (experts.gate_up_proj, shared.gate_proj, shared.up_proj), (experts.down_proj, shared.down_proj)
    ):  # fmt: skip
        weights = [linear.weight for linear in linears]
        joint = _join([stack.data.flatten(0, 1), *(weight.data for weight in weights)])
        for weight, part in zip(
            (stack, *weights), joint.split([len(stack) * stack.shape[1], *map(len, weights)]), strict=True
        ):
            weight.data = part.view(weight.shape)
        found.append(joint.view(len(stack) + 1, *stack.shape[1:]))
    return found[0], found[1]


class FusedMLP:
    """SwiGLU with gate and up as one product."""

    def __init__(self, mlp: MLP) -> None:
        self.gate_up, self.down = Matrix(mlp.gate_proj, mlp.up_proj), Matrix(mlp.down_proj)

    def __call__(self, x: Tensor | Fp8) -> Tensor:
        from teacher.kernels.grouped_gemm import grouped_swiglu
        from teacher.kernels.row_product import MOST_ROWS
        from teacher.kernels.swiglu import swiglu

        w, device = self.gate_up.fp8, self.gate_up.weight.device
        if w is None or not isinstance(x, Fp8):
            return self.down.product(swiglu(self.gate_up.product(x)))
        rows, (columns, inputs) = len(x.values), w.values.shape
        if rows <= MOST_ROWS and columns % 256 == 0:
            return self.down.product(swiglu(self.gate_up.product(x), in_fp8=True))
        chosen = tile("swiglu", columns // 2, inputs, rows, device)
        halves, groups = Fp8(w.values[None], w.scales[None]), all_rows(rows, device)
        return self.down.product(grouped_swiglu(x, halves, groups, None, chosen))


class FusedModel:
    """The layers of `model` for decoding; weights that are read together are put together, in place."""

    @torch.no_grad()
    def __init__(self, model: DeepseekV3) -> None:
        if (missing := fused_obstacle(model)) is not None:
            raise ValueError(f"the fused kernels cannot run this model: {missing}")
        self.model = model
        self.layers = [FusedLayer(layer) for layer in (*model.main_layers, *model.mtp_layers[:1])]

    @torch.inference_mode()
    def extend(self, input_ids_BT: Tensor, position_BT: Tensor, views: Sequence[PagedView]) -> Tensor:
        """`DeepseekV3.extend`."""
        embedded_BTH = self.model.model.embed_tokens(input_ids_BT)
        return self._run(embedded_BTH, position_BT, self.layers[: len(views)], views, self.model.model.norm)

    @torch.inference_mode()
    def draft(self, hidden_BTH: Tensor, next_ids_BT: Tensor, position_BT: Tensor, view: PagedView) -> Tensor:
        """`DeepseekV3.draft`."""
        from teacher.kernels.mtp_join import mtp_join

        module, embedding_VH = self.model.mtp_layers[0], self.model.model.embed_tokens.weight
        hidden_NH = hidden_BTH.flatten(0, 1).contiguous()
        both_NX = mtp_join(next_ids_BT.flatten(), embedding_VH, hidden_NH, module.enorm, module.hnorm)
        joined_BTH = module.eh_proj(both_NX).unflatten(0, next_ids_BT.shape)
        return self._run(joined_BTH, position_BT, self.layers[-1:], [view], None)

    def _run(
        self, x_BTH: Tensor, position_BT: Tensor, layers: Sequence[FusedLayer], views: Sequence[PagedView],
        norm: RMSNorm | None,
    ) -> Tensor:  # fmt: skip
        from teacher.kernels.places import angles
        from teacher.kernels.rms_norm import add_rms_norm

        position_N, device = position_BT.flatten(), x_BTH.device
        cos_ND, sin_ND = angles(position_N, self.model.cos_TD, self.model.sin_TD)
        step = Step(cos_ND, sin_ND, len(x_BTH), row_numbers(len(position_N), device))
        x_NH: Tensor = x_BTH.flatten(0, 1)
        parts_SNH: Tensor | None = None
        for layer, view in zip(layers, views, strict=True):
            x_NH, parts_SNH = layer.extend(x_NH, parts_SNH, step, view)
        assert parts_SNH is not None
        if norm is None:  # of the norm that follows, the sum that it makes first
            norm = self.model.mtp_layers[0].shared_head.norm
            out_NH = add_rms_norm(x_NH, parts_SNH, norm.weight, norm.eps).sum_NH
        else:
            out_NH = add_rms_norm(x_NH, parts_SNH, norm.weight, norm.eps).normed_NH
        return out_NH.view_as(x_BTH)
