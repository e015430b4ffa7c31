"""Routed experts, and the shared one with them, whose weights stay in FP8: on a Hopper GPU by the kernels, elsewhere
by their definition.

Activations are rounded to FP8 in tiles of 1 x 128 before each product, as DeepSeek-V3 does (section 3.3); weights are
blocks of 128 x 128. A layer of R1's takes 11.3 GB so, and 22.5 in bf16.

Shapes: N tokens, H hidden, E routed experts, K experts a token, I expert intermediate.
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teacher.experts import MLP, Experts, MoE
from teacher.fp8 import ACTIVATION_BLOCK, FP8, dequantize, quantize, scale_shape
from teacher.kernels.arguments import obstacle
from teacher.kernels.operands import Fp8
from teacher.routing import Routing

_log = logging.getLogger(__name__)


@functools.cache
def chosen_path(device: torch.device) -> str:
    """Which path experts on `device` take, "kernels" or "reference": decided and logged once a process."""
    missing = obstacle(device)
    if missing is None:
        _log.info("FP8 experts on %s: Triton kernels", device)
        return "kernels"
    _log.warning("FP8 experts on %s: plain torch, one expert at a time (%s)", device, missing)
    return "reference"


def quantize_experts(model: nn.Module, shared: bool = False) -> None:
    """Replace the routed experts of every MoE layer by their FP8 form, layer by layer. On meta, where there are no
    values, by room for it.

    With `shared` the shared expert becomes one more of the stack, and rides in the same launches. One that is several
    times as wide is cut into as many; on meta it is left as it is, since a checkpoint's matrix could not be copied into
    the pieces as a whole.
    """
    for layer in [module for module in model.modules() if isinstance(module, MoE)]:
        assert isinstance(layer.experts, Experts)
        mlp = layer.shared_experts if shared else None
        if mlp is not None and layer.experts.down_proj.is_meta:
            mlp = mlp if mlp.down_proj.in_features == layer.experts.down_proj.shape[2] else None
        layer.experts = QuantizedExperts.of(layer.experts, mlp)  # type: ignore[assignment]
        if mlp is not None:
            layer.shared_experts = None


def expert_layer_reference(
    x_NH: Tensor, indices_NK: Tensor, weights_NK: Tensor, gate_up: Fp8, down: Fp8, shared: int = 0
) -> Tensor:
    """The definition, one expert at a time in fp32, with activations rounded to FP8 where the kernels round them."""
    experts, inner = len(gate_up.values) - shared, gate_up.values.shape[1] // 2
    out_NH = torch.zeros_like(x_NH, dtype=torch.float32)
    x_NH = _rounded(x_NH)
    for e in range(experts + shared):
        token, slot = (indices_NK == e).nonzero(as_tuple=True)
        weight = weights_NK[token, slot]
        if e >= experts:
            token = torch.arange(len(x_NH), device=x_NH.device)
            weight = torch.ones(len(x_NH), device=x_NH.device)
        if not len(token):
            continue
        blocks = -(-inner // 128)
        gate_IH = dequantize(gate_up.values[e, :inner], gate_up.scales[e, :blocks], torch.float32)
        up_IH = dequantize(gate_up.values[e, inner:], gate_up.scales[e, blocks:], torch.float32)
        hidden = _rounded(F.silu(x_NH[token] @ gate_IH.t()) * (x_NH[token] @ up_IH.t()))
        y = hidden @ dequantize(down.values[e], down.scales[e], torch.float32).t()
        out_NH.index_add_(0, token, y * weight[:, None])
    return out_NH


def _rounded(x: Tensor) -> Tensor:
    return dequantize(*quantize(x, ACTIVATION_BLOCK), torch.float32, ACTIVATION_BLOCK)


class QuantizedExperts(nn.Module):
    """The routed experts of one layer with weights in FP8, in place of `teacher.experts.Experts`. For inference.

    Which path runs is `chosen_path`'s decision, once a process. A shape that the kernels do not take is refused here,
    wherever the model lies. The last `shared` of the stack are visited by every token.
    """

    def __init__(self, experts: int, hidden: int, inner: int, device: torch.device | str, shared: int = 0) -> None:
        super().__init__()
        self.shared = shared
        experts += shared
        place = torch.device(device)
        if hidden % 16 or inner % 16:
            raise ValueError(f"experts of hidden size {hidden} and intermediate size {inner}; taken: multiples of 16")

        def values(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=FP8, device=place)

        def scales(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.float32, device=place)

        half = scale_shape((experts, inner, hidden))
        self.gate_up_proj: Tensor
        self.gate_up_scale: Tensor
        self.down_proj: Tensor
        self.down_scale: Tensor
        self.register_buffer("gate_up_proj", values(experts, 2 * inner, hidden))
        self.register_buffer("gate_up_scale", scales(half[0], 2 * half[1], half[2]))
        self.register_buffer("down_proj", values(experts, hidden, inner))
        self.register_buffer("down_scale", scales(*scale_shape((experts, hidden, inner))))

    @classmethod
    @torch.no_grad()
    def of(cls, experts: Experts, shared: MLP | None = None) -> QuantizedExperts:
        """The same experts, and after them the shared one in pieces of their size, quantised one matrix at a time."""
        count, hidden, inner = experts.down_proj.shape
        pieces = 0 if shared is None else shared.down_proj.in_features // inner
        made = cls(count, hidden, inner, experts.down_proj.device, pieces)
        if experts.down_proj.is_meta:
            return made
        for e in range(count):
            for half in (0, 1):
                weight = experts.gate_up_proj[e].chunk(2)[half]
                _put(weight, made.gate_up_proj[e].chunk(2)[half], made.gate_up_scale[e].chunk(2)[half])
            _put(experts.down_proj[e], made.down_proj[e], made.down_scale[e])
        for piece in range(pieces):
            assert shared is not None
            for half, linear in enumerate((shared.gate_proj, shared.up_proj)):
                place = (
                    made.gate_up_proj[count + piece].chunk(2)[half],
                    made.gate_up_scale[count + piece].chunk(2)[half],
                )
                _put(linear.weight[piece * inner :][:inner], *place)
            weight = shared.down_proj.weight[:, piece * inner :][:, :inner]
            _put(weight, made.down_proj[count + piece], made.down_scale[count + piece])
        return made

    def forward(self, x_NH: Tensor, routing: Routing) -> Tensor:
        if torch.is_grad_enabled() and x_NH.requires_grad:
            raise ValueError("experts quantised to FP8 have no backward; train with fp8 = true in the training config")
        gate_up, down = Fp8(self.gate_up_proj, self.gate_up_scale), Fp8(self.down_proj, self.down_scale)
        arguments = x_NH, routing.indices_NK, routing.weights_NK, gate_up, down, self.shared
        if chosen_path(x_NH.device) == "reference":
            return expert_layer_reference(*arguments).to(x_NH.dtype)
        from teacher.kernels.expert_layer import expert_layer

        return expert_layer(*arguments)

    def pairs(self, x: Fp8, routing: Routing) -> Tensor:
        """For very few tokens, already in FP8, by kernels: parts (S, N, H) whose sum is `forward`'s."""
        from teacher.kernels.expert_pairs import expert_pairs

        gate_up, down = Fp8(self.gate_up_proj, self.gate_up_scale), Fp8(self.down_proj, self.down_scale)
        return expert_pairs(x, routing.indices_NK, routing.weights_NK, gate_up, down, self.shared)


def _put(weight: Tensor, values: Tensor, scales: Tensor) -> None:
    found, found_scales = quantize(weight)
    values.copy_(found)
    scales.copy_(found_scales)
