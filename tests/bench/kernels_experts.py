"""Quantisation, the grouped FP8 product and the whole expert layer, for tests.bench.kernels."""

from __future__ import annotations

from collections.abc import Iterator

from tests.bench.kernels_timing import Bench, Check, Row


def checks(bench: Bench) -> Iterator[Check]:
    yield from ()


def rows(bench: Bench) -> Iterator[Row]:
    yield from ()
