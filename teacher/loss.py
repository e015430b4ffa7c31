"""Cross entropy of the main head and of multi-token prediction.

Legend: B rows, T positions, N positions with a loss, D hidden size, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from teacher import shapes
from teacher.batches import IGNORE

CHUNK_LOGITS = 1 << 24  # most logits held at a time (64 MB in float32)


class _HeadLoss(torch.autograd.Function):
    """Sum of cross entropies of softmax(hidden @ weight.T), a chunk of positions at a time.

    The gradient is taken in the forward pass while a chunk's logits are there, so neither the logits of the whole
    batch nor their softmax are ever stored; backward only scales it. Positions without a target add nothing; they
    are only looked for where they may be among the others.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        low = torch.get_autocast_dtype(hidden_ND.device.type) if _autocast(hidden_ND) else hidden_ND.dtype
        low_weight_VD = weight_VD.to(low)
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        best_N = torch.empty_like(targets_N)
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        step = max(1, CHUNK_LOGITS // weight_VD.shape[0])
        masked = shapes.fixed(hidden_ND)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for begin in range(0, len(hidden_ND), step):
                part = slice(begin, begin + step)
                hidden, targets = hidden_ND[part].to(low), targets_N[part]
                logits = (hidden @ low_weight_VD.T).float()
                best_N[part] = logits.argmax(-1)
                log_p = F.log_softmax(logits, dim=-1)
                total += F.nll_loss(log_p, targets, reduction="sum")
                grad = log_p.exp_()
                if masked:
                    kept_N1 = (targets != IGNORE).unsqueeze(1)
                    grad.scatter_add_(1, targets.clamp(min=0).unsqueeze(1), -kept_N1.to(grad.dtype)).mul_(kept_N1)
                else:
                    grad[torch.arange(len(targets), device=targets.device), targets] -= 1.0
                grad = grad.to(low)
                grad_hidden_ND[part] = (grad @ low_weight_VD).to(hidden_ND.dtype)
                grad_weight_VD += (grad.T @ hidden).float()
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype))
        ctx.mark_non_differentiable(best_N)
        return total, best_N

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        return grad_hidden_ND * grad_total, grad_weight_VD * grad_total, None


def _autocast(x: torch.Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def head_loss(hidden_BTD: torch.Tensor, head: nn.Linear, targets_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of cross entropies, float32 scalar; best_BT, int64: the head's first choice at each position with a loss).

    best_BT is IGNORE where the target is. On a CPU such positions are not put through the head.
    """
    if shapes.fixed(hidden_BTD):
        total, best_N = _HeadLoss.apply(hidden_BTD.flatten(0, 1), head.weight, targets_BT.flatten())
        return total, best_N.view_as(targets_BT).masked_fill(targets_BT == IGNORE, IGNORE)
    keep_N = (targets_BT.flatten() != IGNORE).nonzero().squeeze(1)
    hidden_ND = hidden_BTD.flatten(0, 1)[keep_N]
    total, best_N = _HeadLoss.apply(hidden_ND, head.weight, targets_BT.flatten()[keep_N])
    best_BT = torch.full_like(targets_BT, IGNORE)
    best_BT.view(-1)[keep_N] = best_N
    return total, best_BT
