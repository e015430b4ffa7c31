"""What each live sequence of the engine is doing, as arrays on the host: a step has next to no Python a row.

Shapes: S slots (one sequence each), W tokens a sequence has room for, P pages, N stop ids, G drafted tokens.
"""

from __future__ import annotations

import numpy as np

from teacher.requests import Request


class Slots:
    """Arrays by slot. A sequence's tokens are its prompt and what it has drawn; the newest is not yet in the cache."""

    def __init__(self, slots: int, max_len: int, page_size: int, drafts: int) -> None:
        def integers(*shape: int) -> np.ndarray:
            return np.zeros((slots, *shape), dtype=np.int64)

        self.page_size = page_size
        self.tokens_SW = np.zeros((slots, max_len), dtype=np.int32)  # pages of it cost nothing until written
        self.length_S, self.prompt_S, self.limit_S = integers(), integers(), integers()
        self.cached_S = integers()  # tokens whose latents are in the cache
        self.table_SP = np.zeros((slots, -(-max_len // page_size)), dtype=np.int32)
        self.held_S = integers()  # pages of the table in use
        self.temperature_S, self.top_p_S, self.min_p_S = (np.zeros(slots, dtype=np.float32) for _ in range(3))
        self.top_k_S, self.seed_S = integers(), integers()
        # How many likeliest tokens' log-probabilities are wanted, beside the drawn one's; -1: none.
        self.logprobs_S = integers() - 1
        self.stop_SN = integers(1) - 1  # padded with -1, which is no token
        self.ended_S = np.zeros(slots, dtype=bool)
        self.draft_SG = np.zeros((slots, drafts), dtype=np.int32)
        self.drafts_S = integers()  # tokens of the row above that wait to be verified
        # Positions from here to the newest cached one are in the draft module's cache; -1: none are.
        self.drafted_from_S = integers() - 1
        self.draft_counts_S = integers(2)  # tokens drafted and accepted

    def enter(self, slot: int, request: Request, tokens: list[int], limit: int, stop_ids: list[int]) -> None:
        """Put a sequence into a free slot; nothing of it is in the cache yet."""
        self.tokens_SW[slot, : len(tokens)] = tokens
        self.length_S[slot], self.prompt_S[slot], self.limit_S[slot] = len(tokens), len(request.prompt_ids), limit
        self.temperature_S[slot], self.top_p_S[slot] = request.temperature, request.top_p
        self.min_p_S[slot], self.top_k_S[slot], self.seed_S[slot] = request.min_p, request.top_k, request.seed
        self.logprobs_S[slot] = -1 if request.logprobs is None else request.logprobs
        if len(stop_ids) > self.stop_SN.shape[1]:
            wider = len(stop_ids) - self.stop_SN.shape[1]
            self.stop_SN = np.pad(self.stop_SN, ((0, 0), (0, wider)), constant_values=-1)
        self.stop_SN[slot] = -1
        self.stop_SN[slot, : len(stop_ids)] = stop_ids
        self.ended_S[slot] = False
        self.table_SP[slot] = 0
        self.cached_S[slot] = self.held_S[slot] = self.drafts_S[slot] = 0
        self.drafted_from_S[slot] = -1
        self.draft_counts_S[slot] = 0

    def add_page(self, slot: int, page: int) -> None:
        """The next page of the sequence in `slot`."""
        self.table_SP[slot, self.held_S[slot]] = page
        self.held_S[slot] += 1

    def pages(self, slot: int) -> list[int]:
        """The pages that the sequence in `slot` holds."""
        return self.table_SP[slot, : self.held_S[slot]].tolist()

    def tokens(self, slot: int, first: int = 0) -> list[int]:
        """The tokens of the sequence in `slot` from position `first` on."""
        return self.tokens_SW[slot, first : self.length_S[slot]].tolist()
