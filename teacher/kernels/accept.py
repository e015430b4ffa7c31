"""Which drafts the model drew too, decided where they were drawn: a round of speculation asks the host for nothing.

One program a sequence reads what the model drew at each of its new tokens and says how many of these draws are kept,
and where the draft module goes on: some twenty operators of torch otherwise, or a copy to the host and back. A handful
of values a sequence; the launch is all that it costs.

Shapes: R sequences, T new tokens each (the newest and T - 1 drafts), M = R T, N stop ids, K = T - 1 drafts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.arguments import same_device, take


class Accepted(NamedTuple):
    """What of a round's draws is kept, and what the draft module is to be told. All int64."""

    kept_R: Tensor  # draws kept; 0: the first is not sure, or there is no such sequence
    place_RT: Tensor  # positions of the tokens whose draws are kept, else -1
    last_R: Tensor  # which of the M tokens is a sequence's last kept one
    later_KR: Tensor  # the positions after that one, row k for the draft k + 1; the last row is of no use
    counter_R: Tensor  # how many tokens the request has drawn then

    @staticmethod
    def empty(rows: int, new: int, device: torch.device, kept_R: Tensor | None = None) -> Accepted:
        """Room for the results, `kept_R` where it is given."""

        def room(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        kept_R = room(rows) if kept_R is None else kept_R
        return Accepted(kept_R, room(rows, new), room(rows), room(max(1, new - 1), rows), room(rows))


@triton.jit(do_not_specialize=["most"])
def _accept_kernel(
    tokens, position, drawn, sure, stops, counter, kept_out, place_out, last_out, later_out, counter_out, R, most,
    T: tl.constexpr, STOPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    t = tl.arange(0, BLOCK_T)
    live_T, more_T = t < T, t + 1 < T
    at_T = row * T + t
    position_T = tl.load(position + at_T, mask=live_T, other=-1)
    drawn_T = tl.load(drawn + at_T, mask=live_T, other=-1)
    draft_T = tl.load(tokens + at_T + 1, mask=more_T, other=-1)
    there_T = tl.load(position + at_T + 1, mask=more_T, other=-1) >= 0
    n = tl.arange(0, BLOCK_N)
    stop_N = tl.load(stops + row * STOPS + n, mask=n < STOPS, other=-1)
    ends_T = tl.max((drawn_T[:, None] == stop_N[None, :]).to(tl.int32), axis=1)
    goes_on_T = (drawn_T == draft_T) & there_T & (ends_T == 0)
    kept = tl.min(tl.where(goes_on_T & live_T, T, t + 1), axis=0)
    unsure_T = tl.load(sure + at_T, mask=live_T, other=1) == 0
    kept = tl.minimum(kept, tl.min(tl.where(unsure_T, t, T), axis=0))
    first = tl.load(position + row * T)
    kept = tl.where(first >= 0, kept, 0).to(tl.int64)
    tl.store(kept_out + row, kept)
    tl.store(place_out + at_T, tl.where(t < kept, position_T, -1), mask=live_T)
    tl.store(last_out + row, row * T + tl.maximum(kept, 1) - 1)
    later_T = tl.where(kept > 0, tl.minimum(first + kept + t, most), -1)
    tl.store(later_out + t * R + row, later_T, mask=more_T)
    tl.store(counter_out + row, tl.load(counter + row) + kept)


def accept(
    tokens_RT: Tensor, position_RT: Tensor, drawn_2M: Tensor, stops_RN: Tensor, counter_R: Tensor, most: int,
    out: Accepted | None = None,
) -> Accepted:  # fmt: skip
    """See `accept_reference`, whose results these are, bit for bit."""
    for name, each, dims in (
        ("tokens_RT", tokens_RT, 2), ("position_RT", position_RT, 2), ("drawn_2M", drawn_2M, 2),
        ("stops_RN", stops_RN, 2), ("counter_R", counter_R, 1),
    ):  # fmt: skip
        take(name, each, (torch.int64,), (dims,), contiguous=True)
        same_device(**{"tokens_RT": tokens_RT, name: each})
    rows, new = tokens_RT.shape
    found = list(position_RT.shape), list(drawn_2M.shape), len(stops_RN), len(counter_R)
    if found != ([rows, new], [2, rows * new], rows, rows):
        raise ValueError(f"positions, draws, stops and counters of {found}; taken: those of {rows} x {new} tokens")
    out = Accepted.empty(rows, new, tokens_RT.device) if out is None else out
    if rows:
        _accept_kernel[(rows,)](
            tokens_RT, position_RT, *drawn_2M, stops_RN, counter_R, *out, rows, most, T=new, STOPS=stops_RN.shape[1],
            BLOCK_T=triton.next_power_of_2(new), BLOCK_N=triton.next_power_of_2(stops_RN.shape[1]), num_warps=1,
        )  # fmt: skip
    return out


def accept_reference(
    tokens_RT: Tensor, position_RT: Tensor, drawn_2M: Tensor, stops_RN: Tensor, counter_R: Tensor, most: int,
    out: Accepted | None = None,
) -> Accepted:  # fmt: skip
    """The definition. Row 0 of `drawn_2M` is what the model drew after each token, row 1 whether it is sure of it
    (see teacher.sampling.sample_likely). Positions of tokens that are not there are -1, of no sequence all of them.

    A draw is kept if all before it are, they are what was drafted and no stop ids, and all are sure. `counter_R` is the
    number of the first draw; no later position is beyond `most`.
    """
    rows, new = tokens_RT.shape
    drawn_RT, sure_RT = drawn_2M.view(2, rows, new)
    ends_RT = (drawn_RT.unsqueeze(-1) == stops_RN.unsqueeze(1)).any(-1)
    right_RK = (drawn_RT == tokens_RT.roll(-1, 1))[:, :-1] & (position_RT[:, 1:] >= 0) & ~ends_RT[:, :-1]
    there_R1 = position_RT[:, :1] >= 0
    kept_RT = torch.cat((there_R1, right_RK), 1).long().cumprod(1) * (sure_RT > 0).long().cumprod(1)
    kept_R = kept_RT.sum(1)
    place_RT = torch.where(kept_RT > 0, position_RT, -1)
    numbers = torch.arange(max(rows, new), device=tokens_RT.device)
    last_R = numbers[:rows] * new + kept_R.clamp_min(1) - 1
    later_KR = (position_RT[:, 0] + kept_R + numbers[: max(1, new - 1)].unsqueeze(1)).clamp_max(most)
    made = Accepted(kept_R, place_RT, last_R, torch.where(kept_R > 0, later_KR, -1), counter_R + kept_R)
    if out is None:
        return made
    for room, values in zip(out, made, strict=True):
        room.copy_(values)
    return out
