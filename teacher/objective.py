"""What one micro-batch adds to a step: next-token loss, multi-token-prediction loss, balance loss, and their figures.

L = mean CE + lambda / D * sum over depths of mean CE of the k-th MTP module (DeepSeek-V3 eq. 24-25)
    + alpha * mean over examples of the sequence-wise balance loss (eq. 17), summed over layers.

Each mean is over the whole step: so losses are sums here, divided by the step's counts, and gradients of micro-batches
simply add up.

Legend: B rows, T positions, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from teacher.balance import LoadBalance
from teacher.batches import IGNORE, MicroBatch, ahead
from teacher.loss import head_loss
from teacher.model import DeepseekV3


@dataclass
class Part:
    """What a micro-batch adds to its step; parts of a step add up to the step's own."""

    figures: dict[str, torch.Tensor]  # for the log
    loads_LE: torch.Tensor  # of the experts, for the balance
    gradients: tuple[torch.Tensor | None, ...] = ()  # of the `trained` parameters, in their order

    def add(self, other: "Part") -> None:
        """Add a later part. The order of additions is the caller's, so that a step is the same to the bit each time."""
        self.figures = {name: self.figures[name] + figure for name, figure in other.figures.items()}
        self.loads_LE = self.loads_LE + other.loads_LE
        mine = [g for g in self.gradients if g is not None]
        torch._foreach_add_(mine, [g for g in other.gradients if g is not None])


class Counts(Protocol):
    """What the sums of a step are divided by: a StepBatch, or (in a recorded step) numbers on the device."""

    @property
    def losses(self) -> Sequence[int | torch.Tensor]: ...

    @property
    def examples(self) -> int | torch.Tensor: ...


def trained(model: DeepseekV3) -> list[nn.Parameter]:
    """The parameters that are not frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@dataclass(frozen=True)
class Objective:
    """Weights of the parts; a part of weight 0 is not computed."""

    mtp_weight: float
    balance_loss: float
    bf16: bool
    mtp_recursion: int = 0
    """Depths beyond the model's MTP modules, which the last one predicts from its own output."""

    def part(self, model: DeepseekV3, balance: LoadBalance, micro: MicroBatch, step: Counts) -> Part:
        """Forward and backward of one micro-batch. Nothing in the model changes: several threads may do it at once."""
        loss, part = self.loss(model, balance, micro, step)
        part.gradients = torch.autograd.grad(loss, trained(model), allow_unused=True)
        return part

    def loss(
        self, model: DeepseekV3, balance: LoadBalance, micro: MicroBatch, step: Counts
    ) -> tuple[torch.Tensor, Part]:
        """This micro-batch's share of the step's loss, with gradient, and the rest of its part.

        `accuracy` is teacher-forced top-1; `mtp_acceptance` is how often the first MTP module's first choice is the
        main head's one position on, that is, how often a greedy draft would be accepted; `mtp_acceptance_2` is the
        second depth's two positions on, after the true tokens before, and so on.
        """
        segments_BT, targets_BT = micro.segment_ids_BT, micro.targets_BT
        counts = [max(1, n) if isinstance(n, int) else n for n in step.losses]
        device = segments_BT.device.type
        # No cache of cast weights: it is shared by all threads, and each weight is used once.
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            depths = len(model.mtp_layers) + self.mtp_recursion if self.mtp_weight > 0 else 0
            out = model(micro.input_ids_BT, micro.position_ids_BT, segments_BT, mtp=depths, logits=False)
            total, best_BT = head_loss(out.hidden, model.lm_head, targets_BT)
            loss = total / counts[0]
            figures = {
                "loss": loss.detach(),
                "accuracy": ((best_BT == targets_BT) & (targets_BT != IGNORE)).sum() / counts[0],
            }
            for depth, hidden_BTD in enumerate(out.mtp_hidden, start=1):
                mtp_targets_BT = ahead(targets_BT, segments_BT, depth, IGNORE)[:, :-depth]
                mtp_total, mtp_best_BT = head_loss(hidden_BTD, model.lm_head, mtp_targets_BT)
                mtp_loss = mtp_total / counts[depth] / len(out.mtp_hidden)
                loss = loss + self.mtp_weight * mtp_loss
                figures["mtp_loss"] = figures.get("mtp_loss", 0.0) + mtp_loss.detach()
                agreed = (mtp_best_BT == best_BT[:, depth:]) & (mtp_targets_BT != IGNORE)
                figures["mtp_acceptance" + (f"_{depth}" if depth > 1 else "")] = agreed.sum() / counts[depth]
        if self.balance_loss > 0:
            share = balance.sequence_loss(out.routing, segments_BT) / step.examples
            loss = loss + self.balance_loss * share
            figures["balance_loss"] = share.detach() / max(1, len(out.routing))  # a layer's: 1 is balance
        return loss, Part(figures, balance.loads(out.routing, segments_BT))
