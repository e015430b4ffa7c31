"""The router's choice in one launch: affinities, bias, groups, top-k and weights of a token by one program.

`teacher.routing.Router` after its product, whose parts (see row_product) are added here: some twenty operators of torch
otherwise. Floor, a token: 4 S E bytes in, 12 K out; next to no arithmetic.

Of equal biased affinities the first expert (and group) is taken; torch leaves that open.

Shapes: N tokens, E routed experts, G groups, K experts a token, S parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.config import DeepseekV3Config
from teacher.kernels.arguments import same_device, take
from teacher.routing import router_obstacle


@triton.jit(do_not_specialize=["N"])
def _choose_kernel(
    parts, bias, indices, weights, N, scaling,
    PARTS: tl.constexpr, EXPERTS: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    WIDTH: tl.constexpr = EXPERTS // GROUPS
    group_G = tl.arange(0, GROUPS)
    id_GW = group_G[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    logit_GW = tl.zeros([GROUPS, WIDTH], tl.float32)
    for part in tl.static_range(PARTS):
        logit_GW += tl.load(parts + (part * N + token).to(tl.int64) * EXPERTS + id_GW)
    score_GW = tl.sigmoid(logit_GW)
    biased_GW = score_GW + tl.load(bias + id_GW)
    if TOP_GROUPS < GROUPS:
        best_G = tl.max(biased_GW, axis=1)
        first_G = tl.min(tl.where(biased_GW == best_G[:, None], id_GW, EXPERTS), axis=1)
        second_G = tl.max(tl.where(id_GW == first_G[:, None], float("-inf"), biased_GW), axis=1)
        left_G = best_G + second_G
        kept_G = group_G < 0
        for _ in tl.static_range(TOP_GROUPS):
            group = tl.min(tl.where(left_G == tl.max(left_G, axis=0), group_G, GROUPS), axis=0)
            kept_G = kept_G | (group_G == group)
            left_G = tl.where(group_G == group, float("-inf"), left_G)
        biased_GW = tl.where(kept_G[:, None], biased_GW, float("-inf"))
    slot_K = tl.arange(0, BLOCK_K)
    chosen_K = tl.zeros([BLOCK_K], tl.int32)
    weight_K = tl.zeros([BLOCK_K], tl.float32)
    for slot in tl.static_range(K):
        best = tl.max(tl.max(biased_GW, axis=1), axis=0)
        chosen = tl.min(tl.min(tl.where(biased_GW == best, id_GW, EXPERTS), axis=1), axis=0)
        weight = tl.sum(tl.sum(tl.where(id_GW == chosen, score_GW, 0.0), axis=1), axis=0)
        chosen_K = tl.where(slot_K == slot, chosen, chosen_K)
        weight_K = tl.where(slot_K == slot, weight, weight_K)
        biased_GW = tl.where(id_GW == chosen, float("-inf"), biased_GW)
    if NORMALISE:
        weight_K = weight_K / (tl.sum(weight_K, axis=0) + 1e-20)
    tl.store(indices + token * K + slot_K, chosen_K.to(tl.int64), mask=slot_K < K)
    tl.store(weights + token * K + slot_K, weight_K * scaling, mask=slot_K < K)


def choose(parts_SNE: Tensor, bias_E: Tensor, config: DeepseekV3Config) -> tuple[Tensor, Tensor]:
    """Experts (N, K), int64, and their weights, fp32, from the gate's logits; `Router.forward`'s."""
    take("parts_SNE", parts_SNE, (torch.float32,), (3,), contiguous=True)
    take("bias_E", bias_E, (torch.float32,), (1,), contiguous=True)
    same_device(parts_SNE=parts_SNE, bias_E=bias_E)
    if (missing := router_obstacle(config, parts_SNE.device)) is not None:
        raise ValueError(missing)
    (parts, tokens, experts), k = parts_SNE.shape, config.num_experts_per_tok
    if experts != config.n_routed_experts or len(bias_E) != experts:
        raise ValueError(f"logits of {experts} experts, biases of {len(bias_E)}; taken: {config.n_routed_experts}")
    indices_NK = torch.empty(tokens, k, dtype=torch.int64, device=parts_SNE.device)
    weights_NK = torch.empty(tokens, k, dtype=torch.float32, device=parts_SNE.device)
    if tokens:
        _choose_kernel[(tokens,)](
            parts_SNE, bias_E, indices_NK, weights_NK, tokens, config.routed_scaling_factor, PARTS=parts,
            EXPERTS=experts, GROUPS=config.n_group, TOP_GROUPS=config.topk_group, K=k,
            BLOCK_K=triton.next_power_of_2(k), NORMALISE=config.norm_topk_prob, num_warps=1,
        )  # fmt: skip
    return indices_NK, weights_NK
