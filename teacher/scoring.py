"""How likely a model finds given continuations of given contexts, as lm-eval's tasks ask: by its forward, no cache.

Continuations of one context are one row, each a branch behind it that sees the context and itself: four answers to a
question cost little more than the question. A branch lacks its continuation's last token, whose logits nobody needs, so
continuations of one token cost nothing. Rows are sorted by length and run together up to a number of tokens.

Company changes a score by rounding only, which is 1e-5 as a rule; where two experts or groups of them tie to the last
bit, rounding decides which is taken (one of 256 answers moved by 1.8 of 285 nats in tests/bench/lm_eval_models.py).

Shapes: R rows, T tokens, N scored tokens of a batch, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from teacher.model import DeepseekV3
from teacher.segments import Packing

Tokens = tuple[int, ...]

# A row's branches are masked from each other, so attention pays the square of the row. Branches join a row while they
# are no longer than the context or the row is short; a long row, whose mask would be large, has one branch and no mask.
_SHORT, _LONG = 512, 4096
_LOGITS = 2**26  # most logits at a time: 256 MB


class Score(NamedTuple):
    """One continuation."""

    logprob: float  # natural log, summed over its tokens
    greedy: bool  # each of its tokens is the most likely one


class _Read(NamedTuple):
    """Where the logits of one continuation's tokens lie in its row."""

    pair: int
    places: list[int]
    tokens: Tokens


class _Row(NamedTuple):
    tokens: list[int]
    positions: list[int]
    branch: list[int]  # 0: the context, -1: padding
    reads: list[_Read]


def score(
    model: DeepseekV3,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    max_length: int | None = None,
    batch_tokens: int | None = None,
) -> Iterator[tuple[int, Score]]:
    """Score each (context, continuation) of token ids; yields (its index, its score), the longest rows first.

    A pair of more than max_length + 1 tokens (default: the model's context) loses the beginning of its context, as in
    lm-eval's HFLM. Log-probabilities are taken in fp32. `batch_tokens` bounds a batch, padding included (default: 2048
    on a CPU, whose caches hold no more, else 16384). Raises ValueError for an empty context or continuation, and for a
    continuation longer than max_length.
    """
    if batch_tokens is None:
        batch_tokens = 2048 if model.lm_head.weight.device.type == "cpu" else 16384
    rows = _rows(pairs, model.config.max_position_embeddings if max_length is None else max_length)
    rows.sort(key=lambda row: len(row.tokens), reverse=True)
    start = 0
    while start < len(rows):
        batch = rows[start : start + max(1, batch_tokens // len(rows[start].tokens))]
        start += len(batch)
        yield from _score_batch(model, batch)


def _rows(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int) -> list[_Row]:
    """The rows that hold every pair, each context and branch once as far as rows allow."""
    contexts: dict[Tokens, dict[Tokens, list[tuple[int, Tokens]]]] = {}
    for index, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise ValueError(f"pair {index} has an empty {'continuation' if context else 'context'}")
        if len(continuation) > max_length:
            raise ValueError(
                f"pair {index} has a continuation of {len(continuation)} tokens; the limit is {max_length}"
            )
        kept = tuple(context[-(max_length + 1 - len(continuation)) :])
        continuation = tuple(continuation)
        contexts.setdefault(kept, {}).setdefault(continuation[:-1], []).append((index, continuation))
    rows = []
    for context, branches in contexts.items():
        limit = min(max(2 * len(context), _SHORT), _LONG)
        row = None
        for branch, wanted in branches.items():
            if row is None or len(row.tokens) + len(branch) > limit:
                row = _Row(list(context), list(range(len(context))), [0] * len(context), [])
                rows.append(row)
            first = len(row.tokens)
            places = [len(context) - 1, *range(first, first + len(branch))]
            row.reads.extend(_Read(index, places, continuation) for index, continuation in wanted)
            row.tokens.extend(branch)
            row.positions.extend(range(len(context), len(context) + len(branch)))
            row.branch.extend([row.branch[-1] + 1] * len(branch))
    return rows


@torch.inference_mode()
def _score_batch(model: DeepseekV3, rows: list[_Row]) -> list[tuple[int, Score]]:
    device, length = model.lm_head.weight.device, max(len(row.tokens) for row in rows)

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([v + [fill] * (length - len(v)) for v in values], device=device)

    packing: Packing = None
    if any(row.branch[-1] > 1 for row in rows):
        branch_RT = padded([row.branch for row in rows], -1)
        packing = _branch_mask(branch_RT)
    hidden_RTH = _hidden(
        model, padded([row.tokens for row in rows], 0), padded([row.positions for row in rows], 0), packing
    )
    reads = [(number, read) for number, row in enumerate(rows) for read in row.reads]
    places_N = torch.tensor([number * length + p for number, read in reads for p in read.places], device=device)
    target_N = torch.tensor([token for _, read in reads for token in read.tokens], device=device)
    sizes = [len(read.tokens) for _, read in reads]
    logprob_N, likeliest_N = _look_up(model, hidden_RTH.flatten(0, 1), places_N, target_N)
    return [
        (read.pair, Score(float(logprob.double().sum()), bool(likeliest.all())))
        for (_, read), logprob, likeliest in zip(reads, logprob_N.split(sizes), likeliest_N.split(sizes), strict=True)
    ]


def _hidden(model: DeepseekV3, ids_RT: Tensor, position_RT: Tensor, packing: Packing) -> Tensor:
    """Final hidden states; as `model.forward`, but under a mask of our own."""
    cos_RTD, sin_RTD = model.cos_TD[position_RT], model.sin_TD[position_RT]
    x_RTH = model.model.embed_tokens(ids_RT)
    for layer in model.main_layers:
        x_RTH, _, _ = layer(x_RTH, cos_RTD, sin_RTD, packing)
    return model.model.norm(x_RTH)


def _branch_mask(branch_RT: Tensor) -> Tensor:
    """Additive mask (R, 1, T, T): a token sees the context and its own branch, up to itself."""
    query_RT1, key_R1T = branch_RT.unsqueeze(2), branch_RT.unsqueeze(1)
    seen_RTT = ((query_RT1 == key_R1T) | (key_R1T == 0)).tril()
    return torch.zeros(seen_RTT.shape, device=seen_RTT.device).masked_fill_(~seen_RTT, float("-inf")).unsqueeze(1)


def _look_up(model: DeepseekV3, hidden_XH: Tensor, places_N: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """On the CPU: log-probability of each target at its place, and whether it is the most likely token there."""
    logprobs, likeliest = [], []
    at_once = max(1, _LOGITS // model.config.vocab_size)
    for places, targets in zip(places_N.split(at_once), target_N.split(at_once), strict=True):
        logits_NV = model.lm_head(hidden_XH[places]).float()
        chosen_N = logits_NV.gather(1, targets.unsqueeze(1)).squeeze(1)
        logprobs.append(chosen_N - logits_NV.logsumexp(1))
        likeliest.append(logits_NV.argmax(1) == targets)
    return torch.cat(logprobs).cpu(), torch.cat(likeliest).cpu()
