"""Decoding on a GPU by CUDA graphs: a step of few tokens a sequence is launched as one, not operator by operator.

A graph is recorded for each size of batch and context that comes up, both rounded up to powers of two; what is over is
padding, which writes to a page that nobody reads. Only in bf16: the grouped product of float32 asks the host for its
sizes, which a graph cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from teacher.cache import LatentCache
from teacher.model import DeepseekV3
from teacher.runner import TorchRunner

_MOST_NEW = 8  # tokens a sequence; longer ones are prefill, which keeps the device busy by itself


class GraphRunner(TorchRunner):
    """See TorchRunner."""

    name = "torch with CUDA graphs"

    def __init__(self, model: DeepseekV3, cache: LatentCache, kernels: bool = False) -> None:
        super().__init__(model, cache, kernels)
        self._graphs: dict[tuple[str, int, int, int], _Graph] = {}
        # One for all recordings: they run one after the other, and what one leaves is copied before the next.
        self._memory = torch.cuda.graph_pool_handle()

    def extend(self, tokens_BT: Tensor, position_BT: Tensor, table_BP: Tensor) -> Tensor:
        if tokens_BT.shape[1] > _MOST_NEW:
            return super().extend(tokens_BT, position_BT, table_BP)
        return self._replay("main", super().extend, tokens_BT, position_BT, table_BP)

    def extend_draft(
        self, tokens_BT: Tensor, position_BT: Tensor, table_BP: Tensor, hidden_BTH: Tensor, first_B1: Tensor
    ) -> Tensor:
        if tokens_BT.shape[1] > _MOST_NEW:
            return super().extend_draft(tokens_BT, position_BT, table_BP, hidden_BTH, first_B1)
        return self._replay("draft", super().extend_draft, tokens_BT, position_BT, table_BP, hidden_BTH, first_B1)

    def _replay(self, name: str, work: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        rows, new, pages = inputs[0].shape[0], inputs[0].shape[1], inputs[2].shape[1]
        key = name, _power_of_two(rows), new, _power_of_two(pages)
        if key not in self._graphs:
            self._graphs[key] = _Graph(work, key[1], key[3], inputs, self._memory)
        # A copy: the graph's own output is overwritten by the next replay.
        return self._graphs[key].replay(inputs)[:rows].clone()


class _Graph:
    """One recording, with the inputs and the output that it reads and writes."""

    def __init__(
        self, work: Callable[..., Tensor], rows: int, pages: int, like: tuple[Tensor, ...], memory: Any
    ) -> None:
        self._inputs = [x.new_zeros(rows, *x.shape[1:]) for x in like]
        self._inputs[2] = like[2].new_zeros(rows, pages)
        self._inputs[1].fill_(-1)  # all padding: recording leaves no trace in the cache
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries set themselves up on the first calls, which must not be recorded
                work(*self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=memory):
            self._output = work(*self._inputs)

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The output for these inputs, whose rows and pages may be fewer than the recording's."""
        rows, pages = inputs[2].shape
        for own, given in zip(self._inputs, inputs, strict=True):
            own[:rows, : given.shape[1]].copy_(given)
        # Rows that are not used now must write nowhere, and no row's table may go on with what an earlier one left.
        self._inputs[1][rows:].fill_(-1)
        self._inputs[2][:, pages:].zero_()
        self._graph.replay()
        return self._output


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
