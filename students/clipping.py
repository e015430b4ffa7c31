"""The gradient clipped to a largest norm; on one GPU in the pass over it that AdamW makes anyway.

Clipping by itself reads and writes every gradient once more: 12 GB for 1.5B parameters. torch's fused AdamW divides
gradients by a scale that lies on the device (GradScaler's way in), and writes them back as it used them.
"""

from typing import Any

import torch
from torch import Tensor, nn


def clip(accelerator: Any, model: nn.Module, optimizer: Any, largest: float) -> Tensor:
    """The gradient's norm before clipping, float32 scalar on its device; `optimizer.step()` then steps by the clipped
    gradient. `optimizer` is as accelerate prepared it."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if accelerator.device.type == "cuda" and takes_scale(model, inner):
        return scale(model, inner, largest)
    norm: Any = accelerator.clip_grad_norm_(model.parameters(), largest)
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of shards
    return whole


def takes_scale(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether `optimizer` is torch's fused AdamW over gradients of one whole piece each (not FSDP's)."""
    if type(optimizer) is not torch.optim.AdamW or not optimizer.defaults["fused"]:
        return False
    return not any(hasattr(p, "full_tensor") for p in model.parameters()) and not hasattr(model, "clip_grad_norm_")


def scale(model: nn.Module, optimizer: Any, largest: float) -> Tensor:
    """Have the next step divide by what clip_grad_norm_ would multiply by; returns the norm."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.grad_scale = ((norm + 1e-6) / largest).clamp(min=1.0)
    return norm
