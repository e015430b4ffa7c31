"""The engine's step on a CPU in one call to C: `TorchRunner` for float32 models of laptop size.

At batch 1 operators of torch take ten times as long to launch as to run on a model of this size, and at batch 256 half
of the time goes to small element-wise ones and to gathering pages; step.c does neither.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teacher.cache import LatentCache
from teacher.fp8 import FP8
from teacher.model import DeepseekV3
from teacher.native.build import build, set_blas_threads, sgemm
from teacher.native.pack import Packed, absorbed_parameters, sizes
from teacher.runner import Batch
from teacher.slots import Slots

# Rows of a call: with more, what lies between two products outgrows the second-level cache (256 take 1.2 times as long
# a row as 64 to 128, for tiny-r1).
_MOST_ROWS = 128
_MOST_BYTES = 2 * 1024**3  # of packed weights, which lie beside the model's own

_ARRAYS = (
    "tokens_SW", "table_SP", "draft_SG", "length_S", "prompt_S", "limit_S", "cached_S", "drafts_S", "drafted_from_S",
    "draft_counts_S", "temperature_S", "top_p_S", "min_p_S", "top_k_S", "seed_S", "stop_SN", "ended_S",
)  # fmt: skip


class _Step(ctypes.Structure):
    """`Step` of step.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("tokens", "positions", "slots", "table")),
        *((name, ctypes.c_int64) for name in ("count", "table_width", "longest")),
    ]


class _Slots(ctypes.Structure):
    """`Slots` of round.c."""

    _fields_ = [(name, ctypes.c_void_p) for name in _ARRAYS] + [
        (name, ctypes.c_int64) for name in ("width", "pages", "stops", "most_drafts")
    ]


class NativeRunner:
    """See TorchRunner. Several may share one `packed`; each has its own working memory, so each may have a thread."""

    name = "C"

    def __init__(self, model: DeepseekV3, cache: LatentCache, packed: Packed, library: ctypes.CDLL) -> None:
        self.cache, self.packed, self.library = cache, packed, library
        address = sgemm()
        assert address is not None
        self._set_blas_threads = set_blas_threads()
        self._model = packed.struct(cache.latents_LPGC, address)
        self._hidden, self._vocab = model.config.hidden_size, model.config.vocab_size
        self._work = torch.empty(0)
        self._slots: tuple[np.ndarray, _Slots] | None = None

    def forward(self, batch: Batch, wanted_M: np.ndarray) -> tuple[Tensor, Tensor]:
        step, kept = self._step(batch)
        wanted_M = np.ascontiguousarray(wanted_M, dtype=np.int64)
        hidden_NH, logits_MV = torch.empty(step.count, self._hidden), torch.empty(len(wanted_M), self._vocab)
        self._call(
            self.library.forward, ctypes.byref(self._model), ctypes.byref(step), ctypes.c_int64(len(wanted_M)),
            _pointer(wanted_M), self._workspace(step), _address(hidden_NH), _address(logits_MV),
        )  # fmt: skip
        del kept
        return logits_MV, hidden_NH

    def draft(
        self, hidden_NH: Tensor, batch: Batch, first_B: np.ndarray, wanted_M: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        step, kept = self._step(batch)
        first_N = np.repeat(first_B, batch.count_B)
        wanted_M = np.ascontiguousarray(wanted_M, dtype=np.int64)
        out_NH, logits_MV = torch.empty(step.count, self._hidden), torch.empty(len(wanted_M), self._vocab)
        hidden_NH = hidden_NH.contiguous()
        self._call(
            self.library.draft, ctypes.byref(self._model), ctypes.byref(step), _address(hidden_NH), _pointer(first_N),
            ctypes.c_int64(len(wanted_M)), _pointer(wanted_M), self._workspace(step), _address(out_NH),
            _address(logits_MV),
        )  # fmt: skip
        del kept
        return logits_MV, out_NH

    def draw(self, logits_MV: Tensor, slots: Slots, slot_M: np.ndarray, counter_M: np.ndarray) -> np.ndarray:
        logits_MV = logits_MV.contiguous()
        rows = [
            x[slot_M] for x in (slots.temperature_S, slots.top_p_S, slots.top_k_S, slots.min_p_S, slots.seed_S)
        ]  # fmt: skip
        counter_M = np.ascontiguousarray(counter_M, dtype=np.int64)
        tokens_M = np.empty(len(slot_M), dtype=np.int64)
        work = np.empty(3 * self._vocab, dtype=np.float32)
        self.library.sample(
            _address(logits_MV), ctypes.c_int64(len(slot_M)), ctypes.c_int64(self._vocab), *map(_pointer, rows),
            _pointer(counter_M), _pointer(work), _pointer(tokens_M),
        )  # fmt: skip
        return tokens_M

    def round(self, slots: Slots, rows_B: np.ndarray, drafts: int) -> np.ndarray | None:
        if self._slots is None or self._slots[0] is not slots.stop_SN:
            self._slots = slots.stop_SN, _slots_struct(slots)  # stop ids move when a request brings more of them
        rows_B = np.ascontiguousarray(rows_B, dtype=np.int64)
        kept_B = np.empty_like(rows_B)
        for first in range(0, len(rows_B), _MOST_ROWS):
            share = slice(first, first + _MOST_ROWS)
            self._round(slots, rows_B[share], drafts, kept_B[share])
        return kept_B

    def _round(self, slots: Slots, rows_B: np.ndarray, drafts: int, kept_B: np.ndarray) -> None:
        assert self._slots is not None
        # No position beyond the tokens of the longest sequence and its drafts is looked at.
        longest = ctypes.c_int64(int(slots.length_S[rows_B].max()) + 2 * drafts + 1)
        count, many = ctypes.c_int64(len(rows_B)), ctypes.c_int64(drafts)
        self._reserve(self.library.round_workspace(ctypes.byref(self._model), count, many, longest))
        failed = self._call(
            self.library.decode, ctypes.byref(self._model), ctypes.byref(self._slots[1]), _pointer(rows_B), count, many,
            _address(self._work), _pointer(kept_B),
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for a round's bookkeeping")

    def drafts(self, hidden_BH: Tensor, slots: Slots, rows_B: np.ndarray, drafts: int) -> np.ndarray | None:
        return None

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        for source, target in pairs:
            self.cache.copy_page(source, target)

    def _step(self, batch: Batch) -> tuple[_Step, list[np.ndarray]]:
        """The batch for C, and the arrays it points to."""
        kept: list[np.ndarray] = [
            np.ascontiguousarray(batch.tokens_N, dtype=np.int32),
            np.ascontiguousarray(batch.position_N, dtype=np.int64),
            np.repeat(batch.slot_B, batch.count_B).astype(np.int64, copy=False),
            batch.table_SP,
        ]
        assert kept[3].flags.c_contiguous and kept[3].dtype == np.int32
        longest = int(batch.position_N.max()) + 1
        return _Step(*map(_pointer, kept), len(kept[0]), kept[3].shape[1], longest), kept

    def _call(self, function: Any, *arguments: Any) -> Any:
        """Call with one thread for the products inside: the engine's threads each have sequences of their own."""
        if self._set_blas_threads is None:
            return function(*arguments)
        before = self._set_blas_threads(1)
        try:
            return function(*arguments)
        finally:
            self._set_blas_threads(before)

    def _workspace(self, step: _Step) -> ctypes.c_void_p:
        count, longest = ctypes.c_int64(step.count), ctypes.c_int64(step.longest)
        self._reserve(self.library.workspace(ctypes.byref(self._model), count, longest))
        return _address(self._work)

    def _reserve(self, floats: int) -> None:
        if self._work.numel() < floats:
            self._work = torch.empty(floats * 5 // 4)


def native_runners(model: DeepseekV3, cache: LatentCache, count: int) -> list[NativeRunner] | None:
    """`count` runners that share their weights, or None where C does not serve this model or this machine."""
    if model.lm_head.weight.dtype != torch.float32 or not suits(model) or sgemm() is None:
        return None
    library = build(sizes(model.config, cache.page_size))
    if library is None:
        return None
    library.workspace.restype = library.round_workspace.restype = ctypes.c_int64
    for function in (library.forward, library.draft, library.sample):
        function.restype = None
    packed = Packed(model)
    return [NativeRunner(model, cache, packed, library) for _ in range(count)]


def suits(model: DeepseekV3) -> bool:
    """Whether C is meant for this model, be it in float32: on a CPU, not large, no larger for being absorbed, and not
    in FP8, whose scales it does not know."""
    if any(buffer.dtype == FP8 for buffer in model.buffers()):
        return False
    absorbed, plain = absorbed_parameters(model.config)
    small = sum(parameter.numel() for parameter in model.parameters()) * 4 <= _MOST_BYTES
    return model.lm_head.weight.device.type == "cpu" and small and absorbed <= 1.5 * plain


def _slots_struct(slots: Slots) -> _Slots:
    arrays = [getattr(slots, name) for name in _ARRAYS]
    assert all(array.flags.c_contiguous for array in arrays)
    widths = (slots.tokens_SW.shape[1], slots.table_SP.shape[1], slots.stop_SN.shape[1], slots.draft_SG.shape[1])
    return _Slots(*(array.ctypes.data for array in arrays), *widths)


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
