"""What the grouped products are given."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Fp8(NamedTuple):
    """Values and scales: rows (R, K) with (R, k), or a stack of matrices (E, N, K) with (E, n, k)."""

    values: Tensor
    scales: Tensor


class Groups(NamedTuple):
    """Which rows are an expert's: count_E rows from start_E on, both int32, on the device."""

    start_E: Tensor
    count_E: Tensor
