"""Training with FP8 products, as DeepSeek-V3 did (arXiv 2412.19437 section 3.3).

The forward product of every projection in attention, feed-forward and experts, and both of its gradients, take e4m3
operands: activations and their gradients in tiles of 1 x 128, weights in blocks of 128 x 128 (gradients in blocks of
128 x 128 diverged in the paper's appendix B.2). What a layer keeps for its backward pass is its FP8 input, which the
gradient of the weight, a sum over tokens, takes apart and quantises anew in tiles of 128 x 1.
Embedding, head, router, norms, MTP's joining projection and the softmax of attention stay as they are; weights are
float32 masters, of which the forward pass quantises a copy; their gradients are float32.

Shapes: N tokens, K and O columns of input and output, E experts, R rows of the experts' layout, I expert intermediate.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teacher import fp8_products as emulated
from teacher import shapes
from teacher.checkpoint import is_fp8_matrix
from teacher.experts import Experts, arrange, combine, expert_layout
from teacher.fp8 import ACTIVATION_BLOCK, WEIGHT_BLOCK
from teacher.fp8_products import Quantized
from teacher.routing import Routing

_TILE = 128  # rows: no tile along tokens may hold two experts


@functools.cache
def products(device: torch.device) -> ModuleType:
    """What multiplies on `device`: the kernels where they run, else their emulation. Says once which it is."""
    if device.type == "cpu":
        return emulated
    from teacher.kernels.arguments import obstacle

    if (reason := obstacle(device)) is not None:
        print(f"FP8 products are emulated: {reason}", flush=True)
        return emulated
    from teacher.kernels import products as kernels

    print("FP8 products by teacher.kernels", flush=True)
    return kernels


def emulates(device: torch.device) -> bool:
    """Whether FP8 products on `device` are emulated."""
    return products(device) is emulated


class _Linear(torch.autograd.Function):
    """x w^T with all three products in FP8."""

    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, weight_OK: Tensor) -> Tensor:
        fp8 = ctx.fp8 = products(x_NK.device)
        x, (w, turned) = fp8.along_columns(x_NK), fp8.weight_both(weight_OK)
        ctx.save_for_backward(*x[:2], *turned[:2])
        return fp8.product(x, w, x_NK.dtype)

    @staticmethod
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x, turned), fp8 = _saved(ctx), ctx.fp8
        across, along = fp8.both_ways(dy_NO)
        dx_NK = dw_OK = None
        if ctx.needs_input_grad[0]:
            dx_NK = fp8.product(across, turned, dy_NO.dtype)
        if ctx.needs_input_grad[1]:
            dw_OK = fp8.weight_product(along, fp8.again_along_tokens(x))
        return dx_NK, dw_OK


class _Grouped(torch.autograd.Function):
    """The same for rows sorted by expert: `ends_E` says where each expert's end, at multiples of 128."""

    @staticmethod
    def forward(ctx: Any, x_RK: Tensor, weight_EOK: Tensor, ends_E: Tensor) -> Tensor:
        fp8 = ctx.fp8 = products(x_RK.device)
        x, (w, turned) = fp8.along_columns(x_RK), fp8.weight_both(weight_EOK)
        ctx.save_for_backward(*x[:2], *turned[:2], ends_E)
        return fp8.grouped_product(x, w, ends_E, x_RK.dtype)

    @staticmethod
    def backward(ctx: Any, dy_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, turned), ends_E, fp8 = _saved(ctx), ctx.saved_tensors[4], ctx.fp8
        across, along = fp8.both_ways(dy_RO)
        dx_RK = dw_EOK = None
        if ctx.needs_input_grad[0]:
            dx_RK = fp8.grouped_product(across, turned, ends_E, dy_RO.dtype)
        if ctx.needs_input_grad[1]:
            dw_EOK = fp8.grouped_weight_product(along, fp8.again_along_tokens(x), ends_E)
        return dx_RK, dw_EOK, None


def _saved(ctx: Any) -> tuple[Quantized, Quantized]:
    """The input, and the weight transposed."""
    x_values, x_scale, w_values, w_scale = ctx.saved_tensors[:4]
    return Quantized(x_values, x_scale, ACTIVATION_BLOCK), Quantized(w_values, w_scale, WEIGHT_BLOCK)


def linear(x: Tensor, weight_OK: Tensor) -> Tensor:
    """x (..., K) times weight^T: (..., O) in x's dtype, or autocast's; the weight's gradient is float32."""
    x = _autocast(x)
    with torch.autocast(x.device.type, enabled=False):
        x_NK = x.flatten(0, -2)
        rows = len(x_NK)
        if shapes.fixed(x) and rows % 16:  # an MTP module's: what lies transposed has rows of whole 16 bytes with these
            x_NK = F.pad(x_NK, (0, 0, 0, -rows % 16))
        y_NO: Tensor = _Linear.apply(x_NK, weight_OK)[:rows]
    return y_NO.unflatten(0, x.shape[:-1])


def experts(x_NH: Tensor, routing: Routing, gate_up_E2IH: Tensor, down_EHI: Tensor) -> Tensor:
    """`teacher.experts.grouped_experts` in FP8: both products of all experts, SwiGLU between them as it was.

    Each expert's rows are filled up to a multiple of 128 with zeros, which neither a scale nor a product sees.
    """
    x_NH = _autocast(x_NH)
    with torch.autocast(x_NH.device.type, enabled=False):
        layout = expert_layout(routing.indices_NK, gate_up_E2IH.shape[0], _TILE)
        gate_RI, up_RI = _Grouped.apply(arrange(x_NH, layout, blank=True), gate_up_E2IH, layout.ends_E).chunk(2, dim=-1)
        out_RH = _Grouped.apply(F.silu(gate_RI) * up_RI, down_EHI, layout.ends_E)
        return combine(out_RH, routing.weights_NK, layout)


def _autocast(x: Tensor) -> Tensor:
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class Fp8Linear(nn.Linear):
    """A projection whose products are FP8's."""

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Fp8Experts(Experts):
    """Routed experts whose products are FP8's."""

    def forward(self, x_NH: Tensor, routing: Routing) -> Tensor:
        return experts(x_NH, routing, self.gate_up_proj, self.down_proj)


@contextmanager
def fp8_products(model: nn.Module) -> Iterator[None]:
    """Within, the model's projections multiply in FP8: those that an FP8 checkpoint stores so (`is_fp8_matrix`).

    Modules change their class and nothing else, so that parameters, their names and an optimizer's hold on them stay.
    """
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    for name, module in model.named_modules():
        if (type(module) is nn.Linear and is_fp8_matrix(name + ".weight")) or type(module) is Experts:
            changed.append((module, type(module)))
    for module, own in changed:
        module.__class__ = Fp8Linear if own is nn.Linear else Fp8Experts
    try:
        yield
    finally:
        for module, own in changed:
            module.__class__ = own
