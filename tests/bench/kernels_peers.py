"""What else multiplies groups of FP8 rows on a Hopper GPU: torch's own products, and libraries that can be imported.

Each peer is given what it wants before it is timed (its layout of scales, its indices), and what it returns is not
checked here. A peer that is missing gives no row; one that refuses says why in its row.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch

from teacher.fp8 import ACTIVATION_BLOCK, dequantize
from teacher.kernels.operands import Fp8, Groups

Peer = tuple[str, Callable[[], Any]]


def grouped(x: Fp8, w: Fp8, groups: Groups) -> Iterator[Peer]:
    """Peers of `grouped_gemm` on contiguous groups."""
    ends = (groups.start_E + groups.count_E).int()
    experts, n, _ = w.values.shape
    if hasattr(torch, "_scaled_grouped_mm"):
        row_scale = torch.rand(len(x.values), device="cuda") + 0.5
        column_scale = torch.rand(experts, n, device="cuda") + 0.5
        yield (
            "torch._scaled_grouped_mm row-wise",
            lambda: torch._scaled_grouped_mm(
                x.values, w.values.transpose(1, 2), row_scale, column_scale, offs=ends, out_dtype=torch.bfloat16,
                use_fast_accum=True,
            ),
        )  # fmt: skip
    if hasattr(torch, "_grouped_mm"):
        x16 = dequantize(x.values, x.scales.contiguous(), torch.bfloat16, ACTIVATION_BLOCK)
        w16 = torch.stack([dequantize(*each, torch.bfloat16) for each in zip(w.values, w.scales, strict=True)])
        yield "torch._grouped_mm bf16", lambda: torch._grouped_mm(x16, w16.transpose(1, 2), offs=ends)
    if importlib.util.find_spec("deep_gemm"):
        import deep_gemm

        out = torch.empty(len(x.values), n, dtype=torch.bfloat16, device="cuda")
        index = torch.repeat_interleave(torch.arange(experts, device="cuda"), groups.count_E.long()).int()
        call = deep_gemm.m_grouped_fp8_gemm_nt_contiguous
        yield "DeepGEMM", lambda: call(tuple(x), tuple(w), out, index)
    if importlib.util.find_spec("flashinfer"):
        from flashinfer.gemm import group_gemm_fp8_nt_groupwise

        start = torch.cat([groups.start_E, ends[-1:]])
        scale_x, scale_w = x.scales.t().contiguous(), w.scales.transpose(1, 2).contiguous()
        yield (
            "FlashInfer",
            lambda: group_gemm_fp8_nt_groupwise(
                x.values, w.values, scale_x, scale_w, start, scale_major_mode="MN", out_dtype=torch.bfloat16
            ),
        )


def dense(x: Fp8, w: Fp8) -> Iterator[Peer]:
    """FP8 products of one matrix, as the rate that a library reaches on this GPU: `w` holds one."""
    values = w.values[0].t()
    one_x, one_w = torch.ones(len(x.values), 1, device="cuda"), torch.ones(1, values.shape[1], device="cuda")
    for fast in (True, False):
        yield (
            f"torch._scaled_mm row-wise{' fast' if fast else ''}",
            lambda fast=fast: torch._scaled_mm(  # type: ignore[misc]
                x.values, values, one_x, one_w, out_dtype=torch.bfloat16, use_fast_accum=fast
            ),
        )
    yield (
        "torch._scaled_mm 1x128, 128x128",
        lambda: torch._scaled_mm(x.values, values, x.scales, w.scales[0].t(), out_dtype=torch.bfloat16),
    )
    if importlib.util.find_spec("flashinfer"):
        from flashinfer.gemm import fp8_blockscale_gemm_sm90

        scale_x = x.scales.t().contiguous().view(x.scales.shape)  # column by column, in the shape that is asked for
        out = torch.empty(len(x.values), values.shape[1], dtype=torch.bfloat16, device="cuda")
        yield (
            "FlashInfer (DeepGEMM of TensorRT-LLM) 1x128, 128x128",
            lambda: fp8_blockscale_gemm_sm90(x.values, w.values[0], scale_x, w.scales[0], out),
        )


def layer(
    x_NH: torch.Tensor, indices_NK: torch.Tensor, weights_NK: torch.Tensor, gate_up: Fp8, down: Fp8
) -> Iterator[Peer]:
    """Peers of the expert layer without its shared expert."""
    if importlib.util.find_spec("vllm"):
        from vllm.model_executor.layers.fused_moe import fused_experts
        from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

        settings = fp8_w8a8_moe_quant_config(w1_scale=gate_up.scales, w2_scale=down.scales, block_shape=[128, 128])
        yield (
            "vLLM fused_experts",
            lambda: fused_experts(
                x_NH, gate_up.values, down.values, weights_NK, indices_NK.int(), quant_config=settings
            ),
        )
