"""Which examples make an optimizer step, and how a step is laid out in micro-batches.

A step is the next examples of a freshly shuffled epoch, about tokens_per_step of them, whatever the layout. So packed
and padded training take the same steps with the same gradients, and neither is biased towards one length or one kind
of problem. Only within the step are examples rearranged:

    packed    best-fit-decreasing into rows of a bounded number of tokens; a row is laid end to end without any padding
    padded    sorted by length and cut into rectangles, so that neighbours need little padding

Shapes: B rows, T longest row, N tokens of a packed row, K positions whose next token is trained on.
"""

import random
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count as count_from
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from students.attention import fold_indices
from students.data import Example

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """One forward pass: the model's keyword arguments, and the ids to predict at the positions it returns logits for.

    `targets` is [K] for a packed row and [B, T'] for padded rows, with IGNORED where there is nothing to learn.
    `slots` counts the token positions computed, padding included.
    """

    inputs: dict[str, Any]
    targets: Tensor
    slots: int

    def to(self, device: torch.device) -> "Batch":
        def move(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.device == device:
                return x
            # From pageable memory the copy would wait for all that the GPU has yet to do.
            return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)

        return Batch({name: move(x) for name, x in self.inputs.items()}, move(self.targets), self.slots)


def plan_steps(
    lengths: Sequence[int], tokens_per_step: int, epochs: float, seed: int, max_tokens: int | None = None
) -> list[list[int]]:
    """Indices of the examples of every step; a pure function of its arguments, so that a resumed run continues it.

    Every epoch is shuffled anew. The run is cut into equal steps of about `tokens_per_step` tokens: a short last step
    would be one noisy update. `max_tokens` replaces `epochs`: whole examples, over as many epochs as it takes, up to
    the total nearest to it.
    """
    if max_tokens is None:
        order = list(islice(_shuffled_forever(len(lengths), seed), max(1, round(epochs * len(lengths)))))
        total = sum(lengths[index] for index in order)
    else:
        order, total = [], 0
        for index in _shuffled_forever(len(lengths), seed):
            if order and total + lengths[index] / 2 > max_tokens:
                break
            order.append(index)
            total += lengths[index]
    count = max(1, round(total / tokens_per_step))
    steps: list[list[int]] = [[] for _ in range(count)]
    seen = 0
    for index in order:
        steps[seen * count // total].append(index)
        seen += lengths[index]
    return [step for step in steps if step]


def _shuffled_forever(count: int, seed: int) -> Iterator[int]:
    for epoch in count_from():
        indices = list(range(count))
        random.Random(f"{seed}/{epoch}").shuffle(indices)
        yield from indices


def layout(lengths: Sequence[int], limit: int, packing: bool) -> list[list[int]]:
    """Split a step's examples into micro-batches of at most `limit` tokens (with padding, if padded).

    `limit` must hold the longest example. Returns indices into `lengths`.
    """
    assert max(lengths) <= limit
    if not packing:
        return _rectangles(lengths, limit)
    rows = -(-sum(lengths) // limit)
    # Rows of equal length rather than full ones and a stump: the same number of passes, each quicker.
    even = -(-sum(lengths) // rows)
    return best_fit_decreasing(lengths, min(limit, max(max(lengths), even + even // 32)))


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of at most `capacity`: longest first, each into the fullest bin that still has room."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(room, (lengths[index], -1))
        if place == len(room):
            bins.append([])
            free, target = capacity, len(bins) - 1
        else:
            free, target = room.pop(place)
        bins[target].append(index)
        insort(room, (free - lengths[index], target))
    return bins


def _rectangles(lengths: Sequence[int], limit: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # Sorted: the first of a batch is its longest, and sets the width of all.
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= limit:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def collate(examples: Sequence[Example], packing: bool) -> Batch:
    """Tensors of one micro-batch. Logits are asked for only from the first response token on."""
    return _packed(examples) if packing else _padded(examples)


def without_loss(batch: Batch) -> Batch:
    """The same pass with nothing to learn, for a process that has fewer micro-batches than the others."""
    return Batch(batch.inputs, torch.full_like(batch.targets, IGNORED), 0)


def _packed(examples: Sequence[Example]) -> Batch:
    lengths = [len(example.input_ids) for example in examples]
    ids_N = torch.tensor([token for example in examples for token in example.input_ids])
    position_N = torch.cat([torch.arange(length) for length in lengths])
    keep, start = [], 0
    for example, length in zip(examples, lengths, strict=True):
        keep.append(torch.arange(start + max(example.prompt_length, 1) - 1, start + length - 1))
        start += length
    keep_K = torch.cat(keep)
    inputs = {
        "input_ids": ids_N[None], "position_ids": position_N[None], "logits_to_keep": keep_K, **fold_indices(lengths),
    }  # fmt: skip
    return Batch(inputs, ids_N[keep_K + 1], len(ids_N))


def _padded(examples: Sequence[Example]) -> Batch:
    longest = max(len(example.input_ids) for example in examples)
    ids_BT = torch.zeros(len(examples), longest, dtype=torch.long)
    targets_BT = torch.full_like(ids_BT, IGNORED)
    for row, example in enumerate(examples):
        length, first = len(example.input_ids), max(example.prompt_length, 1)
        ids_BT[row, :length] = torch.tensor(example.input_ids)
        targets_BT[row, first - 1 : length - 1] = ids_BT[row, first:length]
    skip = min(max(example.prompt_length, 1) for example in examples) - 1
    # The padding is on the right and attention causal: no mask is needed, and without one the kernels are faster.
    return Batch({"input_ids": ids_BT, "logits_to_keep": longest - skip}, targets_BT[:, skip:], ids_BT.numel())
