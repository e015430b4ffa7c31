"""What one micro-batch adds to a step: next-token loss, multi-token-prediction loss, balance loss, and their figures.

L = mean CE + lambda / D * sum over depths of mean CE of the k-th MTP module (DeepSeek-V3 eq. 24-25)
    + alpha * mean over examples of the sequence-wise balance loss (eq. 17), each mean over the whole step:
so losses are sums here, divided by the step's counts, and gradients of micro-batches simply add up.

Legend: B rows, T positions, D hidden size.
"""

from dataclasses import dataclass

import torch

from teacher.balance import LoadBalance
from teacher.batches import IGNORE, MicroBatch, StepBatch, ahead
from teacher.loss import head_loss
from teacher.model import DeepseekV3


@dataclass(frozen=True)
class Objective:
    """Weights of the parts; a part of weight 0 is not computed."""

    mtp_weight: float
    balance_loss: float
    bf16: bool

    def __call__(
        self, model: DeepseekV3, balance: LoadBalance, micro: MicroBatch, step: StepBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """This micro-batch's part of the step's loss, with gradient, and of the step's figures for the log.

        Both are to be summed over the micro-batches of the step. Counts the expert loads. `accuracy` is teacher-forced
        top-1; `mtp_acceptance` is how often the first MTP module's first choice is the main head's one position on,
        that is, how often a greedy draft would be accepted.
        """
        segments_BT, targets_BT = micro.segment_ids_BT, micro.targets_BT
        counts = [max(1, n) for n in step.losses]
        with torch.autocast(segments_BT.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            out = model(micro.input_ids_BT, micro.position_ids_BT, segments_BT, mtp=self.mtp_weight > 0, logits=False)
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
                if depth == 1:
                    agreed = (mtp_best_BT == best_BT[:, 1:]) & (mtp_targets_BT != IGNORE)
                    figures["mtp_acceptance"] = agreed.sum() / counts[1]
        balance.count(out.routing, segments_BT)
        if self.balance_loss > 0:
            share = balance.sequence_loss(out.routing, segments_BT) / len(step.indices)
            loss = loss + self.balance_loss * share
            figures["balance_loss"] = share.detach()
        return loss, figures
