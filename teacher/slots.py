"""What each slot of the engine is doing, as tensors: a step has no Python a row.

Shapes: S slots, the first A of them in use, N stop ids, W tokens a slot has room for, V vocabulary.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from teacher.cache import LatentCache
from teacher.requests import Request
from teacher.sampling import sample


class Slots:
    """The first `used` slots of `cache` are in use. Lengths are known on the host without asking the device: all slots
    in use grow by one token a step, so a slot's length is the clock minus its start."""

    def __init__(self, cache: LatentCache) -> None:
        _, slots, max_len, _ = cache.latents_LSMC.shape
        device = cache.latents_LSMC.device

        def integers(*shape: int) -> Tensor:
            return torch.zeros(slots, *shape, dtype=torch.long, device=device)

        self.cache = cache
        self.used = 0
        self.clock = 0  # decoding steps so far
        self.max_len = max_len
        self.requests: list[Request] = []
        self.entered: list[float] = []
        self.starts: list[int] = []
        self.last_S = integers()  # newest token; it is in `length`, but not yet in the cache
        self.length_S = integers()  # tokens, prompt and generated
        self.count_S = integers()  # tokens generated
        self.limit_S = integers()  # most tokens to generate
        self.seed_S, self.top_k_S = integers(), integers()
        self.temperature_S = torch.zeros(slots, device=device)
        self.top_p_S = torch.zeros(slots, device=device)
        self.done_S = torch.zeros(slots, dtype=torch.bool, device=device)
        self.stop_SN = integers(1) - 1  # padded with -1, which is no token
        self.out_SW = integers(max_len)  # generated tokens

    def length(self, slot: int) -> int:
        """Tokens of the sequence in `slot`, the newest included."""
        return self.clock - self.starts[slot]

    def longest(self) -> int:
        """The largest length in use."""
        return self.clock - min(self.starts)

    def enter(self, requests: list[Request], default_stop_ids: list[int]) -> None:
        """Put requests, whose prompts are prefilled, into the slots behind those in use."""
        device, first, now = self.last_S.device, self.used, time.perf_counter()
        stops = [list(default_stop_ids if r.stop_ids is None else r.stop_ids) for r in requests]
        width = max(len(ids) for ids in stops)
        if width > self.stop_SN.shape[1]:
            self.stop_SN = torch.nn.functional.pad(self.stop_SN, (0, width - self.stop_SN.shape[1]), value=-1)
        width = self.stop_SN.shape[1]
        self.used += len(requests)
        self.requests += requests
        self.entered += [now] * len(requests)
        self.starts += [self.clock - len(request.prompt_ids) - 1 for request in requests]
        new = slice(first, self.used)

        def put(target: Tensor, values: list) -> None:
            target[new] = torch.tensor(values, dtype=target.dtype).to(device)

        put(self.length_S, [len(r.prompt_ids) for r in requests])
        put(self.limit_S, [min(r.max_tokens, self.max_len - len(r.prompt_ids)) for r in requests])
        put(self.seed_S, [r.seed for r in requests])
        put(self.top_k_S, [r.top_k for r in requests])
        put(self.temperature_S, [r.temperature for r in requests])
        put(self.top_p_S, [r.top_p for r in requests])
        put(self.stop_SN, [ids + [-1] * (width - len(ids)) for ids in stops])
        self.count_S[new] = 0

    def append(self, first: int, logits_AV: Tensor) -> None:
        """Draw the next token of the slots from `first` to the last in use, and note which of them are finished."""
        rows = slice(first, self.used)
        token_A = sample(
            logits_AV,
            self.temperature_S[rows],
            self.top_p_S[rows],
            self.top_k_S[rows],
            self.seed_S[rows],
            self.count_S[rows],
        )
        self.out_SW[rows].scatter_(1, self.count_S[rows].unsqueeze(1), token_A.unsqueeze(1))
        self.last_S[rows] = token_A
        self.count_S[rows] += 1
        self.length_S[rows] += 1
        stopped_A = (token_A.unsqueeze(1) == self.stop_SN[rows]).any(1)
        self.done_S[rows] = stopped_A | (self.count_S[rows] >= self.limit_S[rows])

    def finished(self) -> list[int]:
        """Slots whose request has ended, ascending."""
        return self.done_S[: self.used].nonzero().flatten().tolist()

    def result(self, slot: int) -> tuple[Request, list[int], int | None]:
        """The request in `slot`, its tokens without the stop token, and the stop token if that is what ended it."""
        request = self.requests[slot]
        tokens = self.out_SW[slot, : self.length(slot) - len(request.prompt_ids)].tolist()
        if tokens[-1] in self.stop_SN[slot].tolist():
            return request, tokens[:-1], tokens[-1]
        return request, tokens, None

    def leave(self, slot: int) -> None:
        """Free `slot`; the last slot in use moves into it."""
        last = self.used - 1
        if slot != last:
            self.cache.move(last, slot, self.length(last))
            for state in (
                self.last_S, self.length_S, self.count_S, self.limit_S, self.seed_S, self.top_k_S,
                self.temperature_S, self.top_p_S, self.done_S, self.stop_SN, self.out_SW,
            ):  # fmt: skip
                state[slot] = state[last]
        moved = self.requests.pop(), self.entered.pop(), self.starts.pop()
        if slot != last:
            self.requests[slot], self.entered[slot], self.starts[slot] = moved
        self.used = last
