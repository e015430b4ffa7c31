"""Decoding on a GPU by CUDA graphs: a step of few tokens a sequence is launched as one, not operator by operator.

A graph is recorded for each size of batch and context that comes up, both rounded up to powers of two; what is over is
padding, which writes to a page that nobody reads. A round of decoding is one of them, with its draws and its drafts
(teacher/rounds.py). Where that cannot be (log-probabilities are wanted, a draw is not sure) a graph holds the layers
and the output layer, with what the host has to say (tokens, positions, pages) in one copy from pinned memory, and
drawing the tokens is a graph of its own, with one copy from the host and one back. Only in bf16: the grouped product of
float32 asks the host for its sizes, which a graph cannot.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teacher.cache import LatentCache
from teacher.decoding import settle
from teacher.kernels.arguments import obstacle
from teacher.model import DeepseekV3
from teacher.rounds import Drafts, Round, Shape, draw
from teacher.runner import Batch, TorchRunner, _index
from teacher.sampling import CANDIDATES, Settings
from teacher.slots import Slots

# Tokens a sequence; longer ones are prefill, which keeps the device busy by itself, but for the shortest prompts.
_MOST_NEW = 8


class GraphRunner(TorchRunner):
    """See TorchRunner."""

    name = "torch with CUDA graphs"

    def __init__(self, model: DeepseekV3, cache: LatentCache, kernels: bool = False) -> None:
        super().__init__(model, cache, kernels)
        self._graphs: dict[tuple[bool, int, int, int], _Graph] = {}
        self._draws: dict[int, _Draw] = {}
        self._rounds: dict[Shape, Round] = {}
        self._drafts: dict[Shape, Drafts] = {}
        # Logits and hidden states by kind and tokens of a recording: a draft leaves those of the model alone.
        self._results: dict[tuple[bool, int], tuple[Tensor, Tensor]] = {}
        # One for all recordings: they run one after the other, and what one leaves is read before the next.
        self._memory = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    @torch.inference_mode()
    def forward(self, batch: Batch, wanted_M: np.ndarray) -> tuple[Tensor, Tensor]:
        """As TorchRunner's; the results of few tokens are good until the next `forward`."""
        if (new := self._new(batch)) is None:
            return super().forward(batch, wanted_M)
        return self._graph(batch, new, draft=False).replay(batch, wanted_M)

    @torch.inference_mode()
    def draft(
        self, hidden_NH: Tensor, batch: Batch, first_B: np.ndarray, wanted_M: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """As TorchRunner's; the results of few tokens are good until the next `draft`."""
        if (new := self._new(batch)) is None:
            return super().draft(hidden_NH, batch, first_B, wanted_M)
        return self._graph(batch, new, draft=True).replay(batch, wanted_M, hidden_NH, first_B)

    def _new(self, batch: Batch) -> int | None:
        """Tokens a sequence of the recording that runs this batch; None: it is run operator by operator."""
        new = int(batch.count_B.max())
        if new <= _MOST_NEW:
            return new
        new = _power_of_two(new)
        return new if self._few(_power_of_two(len(batch.slot_B)) * new) else None

    def _graph(self, batch: Batch, new: int, draft: bool) -> _Graph:
        pages = int(batch.position_N.max()) // self.cache.page_size + 1
        rows = _power_of_two(len(batch.slot_B))
        key = draft, rows, new, _power_of_two(pages)
        if key not in self._graphs:
            self._graphs[key] = _Graph(self, *key, *self._room(draft, rows * new))
        return self._graphs[key]

    def _room(self, draft: bool, tokens: int) -> tuple[Tensor, Tensor]:
        """Where logits and hidden states of so many tokens go."""
        if (draft, tokens) not in self._results:
            logits_MV, hidden_NH = (
                torch.empty(tokens, size, dtype=self.model.lm_head.weight.dtype, device=self.device)
                for size in (self.model.config.vocab_size, self.model.config.hidden_size)
            )
            self._results[draft, tokens] = logits_MV, hidden_NH
        return self._results[draft, tokens]

    @torch.inference_mode()
    def round(self, slots: Slots, rows_B: np.ndarray, drafts: int) -> np.ndarray | None:
        if drafts >= _MOST_NEW or (drafts and self._unsure(slots, rows_B)):
            return None
        shape = self._shape(slots, rows_B, 1 + drafts, drafts, 2 * drafts)
        if shape not in self._rounds:
            self._rounds[shape] = Round(self, shape, *self._room(False, shape.rows * shape.new), _record, self._memory)
        recording, rows = self._rounds[shape], len(rows_B)
        waiting_B = np.minimum(slots.drafts_S[rows_B], slots.limit_S[rows_B] - slots.length_S[rows_B] - 1)
        waiting_B = np.minimum(waiting_B, drafts)
        found = recording.replay(slots, rows_B, waiting_B)
        (drawn_BT, sure_BT), kept_B = found["drawn"], found["kept"].copy()
        if drafts == 0:
            kept_B = np.ones_like(rows_B)
            if not sure_BT.all():
                counter_B = slots.length_S[rows_B] - slots.prompt_S[rows_B]
                drawn_BT = super().draw(recording.logits_MV[:rows], slots, rows_B, counter_B)[:, None]
        elif not kept_B.all():
            return None
        drafted = found["drafted"][:, 0].T if drafts else None
        settle(slots, rows_B, waiting_B, kept_B, drawn_BT, drafted)
        return kept_B

    @torch.inference_mode()
    def drafts(self, hidden_BH: Tensor, slots: Slots, rows_B: np.ndarray, drafts: int) -> np.ndarray | None:
        shape = self._shape(slots, rows_B, 1, drafts, drafts)
        if shape not in self._drafts:
            self._drafts[shape] = Drafts(self, shape, _record, self._memory)
        return self._drafts[shape].replay(slots, rows_B, hidden_BH)

    def _shape(self, slots: Slots, rows_B: np.ndarray, new: int, drafts: int, further: int) -> Shape:
        """Of a recording for these sequences, which look at positions up to `further` behind the newest token."""
        most = slots.tokens_SW.shape[1] - 1
        longest = min(int(slots.length_S[rows_B].max()) - 1 + further, most)
        pages = _power_of_two(longest // self.cache.page_size + 1)
        stops = _power_of_two(slots.stop_SN.shape[1]) if drafts else 1
        return Shape(_power_of_two(len(rows_B)), new, drafts, pages, stops, most)

    def _unsure(self, slots: Slots, rows_B: np.ndarray) -> bool:
        """Whether some sequence has no limit that its likeliest tokens could reach: its round would be void."""
        most = 2 * CANDIDATES
        if obstacle(self.device) is None:
            from teacher.kernels.draw import WHOLE as most
        if self.model.config.vocab_size <= most:
            return False
        wide_B = (slots.top_k_S[rows_B] == 0) & (slots.top_p_S[rows_B] >= 1) & (slots.min_p_S[rows_B] == 0)
        wide_B |= slots.top_k_S[rows_B] > CANDIDATES
        return bool((wide_B & (slots.temperature_S[rows_B] > 0)).any())


class _Graph:
    """One recording of the model and its output layer, or of the draft module, for R rows of T tokens and P pages.

    Logits (R T, V) and hidden states (R T, H) are written to what it was given, whatever else is recorded or replayed.
    """

    def __init__(
        self, runner: GraphRunner, draft: bool, rows: int, new: int, pages: int, logits_MV: Tensor, hidden_NH: Tensor
    ) -> None:
        self._shape, self._logits_MV, self._hidden_NH = (rows, new, pages), logits_MV, hidden_NH
        device = runner.device
        words = rows * (2 * new + pages + draft)
        self._host = torch.zeros(words, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.zeros(words, dtype=torch.int64, device=device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        tokens_BT, position_BT, table_BP, first_B1 = self._parts(self._device)
        position_BT.fill_(-1)  # all padding: recording leaves no trace in the cache
        # Of the tokens before: what the draft module goes on from.
        self._given_NH = torch.zeros_like(hidden_NH) if draft else None
        model = runner.model

        def work() -> None:
            if self._given_NH is None:
                out_BTH = TorchRunner.extend(runner, tokens_BT, position_BT, table_BP)
                normed_NH = out_BTH.flatten(0, 1)
            else:
                given_BTH = self._given_NH.unflatten(0, (rows, new))
                out_BTH = TorchRunner.extend_draft(runner, tokens_BT, position_BT, table_BP, given_BTH, first_B1)
                normed_NH = model.mtp_layers[0].shared_head.norm(out_BTH.flatten(0, 1))
            hidden_NH.copy_(out_BTH.flatten(0, 1))
            torch.mm(normed_NH, model.lm_head.weight.t(), out=logits_MV)

        self._recorded = _record(work, runner._memory)

    def _parts(self, words: Any) -> tuple[Any, Any, Any, Any]:
        """Tokens (R, T), positions (R, T), tables (R, P) and first positions (R, 1 or 0) of the words, as views."""
        rows, new, pages = self._shape
        tokens, positions, rest = words[: rows * new], words[rows * new : 2 * rows * new], words[2 * rows * new :]
        table, first = rest[: rows * pages], rest[rows * pages :]
        return (
            tokens.reshape(rows, new), positions.reshape(rows, new), table.reshape(rows, pages),
            first.reshape(rows, len(first) // rows),
        )  # fmt: skip

    def replay(
        self, batch: Batch, wanted_M: np.ndarray, given_NH: Tensor | None = None, first_B: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits (M, V) of the tokens wanted, and hidden states (N, H), of a batch that is no larger than recorded."""
        rows, new, device = len(batch.slot_B), self._shape[1], self._device.device
        if self._copied is not None:
            self._copied.synchronize()  # the last copy may still wait behind other work
        tokens_BT, position_BT, table_BP, first_B1 = self._parts(self._host.numpy())
        # Rows that are not used now must write nowhere, and no table may go on with what an earlier one left.
        tokens_BT[:], position_BT[:], table_BP[:] = 0, -1, 0
        real_BT = np.arange(new) < batch.count_B[:, None]
        tokens_BT[:rows][real_BT], position_BT[:rows][real_BT] = batch.tokens_N, batch.position_N
        pages = min(table_BP.shape[1], batch.table_SP.shape[1])
        table_BP[:rows, :pages] = batch.table_SP[batch.slot_B, :pages]
        if first_B is not None:
            first_B1[:], first_B1[:rows, 0] = 0, first_B
        self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        at_N = None if real_BT.all() else _index(np.flatnonzero(real_BT), device)
        if given_NH is not None:
            assert self._given_NH is not None
            if at_N is None:
                self._given_NH[: len(given_NH)].copy_(given_NH)
            else:
                self._given_NH.index_copy_(0, at_N, given_NH)
        self._recorded.replay()
        if at_N is None and len(wanted_M) == rows * new and (wanted_M == np.arange(rows * new)).all():
            return self._logits_MV[: rows * new], self._hidden_NH[: rows * new]
        hidden_NH = self._hidden_NH[: rows * new] if at_N is None else self._hidden_NH.index_select(0, at_N)
        wanted = np.flatnonzero(real_BT)[wanted_M]
        return self._logits_MV.index_select(0, _index(wanted, device)), hidden_NH


class _Draw:
    """One recording of the sampler: the settings of M rows go in as a matrix of eight-byte words."""

    def __init__(self, rows: int, like_MV: Tensor, memory: Any) -> None:
        self._logits_MV = like_MV.new_zeros(rows, like_MV.shape[1])
        self._words_6M = torch.zeros(6, rows, dtype=torch.int64, device=like_MV.device)
        self._host_6M = torch.zeros(6, rows, dtype=torch.int64, pin_memory=like_MV.is_cuda)
        self._output_2M = torch.zeros(2, rows, dtype=torch.int64, device=like_MV.device)
        self._graph = _record(self._draw, memory)

    def _draw(self) -> None:
        temperature_M, top_p_M, min_p_M = self._words_6M[:3].view(torch.float64).float()
        top_k_M, seed_M, counter_M = self._words_6M[3:]
        settings = Settings(temperature_M, top_p_M, top_k_M, min_p_M, seed_M)
        draw(self._logits_MV, settings, counter_M, self._output_2M)

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


def _record(work: Callable[[], Any], memory: Any) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # libraries set themselves up on the first calls, which must not be recorded
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # A collector that frees another engine's recordings meanwhile would make this one void.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=memory):
            work()
    finally:
        if collecting:
            gc.enable()
    return graph


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
