"""Muon for a mixture of experts: momentum, orthogonalised, for every matrix; AdamW for what is not one.

Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024); scaled to AdamW's update size and with
decoupled weight decay as in "Muon is scalable for LLM training" (arXiv 2502.16982, eq. 4), which trained a
DeepSeek-V3-shaped MoE with it. It is here because it needs fewer tokens: docs/tiny-models.md has the trials.
torch.optim.Muon takes single matrices only; the experts of a layer are one stacked parameter, so this one is batched.
"""

import torch
from torch import Tensor, nn

from teacher import shapes
from teacher.adamw import adamw_step, portions

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
                for chosen in _alike(parameters):
                    self._muon(chosen, group["lr"], group["weight_decay"])
            else:
                adamw_step(parameters, self.state, group["lr"], group["betas"], 0.0, self.moments)

    def _muon(self, parameters: list[Tensor], rate: float | Tensor, weight_decay: float) -> None:
        """A step of parameters whose matrices have one shape. `rate` may be a scalar on their device."""
        for parameter in parameters:
            if not (state := self.state[parameter]):
                state["momentum"] = torch.zeros_like(parameter, dtype=self.moments)
        kept = [self.state[p]["momentum"] for p in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        momenta = [m.float() for m in kept]  # themselves, if they are float32
        torch._foreach_lerp_(momenta, gradients, 1 - _MOMENTUM)
        if self.moments != torch.float32:
            torch._foreach_copy_(kept, momenta)
        updates = list(torch._foreach_lerp(gradients, momenta, _MOMENTUM))  # Nesterov
        rows, columns = parameters[0].shape[-2:]
        scale = max(rows, columns) ** 0.5
        if len(updates) == 1:
            updates = [orthogonalise(updates[0])]
        else:
            stacked = orthogonalise(torch.cat([update.reshape(-1, rows, columns) for update in updates]))
            pieces = stacked.split([update[..., 0, 0].numel() for update in updates])
            updates = [piece.view_as(update) for piece, update in zip(pieces, updates, strict=True)]
        torch._foreach_mul_(parameters, 1 - rate * weight_decay)
        if isinstance(rate, Tensor):
            torch._foreach_mul_(updates, rate * (-0.2 * scale))
            torch._foreach_add_(parameters, updates)
        else:
            torch._foreach_add_(parameters, updates, alpha=-rate * 0.2 * scale)


def _alike(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Parameters to orthogonalise at once. On a GPU those whose matrices have one shape: launching the products of
    small ones one by one takes longer than the products. On a CPU each alone."""
    if not parameters or not shapes.fixed(parameters[0]):
        return [[parameter] for parameter in parameters]
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        by_shape.setdefault(parameter.shape[-2:], []).append(parameter)
    return [part for alike in by_shape.values() for part in portions(alike)]
