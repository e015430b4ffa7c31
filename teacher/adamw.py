"""AdamW over float32 weights whose two averages may be kept in bfloat16 (DeepSeek-V3 section 3.3.3).

The arithmetic is float32's and torch's own; only what stays between steps is rounded. That halves the optimizer's
memory. It asks for averages that forget fast enough: with beta2 = 0.999 an average moves by a thousandth of what is
new, less than half a bfloat16 step of itself, and would stand still.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

PORTION = 1 << 24  # values that are worked on at a time: enough to keep a GPU busy, in 64 MB of float32


class AdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay; `groups` as torch.optim.AdamW takes them, each with its `weight_decay`."""

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], moments: torch.dtype
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas})
        self.moments = moments

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            adamw_step(parameters, self.state, group["lr"], group["betas"], group["weight_decay"], self.moments)


def adamw_step(
    parameters: list[Tensor],
    states: Mapping[Tensor, Any],
    rate: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    moments: torch.dtype,
) -> None:
    """One step of parameters that have gradients. Averages in `moments` are float32 for a few parameters at a time."""
    for parameter in parameters:
        state = states[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=moments)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=moments)
    for chosen in [parameters] if moments == torch.float32 else portions(parameters):
        averages: dict[str, list[Tensor]] = {
            name: [states[p][name].float() for p in chosen] for name in ("exp_avg", "exp_avg_sq")
        }
        adamw(
            chosen,
            [p.grad for p in chosen if p.grad is not None],
            averages["exp_avg"],
            averages["exp_avg_sq"],
            [],
            [states[p]["step"] for p in chosen],
            fused=True,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=rate,
            weight_decay=weight_decay,
            eps=1e-8,
            maximize=False,
        )
        if moments != torch.float32:
            for name, converted in averages.items():
                torch._foreach_copy_([states[p][name] for p in chosen], converted)


def portions(parameters: list[Tensor]) -> list[list[Tensor]]:
    """The parameters in their order, as many at a time as have PORTION values together, or a larger one alone."""
    parts: list[list[Tensor]] = []
    room = 0
    for parameter in parameters:
        if parameter.numel() > room:
            parts.append([])
            room = max(PORTION, parameter.numel())
        parts[-1].append(parameter)
        room -= parameter.numel()
    return parts
