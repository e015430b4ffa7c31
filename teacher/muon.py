"""Muon for a mixture of experts: momentum, orthogonalised, for every matrix; AdamW for what is not one.

Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024); scaled to AdamW's update size and with
decoupled weight decay as in "Muon is scalable for LLM training" (arXiv 2502.16982, eq. 4), which trained a
DeepSeek-V3-shaped MoE with it. It is here because it needs fewer tokens: docs/tiny-models.md has the trials.
torch.optim.Muon takes single matrices only; the experts of a layer are one stacked parameter, so this one is batched.
"""

import torch
from torch import Tensor, nn

from teacher.adamw import adamw_step

# Coefficients of the quintic iteration that brings all singular values near 1 in five rounds.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ROUNDS = 5
_MOMENTUM = 0.95


def orthogonalise(update: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly (singular values 0.7 to 1.2), of each matrix in [..., R, C]."""
    x = update.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x.mT if tall else x).to(update.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the `matrices` ([R, C], or stacked [E, R, C]), AdamW without weight decay for the `others`.

    One learning rate serves both: Muon's update is scaled to the root mean square of AdamW's (0.2).
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        moments: torch.dtype = torch.float32,
    ) -> None:
        groups = [{"params": matrices, "muon": True}, {"params": others, "muon": False}]
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.moments = moments

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                for parameter in parameters:
                    self._muon(parameter, group["lr"], group["weight_decay"])
            else:
                adamw_step(parameters, self.state, group["lr"], group["betas"], 0.0, self.moments)

    def _muon(self, parameter: Tensor, rate: float, weight_decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter, dtype=self.moments)
        assert parameter.grad is not None
        momentum = state["momentum"].float().lerp_(parameter.grad, 1 - _MOMENTUM)  # itself, if it is float32
        state["momentum"].copy_(momentum)
        update = orthogonalise(parameter.grad.lerp(momentum, _MOMENTUM))  # Nesterov
        parameter.mul_(1 - rate * weight_decay)
        parameter.add_(update, alpha=-rate * 0.2 * max(parameter.shape[-2:]) ** 0.5)
