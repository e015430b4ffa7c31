"""Decoding on a GPU by CUDA graphs: a step of few tokens a sequence is launched as one, not operator by operator.

A graph is recorded for each size of batch and context that comes up, both rounded up to powers of two; what is over is
padding, which writes to a page that nobody reads. Drawing the tokens is a graph of its own, with all that it needs to
know in one copy from the host, and one back. Only in bf16: the grouped product of float32 asks the host for its
sizes, which a graph cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teacher.cache import LatentCache
from teacher.model import DeepseekV3
from teacher.runner import TorchRunner
from teacher.sampling import Settings, sample_likely
from teacher.slots import Slots

_MOST_NEW = 8  # tokens a sequence; longer ones are prefill, which keeps the device busy by itself


class GraphRunner(TorchRunner):
    """See TorchRunner."""

    name = "torch with CUDA graphs"

    def __init__(self, model: DeepseekV3, cache: LatentCache, kernels: bool = False) -> None:
        super().__init__(model, cache, kernels)
        self._graphs: dict[tuple[str, int, int, int], _Graph] = {}
        self._draws: dict[int, _Draw] = {}
        # One for all recordings: they run one after the other, and what one leaves is copied before the next.
        self._memory = torch.cuda.graph_pool_handle()

    def extend(self, tokens_BT: Tensor, position_BT: Tensor, table_BP: Tensor, fresh: bool = False) -> Tensor:
        if tokens_BT.shape[1] > _MOST_NEW:
            return super().extend(tokens_BT, position_BT, table_BP, fresh)
        return self._replay("main", super().extend, tokens_BT, position_BT, table_BP)

    def extend_draft(
        self, tokens_BT: Tensor, position_BT: Tensor, table_BP: Tensor, hidden_BTH: Tensor, first_B1: Tensor,
        fresh: bool = False,
    ) -> Tensor:  # fmt: skip
        if tokens_BT.shape[1] > _MOST_NEW:
            return super().extend_draft(tokens_BT, position_BT, table_BP, hidden_BTH, first_B1, fresh)
        return self._replay("draft", super().extend_draft, tokens_BT, position_BT, table_BP, hidden_BTH, first_B1)

    @torch.inference_mode()
    def draw(self, logits_MV: Tensor, slots: Slots, slot_M: np.ndarray, counter_M: np.ndarray) -> np.ndarray:
        if not (slots.temperature_S[slot_M] > 0).any():
            return logits_MV.argmax(-1).cpu().numpy()
        rows = _power_of_two(len(slot_M))
        if rows not in self._draws:
            self._draws[rows] = _Draw(rows, logits_MV, self._memory)
        drawn_M, sure_M = self._draws[rows].replay(logits_MV, slots, slot_M, counter_M)
        return drawn_M if sure_M.all() else super().draw(logits_MV, slots, slot_M, counter_M)

    def _replay(self, name: str, work: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        rows, new, pages = inputs[0].shape[0], inputs[0].shape[1], inputs[2].shape[1]
        key = name, _power_of_two(rows), new, _power_of_two(pages)
        if key not in self._graphs:
            self._graphs[key] = _Graph(work, key[1], key[3], inputs, self._memory)
        # A copy: the graph's own output is overwritten by the next replay.
        return self._graphs[key].replay(inputs)[:rows].clone()


class _Graph:
    """One recording of the model, with the inputs and the output that it reads and writes."""

    def __init__(
        self, work: Callable[..., Tensor], rows: int, pages: int, like: tuple[Tensor, ...], memory: Any
    ) -> None:
        self._inputs = [x.new_zeros(rows, *x.shape[1:]) for x in like]
        self._inputs[2] = like[2].new_zeros(rows, pages)
        self._inputs[1].fill_(-1)  # all padding: recording leaves no trace in the cache
        self._graph, self._output = _record(lambda: work(*self._inputs), memory)

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


class _Draw:
    """One recording of the sampler: the settings of M rows go in as a matrix of eight-byte words."""

    def __init__(self, rows: int, like_MV: Tensor, memory: Any) -> None:
        self._logits_MV = like_MV.new_zeros(rows, like_MV.shape[1])
        self._words_6M = torch.zeros(6, rows, dtype=torch.int64, device=like_MV.device)
        self._host_6M = torch.zeros(6, rows, dtype=torch.int64, pin_memory=True)
        self._graph, self._output_2M = _record(self._draw, memory)

    def _draw(self) -> Tensor:
        temperature_M, top_p_M, min_p_M = self._words_6M[:3].view(torch.float64).float()
        top_k_M, seed_M, counter_M = self._words_6M[3:]
        settings = Settings(temperature_M, top_p_M, top_k_M, min_p_M, seed_M)
        drawn_M, sure_M = sample_likely(self._logits_MV, settings, counter_M)
        return torch.stack((drawn_M, sure_M.long()))

    def replay(
        self, logits_MV: Tensor, slots: Slots, slot_M: np.ndarray, counter_M: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, and which of them are sure."""
        rows, words_6M = len(slot_M), self._host_6M.numpy()
        words_6M[:, rows:] = 0  # temperature 0: sure of its token
        for row, values_S in enumerate((slots.temperature_S, slots.top_p_S, slots.min_p_S)):
            words_6M[row, :rows] = values_S[slot_M].astype(np.float64).view(np.int64)
        words_6M[3, :rows], words_6M[4, :rows], words_6M[5, :rows] = (
            slots.top_k_S[slot_M], slots.seed_S[slot_M], counter_M,
        )  # fmt: skip
        self._words_6M.copy_(self._host_6M, non_blocking=True)
        self._logits_MV[:rows].copy_(logits_MV)
        self._graph.replay()
        drawn_2M = self._output_2M[:, :rows].cpu().numpy()  # waits, so the words may be written again
        return drawn_2M[0], drawn_2M[1] > 0


def _record(work: Callable[[], Tensor], memory: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # libraries set themselves up on the first calls, which must not be recorded
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory):
        output = work()
    return graph, output


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
