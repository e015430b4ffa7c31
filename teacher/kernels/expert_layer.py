"""The routed experts of a layer in FP8, shared expert included: five launches from hidden states to hidden states.

    rows <- ids        x8 <- quantise(x[rows])        h8 <- SwiGLU(x8 W_gate_up)        y <- h8 W_down        sum w y

Floors for N tokens with R1's sizes (H 7168, I 2048, 256 experts, 8 a token and the shared one): 793 MFLOP a token, so
0.40 us of tensor cores; and the weights of the experts that are visited, 44.0 MB each, so that a token alone costs 396
MB (92 us at 4.3 TB/s), and from about 90 tokens on, when nearly all are visited, 11.3 GB (2.6 ms). Everything else
(rows, scales, the sum) is below 6% of either.

Activations are quantised as DeepSeek-V3 does (1 x 128, section 3.3), weights are the checkpoint's blocks of 128 x 128.

Shapes: N tokens, H hidden, E routed experts, K experts a token, I expert intermediate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teacher.kernels.arguments import take
from teacher.kernels.expert_rows import combine, expert_rows
from teacher.kernels.grouped_gemm import grouped_gemm, grouped_swiglu
from teacher.kernels.operands import Fp8
from teacher.kernels.quantize import quantize_activations


def expert_layer(
    x_NH: Tensor, indices_NK: Tensor, weights_NK: Tensor, gate_up: Fp8, down: Fp8, shared: int = 0
) -> Tensor:
    """Sum over a token's experts of weight * down(silu(gate x) * up x): (N, H) in x's dtype, bf16 or fp32.

    gate_up (E, 2I, H) and down (E, H, I), as `grouped_swiglu` and `grouped_gemm` take them. With `shared` the stacks
    hold so many more experts, which every token visits with weight 1.
    """
    take("x_NH", x_NH, (torch.bfloat16, torch.float32), (2,))
    rows = expert_rows(indices_NK, len(gate_up.values) - shared, shared)
    x8 = Fp8(*quantize_activations(x_NH, rows.token_M))
    hidden = grouped_swiglu(x8, gate_up, rows.groups)
    y_MH = torch.empty(len(rows.token_M), x_NH.shape[1], dtype=x_NH.dtype, device=x_NH.device)
    grouped_gemm(hidden, down, rows.groups, y_MH)
    return combine(y_MH, rows, weights_NK, shared)
