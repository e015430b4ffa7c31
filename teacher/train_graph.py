"""A training step recorded as one CUDA graph: forward, backward, clipping, optimizer and balance in a single launch.

A step of a small model is some thousands of kernels of a few microseconds each, and the host takes longer to launch
them than the device to run them. Recorded, the host copies a step's batch and numbers (rate, counts) to where the
recording reads them, and launches it whole.

A graph is bound to addresses: weights, optimizer state and selection biases are changed in place, so that evaluation,
checkpoints and a resumed run see the same tensors. It is bound to its kernels too: a new objective (an MTP weight that
drops late) is recorded anew. The first steps of an objective run as they are, because libraries set themselves up and
kernels are compiled on first calls, which cannot be recorded; they are steps like the others. What cannot be recorded
at all is what asks the device for a number: `obstacle` says so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teacher.batches import MicroBatch, StepBatch
from teacher.experts import Experts
from teacher.fp8_training import emulates
from teacher.model import DeepseekV3
from teacher.objective import Counts, Objective
from teacher.train_settings import TrainSettings

_UNRECORDED = 2  # steps of an objective before its recording
# Several runs may share a device, each in a thread with a stream of its own: they record one at a time.
_recording = threading.Lock()

Update = Callable[[Objective, Sequence[MicroBatch], Counts, float | Tensor], dict[str, Tensor]]


def obstacle(model: DeepseekV3, settings: TrainSettings) -> str | None:
    """Why steps of this run on a GPU cannot be recorded, or None."""
    device = model.lm_head.weight.device
    sizes = [size for module in model.modules() if isinstance(module, Experts) for size in module.down_proj.shape[1:]]
    if not settings.bf16 and sizes:
        return "in float32 the grouped product of the experts asks for its sizes"
    if any(size % 8 for size in sizes):
        return "experts whose sizes are not multiples of 8 are computed one by one"
    if settings.fp8 and emulates(device):
        return "FP8 is emulated"
    if settings.seq_len > model.config.max_position_embeddings:
        return "rows are longer than the model's context, which is checked for each batch"
    if settings.recompute:
        return "recompute is set"
    return None


@dataclass(frozen=True)
class DeviceCounts:
    """A step's counts as scalars on the device."""

    losses: tuple[Tensor, ...]
    examples: Tensor


class StepRecorder:
    """Does `update`, which returns figures (scalars or vectors on the device), step by step by replaying it."""

    def __init__(self, update: Update, device: torch.device) -> None:
        self._update, self._device = update, device
        self._objective: Objective | None = None
        self._unrecorded = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._names: list[str] = []
        self._shapes: list[torch.Size] = []
        self._inputs: StepInputs | None = None
        # Recorded on a stream of its own: cuBLAS has a workspace for each stream that it is called on, and graphs that
        # were recorded on one stream would write to the same one when they are replayed side by side.
        self._stream = torch.cuda.Stream(device)

    def step(self, objective: Objective, batch: StepBatch, rate: float) -> dict[str, Tensor]:
        """One step. The figures are the caller's: a later step does not overwrite them."""
        if self._inputs is None:
            self._inputs = StepInputs(batch, self._device)
        self._inputs.take(batch, rate)
        if objective != self._objective:
            self._objective, self._unrecorded, self._graph = objective, _UNRECORDED, None
        if self._unrecorded > 0:
            self._unrecorded -= 1
            with _recording:
                return self._run()
        if self._graph is None:
            with _recording:
                self._record()
        assert self._graph is not None
        self._graph.replay()
        figures = self._figures.clone().split([shape.numel() for shape in self._shapes])
        return {n: x.view(shape) for n, x, shape in zip(self._names, figures, self._shapes, strict=True)}

    def _run(self) -> dict[str, Tensor]:
        assert self._objective is not None and self._inputs is not None
        return self._update(self._objective, self._inputs.micro, self._inputs.counts, self._inputs.rate)

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with their own work on the device.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            figures = self._run()
            self._figures = torch.cat([figure.float().reshape(-1) for figure in figures.values()])
        self._names, self._shapes = list(figures), [figure.shape for figure in figures.values()]
        self._graph = graph


class StepInputs:
    """The tensors that a recording reads: micro-batches of one step, its counts and its learning rate."""

    def __init__(self, like: StepBatch, device: torch.device) -> None:
        shapes = [part.shape for part in _parts(like)]
        self._words = torch.zeros(sum(shape.numel() for shape in shapes), dtype=torch.int64, device=device)
        self._numbers = torch.zeros(2 + len(like.losses), device=device)
        pieces = self._words.split([shape.numel() for shape in shapes])
        parts = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        self._batch_shapes = shapes
        self.micro = [MicroBatch(*parts[at : at + 4]) for at in range(0, len(parts), 4)]
        self.rate, examples, *losses = self._numbers.unbind()
        self.counts = DeviceCounts(tuple(losses), examples)

    def take(self, batch: StepBatch, rate: float) -> None:
        """Copy a step's batch and numbers into place, without waiting."""
        parts = _parts(batch)
        assert [part.shape for part in parts] == self._batch_shapes
        words = torch.cat([part.flatten() for part in parts])
        numbers = torch.tensor([rate, batch.examples, *(max(1, n) for n in batch.losses)], dtype=torch.float32)
        for own, given in ((self._words, words), (self._numbers, numbers)):
            own.copy_(given.pin_memory() if own.is_cuda else given, non_blocking=True)


def _parts(batch: StepBatch) -> list[Tensor]:
    return [
        part
        for micro in batch.micro
        for part in (micro.input_ids_BT, micro.position_ids_BT, micro.segment_ids_BT, micro.targets_BT)
    ]
