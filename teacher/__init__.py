"""An R1-style teacher: the DeepSeek-V3 architecture, its checkpoints, its engine.

`load_model(folder)` reads a checkpoint, `load_model(DeepseekV3Config(...))` draws fresh weights;
`model(input_ids).logits` then is what transformers' DeepseekV3ForCausalLM gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from teacher.config import DeepseekV3Config
    from teacher.model import DeepseekV3

__all__ = ["load_model"]


def load_model(
    source: str | Path | DeepseekV3Config,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    experts: Literal["fp8"] | None = None,
    weights: Literal["fp8"] | None = None,
) -> DeepseekV3:
    """Load a checkpoint folder, or build a model with fresh weights from a config (an object or a .json file).

    `dtype` defaults to the dtype of the checkpoint (fp32 for fresh weights); block-FP8 matrices become that of the
    embedding beside them, bf16 in DeepSeek's. Weights go straight from the mapped files to their place on `device`;
    on "meta" none are read. `experts="fp8"` keeps the routed experts in FP8 (a checkpoint's own values and scales where
    it has them), for inference: by Triton's kernels on a Hopper GPU (docs/kernels.md), elsewhere slowly in torch;
    `weights="fp8"` keeps with them attention's projections (but kv_b_proj) and the dense and shared feed-forward.
    Raises ValueError naming what is wrong with the folder, its file and its tensor. torch is
    imported only here, so that `import teacher` costs nothing.
    """
    from teacher.checkpoint_read import load_checkpoint

    return load_checkpoint(source, dtype, device, experts, weights)
