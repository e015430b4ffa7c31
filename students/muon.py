"""Muon for the weight matrices of a dense model, AdamW for embeddings, head and norms, as one optimizer.

Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024); scaled to AdamW's update size as in
"Muon is scalable for LLM training" (arXiv 2502.16982), so that both parts share one learning rate. It needs fewer
tokens than AdamW: docs/tiny-models.md has the trials.
"""

from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """torch.optim.Muon and torch.optim.AdamW behind one face, for schedulers and for accelerate."""

    def __init__(self, model: Any, *, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        head = model.get_output_embeddings()
        embeddings |= {id(head.weight)} if head is not None else set()
        trained = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.dim() == 2 and id(p) not in embeddings]
        others = [p for p in trained if p.dim() != 2 or id(p) in embeddings]
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=0.0, fused=True),
        ]
        super().__init__([{"params": trained}], {"lr": lr})
        self._share_groups()

    def _share_groups(self) -> None:
        """A scheduler that sets a rate in our groups sets it in the parts'."""
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for part in self._parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()
