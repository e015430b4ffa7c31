"""Learning-rate schedules, as a factor on the peak rate.

    constant     1
    cosine       from 1 down to a tenth, as DeepSeek-R1's distilled models were trained (arXiv 2501.12948)
    multi_step   1, then 31.6% after 80% and 10% after 90% of the steps (DeepSeek LLM, arXiv 2401.02954, sec. 2.3):
                 as good at the end as cosine, and a longer run can start from a shorter one's first phase

All rise linearly over the warm-up first. The very first step already has a rate above zero, so none is wasted.
"""

import math
from typing import Literal

import torch

Schedule = Literal["multi_step", "cosine", "constant"]


def lr_factor(schedule: Schedule, step: int, total_steps: int, warmup_fraction: float) -> float:
    """Factor on the peak learning rate at `step`, counted from 0, of `total_steps`."""
    warmup_steps = round(total_steps * warmup_fraction)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    if schedule == "multi_step":
        # In whole numbers: 0.8 * total is not exact, and the drop would come a step late for some totals.
        if 10 * step >= 9 * total_steps:
            return 0.1
        return 0.316 if 10 * step >= 8 * total_steps else 1.0
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    raise ValueError(f"schedule: {schedule!r} is not known; expected multi_step, cosine or constant")


def lr_scheduler(
    optimizer: torch.optim.Optimizer, schedule: Schedule, total_steps: int, warmup_fraction: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule over `total_steps` optimizer steps; the optimizer's own rate is the peak."""
    lr_factor(schedule, 0, total_steps, warmup_fraction)  # a bad name fails here, not in the middle of a run
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(schedule, step, total_steps, warmup_fraction)
    )
