"""One round for a group of sequences: run the model on their new tokens, draw, and draft further ones.

Speculative decoding (arXiv 2211.17192) with the MTP module as draft (DeepSeek-V3 section 5.4.3). The usual acceptance
test draws anew for every token; here the draw of a request's n-th token is the same number u(seed, n) for draft and
model alike, and a drafted token is kept if it is what the model draws with that number. So every token is the one that
plain decoding would have drawn, sampled or greedy: speculation changes neither the distribution nor even the text, and
may be switched on and off from step to step. The price is a lower acceptance than rejection sampling's 1 - TV(p, q) in
theory; where p and q put most of their mass on the same token, as ours do, there is next to none.

Groups have no sequence in common, so several threads may each run one. Shapes: see teacher/runner.py and slots.py;
G drafted tokens, R rows (B sequences) of a group.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from teacher.requests import TokenLogprobs
from teacher.runner import Batch
from teacher.slots import Slots

# Slot of a sequence -> slots of those that start as its copies, and (from, to) of the pages to copy.
Followers = dict[int, tuple[list[int], list[tuple[int, int]]]]


class Runner(Protocol):
    """See TorchRunner."""

    name: str  # what it runs in, for people

    def forward(self, batch: Batch, wanted_M: np.ndarray) -> tuple[Tensor, Tensor]: ...

    def draft(
        self, hidden_NH: Tensor, batch: Batch, first_B: np.ndarray, wanted_M: np.ndarray
    ) -> tuple[Tensor, Tensor]: ...

    def draw(self, logits_MV: Tensor, slots: Slots, slot_M: np.ndarray, counter_M: np.ndarray) -> np.ndarray: ...

    def round(self, slots: Slots, rows_B: np.ndarray, drafts: int) -> np.ndarray | None: ...

    def drafts(self, hidden_BH: Tensor, slots: Slots, rows_B: np.ndarray, drafts: int) -> np.ndarray | None: ...

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None: ...


class Round(NamedTuple):
    """What a round brought, by slot. Sequences that are still being prefilled are not in it."""

    new: dict[int, int]  # how many tokens were appended
    logprobs: dict[int, list[TokenLogprobs]]


def decode(runner: Runner, slots: Slots, rows_B: np.ndarray, drafts: int) -> Round:
    """Append a token to each sequence, or, with `drafts`, up to 1 + drafts of them."""
    if (slots.logprobs_S[rows_B] < 0).all() and (done_B := runner.round(slots, rows_B, drafts)) is not None:
        return Round(dict(zip(rows_B.tolist(), done_B.tolist(), strict=True)), {})
    if drafts == 0:
        return _decode_plainly(runner, slots, rows_B)
    waiting_B = np.minimum(slots.drafts_S[rows_B], slots.limit_S[rows_B] - slots.length_S[rows_B] - 1)
    count_B = waiting_B + 1
    at_B = slots.length_S[rows_B] - 1
    offset_N = _offsets(count_B)
    row_N = np.repeat(np.arange(len(rows_B)), count_B)
    slot_N = rows_B[row_N]
    tokens_N = slots.draft_SG[slot_N, np.maximum(offset_N - 1, 0)]
    first_B = count_B.cumsum() - count_B
    tokens_N[first_B] = slots.tokens_SW[rows_B, at_B]
    position_N = at_B[row_N] + offset_N
    logits_NV, hidden_NH = runner.forward(
        Batch(tokens_N, position_N, rows_B, count_B, slots.table_SP), np.arange(len(tokens_N))
    )
    drawn_N = runner.draw(logits_NV, slots, slot_N, position_N + 1 - slots.prompt_S[slot_N])

    # A draft is right if the model drew it at the position before; what follows the first wrong one is void.
    right_N = np.zeros(len(tokens_N), dtype=bool)
    right_N[:-1] = (tokens_N[1:] == drawn_N[:-1]) & (offset_N[1:] > 0)
    stop_N = (drawn_N[:, None] == slots.stop_SN[slot_N]).any(1)
    logprobs: dict[int, list[TokenLogprobs]] = {}
    kept_B = np.empty_like(count_B)
    for row, (first, count) in enumerate(zip(first_B.tolist(), count_B.tolist(), strict=True)):
        kept = 1
        while kept < count and right_N[first + kept - 1] and not stop_N[first + kept - 1]:
            kept += 1
        kept_B[row] = kept
        slot = int(rows_B[row])
        slots.tokens_SW[slot, at_B[row] + 1 : at_B[row] + 1 + kept] = drawn_N[first : first + kept]
        if (most := int(slots.logprobs_S[slot])) >= 0:
            logprobs[slot] = token_logprobs(logits_NV[first : first + kept], drawn_N[first : first + kept], most)
    slots.length_S[rows_B] += kept_B
    slots.cached_S[rows_B] = slots.length_S[rows_B] - 1
    slots.ended_S[rows_B] = stop_N[first_B + kept_B - 1] | (slots.length_S[rows_B] >= slots.limit_S[rows_B])
    slots.draft_counts_S[rows_B] += np.stack((waiting_B, kept_B - 1), axis=1)
    keep_N = offset_N < kept_B[row_N]
    going_N = keep_N & ~slots.ended_S[slot_N]
    go_on(
        runner, slots, rows_B[~slots.ended_S[rows_B]], _rows(hidden_NH, going_N), kept_B[~slots.ended_S[rows_B]], drafts
    )
    return Round(dict(zip(rows_B.tolist(), kept_B.tolist(), strict=True)), logprobs)


def settle(
    slots: Slots, rows_B: np.ndarray, waiting_B: np.ndarray, kept_B: np.ndarray, drawn_BT: np.ndarray,
    drafted_BK: np.ndarray | None,
) -> None:  # fmt: skip
    """Take down a round that a runner ran in one go: of each sequence's draws the first `kept_B` are appended, and the
    drafts behind them wait (without any the draft module has not seen the new tokens)."""
    length_B = slots.length_S[rows_B]
    offset_T = np.arange(drawn_BT.shape[1])
    row_M, offset_M = np.nonzero(offset_T < kept_B[:, None])
    slots.tokens_SW[rows_B[row_M], length_B[row_M] + offset_M] = drawn_BT[row_M, offset_M]
    slots.length_S[rows_B] = length_B + kept_B
    slots.cached_S[rows_B] = length_B + kept_B - 1
    last_B = drawn_BT[np.arange(len(rows_B)), kept_B - 1]
    stop_B = (last_B[:, None] == slots.stop_SN[rows_B]).any(1)
    slots.ended_S[rows_B] = stop_B | (slots.length_S[rows_B] >= slots.limit_S[rows_B])
    if drafted_BK is None:
        slots.drafts_S[rows_B] = 0
        slots.drafted_from_S[rows_B] = -1
        return
    slots.draft_counts_S[rows_B] += np.stack((waiting_B, kept_B - 1), axis=1)
    first_B = slots.drafted_from_S[rows_B]
    slots.drafted_from_S[rows_B] = np.where(first_B < 0, length_B - 1, first_B)
    slots.draft_SG[rows_B, : drafted_BK.shape[1]] = drafted_BK
    slots.drafts_S[rows_B] = drafted_BK.shape[1]


def _decode_plainly(runner: Runner, slots: Slots, rows_B: np.ndarray) -> Round:
    length_B = slots.length_S[rows_B]
    everyone_B = np.arange(len(rows_B))
    batch = Batch(
        slots.tokens_SW[rows_B, length_B - 1], length_B - 1, rows_B, np.ones_like(rows_B), slots.table_SP
    )  # fmt: skip
    logits_BV, _ = runner.forward(batch, everyone_B)
    slots.cached_S[rows_B] = length_B
    slots.drafts_S[rows_B] = 0
    slots.drafted_from_S[rows_B] = -1
    return _append(runner, slots, rows_B, logits_BV)


def prefill(
    runner: Runner, slots: Slots, rows_B: np.ndarray, count_B: np.ndarray, followers: Followers, drafts: int
) -> Round:
    """Run the next `count_B` tokens of each sequence; those that have no more draw their first token.

    `followers` have the tokens of a sequence that draws: they share its logits and its full pages, and get a copy of
    its last page.
    """
    offset_N = _offsets(count_B)
    row_N = np.repeat(np.arange(len(rows_B)), count_B)
    slot_N = rows_B[row_N]
    position_N = slots.cached_S[slot_N] + offset_N
    batch = Batch(slots.tokens_SW[slot_N, position_N], position_N, rows_B, count_B, slots.table_SP)
    slots.cached_S[rows_B] += count_B
    complete_B = slots.cached_S[rows_B] == slots.length_S[rows_B]
    logits_MV, hidden_NH = runner.forward(batch, batch.last_B[complete_B])
    new_R: list[int] = []
    source_R: list[int] = []
    for source, slot in enumerate(rows_B[complete_B].tolist()):
        started, copies = followers.get(slot, ([], []))  # of the other groups' leaders, these are not there yet
        runner.copy_pages(copies)
        group = [slot, *started]
        new_R += group
        source_R += [source] * len(group)
    rows_R = np.array(new_R, dtype=np.int64)
    slots.cached_S[rows_R] = slots.length_S[rows_R]
    found = Round({}, {})
    if new_R:
        found = _append(runner, slots, rows_R, logits_MV[torch.from_numpy(np.array(source_R)).to(logits_MV.device)])
    if drafts:
        _draft_prompts(runner, slots, batch, hidden_NH, complete_B, followers, drafts)
    else:
        slots.drafted_from_S[rows_B] = -1  # the draft module has not seen this chunk: what it saw before is cut off
    return found


def _append(runner: Runner, slots: Slots, rows_B: np.ndarray, logits_BV: Tensor) -> Round:
    """Draw a token for each sequence from its logits."""
    length_B = slots.length_S[rows_B]
    drawn_B = runner.draw(logits_BV, slots, rows_B, length_B - slots.prompt_S[rows_B])
    slots.tokens_SW[rows_B, length_B] = drawn_B
    slots.length_S[rows_B] += 1
    stop_B = (drawn_B[:, None] == slots.stop_SN[rows_B]).any(1)
    slots.ended_S[rows_B] = stop_B | (slots.length_S[rows_B] >= slots.limit_S[rows_B])
    logprobs = {
        slot: token_logprobs(logits_BV[row : row + 1], drawn_B[row : row + 1], most)
        for row, (slot, most) in enumerate(zip(rows_B.tolist(), slots.logprobs_S[rows_B].tolist(), strict=True))
        if most >= 0
    }
    return Round(dict.fromkeys(rows_B.tolist(), 1), logprobs)


def _draft_prompts(
    runner: Runner, slots: Slots, batch: Batch, hidden_NH: Tensor, complete_B: np.ndarray,
    followers: Followers, drafts: int,
) -> None:  # fmt: skip
    """Give the draft module the prompt that was just run; a sequence's last hidden state waits for its next token."""
    row_N = np.repeat(np.arange(len(batch.slot_B)), batch.count_B)
    slot_N = batch.slot_B[row_N]
    last_N = np.zeros(len(row_N), dtype=bool)
    last_N[batch.last_B[complete_B]] = True
    new_B = slots.drafted_from_S[batch.slot_B] < 0
    start_B = batch.position_N[batch.last_B] - batch.count_B + 1
    slots.drafted_from_S[batch.slot_B[new_B]] = start_B[new_B]
    if not last_N.all():
        count_B = np.bincount(row_N[~last_N], minlength=len(batch.slot_B))
        there = count_B > 0
        inner = Batch(
            slots.tokens_SW[slot_N[~last_N], batch.position_N[~last_N] + 1], batch.position_N[~last_N],
            batch.slot_B[there], count_B[there], slots.table_SP,
        )  # fmt: skip
        runner.draft(_rows(hidden_NH, ~last_N), inner, slots.drafted_from_S[inner.slot_B], np.zeros(0, dtype=np.int64))
    # Samples of one prompt share its last page's entry of the draft module too, so the last one to write it wins there
    # if the prompt ends with the page. A draft may be worse for that, never a result.
    going: list[int] = []
    source: list[int] = []
    for row in np.nonzero(complete_B)[0].tolist():
        leader = int(batch.slot_B[row])
        for slot in (leader, *followers.get(leader, ((), ()))[0]):
            slots.drafted_from_S[slot] = slots.drafted_from_S[leader]
            if not slots.ended_S[slot]:
                going.append(slot)
                source.append(int(batch.last_B[row]))
    if going:
        hidden_BH = hidden_NH[torch.from_numpy(np.array(source)).to(hidden_NH.device)]
        go_on(runner, slots, np.array(going), hidden_BH, np.ones(len(going), dtype=np.int64), drafts)


def go_on(
    runner: Runner, slots: Slots, rows_B: np.ndarray, hidden_NH: Tensor, count_B: np.ndarray, drafts: int
) -> None:
    """Draft the next tokens of each sequence, whose last `count_B` cached tokens have the hidden states given."""
    if len(rows_B) == 0:
        return
    fresh_B = slots.drafted_from_S[rows_B] < 0
    slots.drafted_from_S[rows_B[fresh_B]] = (slots.cached_S[rows_B] - count_B)[fresh_B]
    if (count_B == 1).all() and (drafted_BG := runner.drafts(hidden_NH, slots, rows_B, drafts)) is not None:
        slots.draft_SG[rows_B, :drafts], slots.drafts_S[rows_B] = drafted_BG, drafts
        return
    row_N = np.repeat(np.arange(len(rows_B)), count_B)
    position_N = (slots.cached_S[rows_B] - count_B)[row_N] + _offsets(count_B)
    tokens_N = slots.tokens_SW[rows_B[row_N], position_N + 1]
    first_B = slots.drafted_from_S[rows_B]
    for depth in range(drafts):
        batch = Batch(tokens_N, position_N, rows_B, count_B, slots.table_SP)
        last_B = batch.last_B
        logits_BV, out_NH = runner.draft(hidden_NH, batch, first_B, last_B)
        length_B = slots.length_S[rows_B] + depth
        tokens_N = runner.draw(logits_BV, slots, rows_B, length_B - slots.prompt_S[rows_B])
        slots.draft_SG[rows_B, depth] = tokens_N
        if depth + 1 < drafts:
            hidden_NH = out_NH if depth else out_NH[torch.from_numpy(last_B).to(out_NH.device)]
            # Drafts past the end are of no use, but must lie somewhere.
            position_N = np.minimum(position_N[last_B] + 1, slots.tokens_SW.shape[1] - 1)
            count_B = np.ones_like(rows_B)
    slots.drafts_S[rows_B] = drafts


def token_logprobs(logits_TV: Tensor, tokens_T: np.ndarray, most: int) -> list[TokenLogprobs]:
    """Log-probabilities of the tokens drawn at T positions, and of the `most` likeliest there."""
    logprobs_TV = logits_TV.float().log_softmax(-1)
    tokens_T1 = torch.from_numpy(tokens_T).long().to(logits_TV.device).unsqueeze(1)
    top = logprobs_TV.topk(min(most, logits_TV.shape[1]), dim=-1)
    return [
        TokenLogprobs(own, list(zip(ids, values, strict=True)))
        for own, ids, values in zip(
            logprobs_TV.gather(1, tokens_T1).squeeze(1).tolist(), top.indices.tolist(), top.values.tolist(), strict=True
        )
    ]


def _offsets(count_B: np.ndarray) -> np.ndarray:
    """0, 1, … within each sequence."""
    return np.arange(count_B.sum()) - np.repeat(count_B.cumsum() - count_B, count_B)


def _rows(values_NH: Tensor, keep_N: np.ndarray) -> Tensor:
    return values_NH if keep_N.all() else values_NH[torch.from_numpy(keep_N).to(values_NH.device)]
