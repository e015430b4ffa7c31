"""Which sequences run: admission by what the cache holds, prefix sharing, chunks of prefill, preemption.

A request waits until there is a slot and room in the cache for its prompt. Sequences then take a page whenever they
have filled one; if none is left, the one that came last gives its pages back and waits again. It loses no token: its
draws depend on its seed and their number only, so it goes on where it was.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from teacher.decoding import Followers
from teacher.pages import PagePool
from teacher.requests import Request, TokenLogprobs
from teacher.slots import Slots
from teacher.text import TextStream


@dataclass(eq=False)
class Sequence:
    """A request that has not ended, and what it has so far."""

    request: Request
    tokens: list[int]  # prompt and drawn tokens; up to date only while it waits
    stop_ids: list[int]
    limit: int  # most tokens of prompt and completion
    slot: int = -1
    entered: float | None = None  # when it first left the queue
    cached_tokens: int = 0
    serial: int = 0  # of its last indexed page
    shown: int = 0  # drawn tokens that an update has carried
    stream: TextStream | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)


_PATIENCE = 32  # steps


class Scheduler:
    """Slots, pages and the queue.

    `refill`: slots that must be free before new sequences enter, unless none runs or they wait for _PATIENCE steps.
    """

    def __init__(self, slots: Slots, pool: PagePool, refill: int, drafts: int) -> None:
        self.slots, self.pool, self.refill, self.drafts = slots, pool, refill, drafts
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order of entering
        self.prefilling: list[Sequence] = []
        self.preempted = 0
        self._held_back = 0  # steps in which somebody waited beside a free slot
        self._free = list(range(len(slots.length_S) - 1, -1, -1))
        self._indexed_S = np.zeros(len(slots.length_S), dtype=np.int64)
        self._followers: dict[Sequence, list[Sequence]] = {}
        self._leaders: dict[tuple[int, ...], Sequence] = {}

    def admit(self) -> None:
        """Give slots to waiting sequences, in order, as long as there is room."""
        live = len(self.running) + len(self.prefilling)
        if live and len(self._free) < self.refill and self._held_back < _PATIENCE:
            self._held_back += bool(self.waiting and self._free)
            return
        self._held_back = 0
        while self.waiting and self._free:
            if not self._enter(self.waiting[0]):
                assert self.running or self.prefilling, "the cache is empty, and yet too small"
                return
            self.waiting.popleft()

    def _enter(self, sequence: Sequence) -> bool:
        leader = self._leaders.get(tuple(sequence.tokens))
        if leader is not None:
            self._followers.setdefault(leader, []).append(sequence)
            self._take_slot(sequence)
            return True
        size = self.pool.page_size
        shared, serial = self.pool.find(sequence.tokens, (len(sequence.tokens) - 1) // size)
        for page in shared:
            self.pool.hold(page)
        needed = self._pages_for(len(sequence.tokens) + 1) - len(shared)
        # Leave some for those that run already: to admit one and preempt it at once is work for nothing.
        if self.pool.available < needed + len(self.running) // 8:
            self.pool.release(shared)
            return False
        self._take_slot(sequence)
        slot = sequence.slot
        for page in shared:
            self.slots.add_page(slot, page)
        for _ in range(needed):
            self.slots.add_page(slot, self.pool.take())
        sequence.serial = serial
        self._indexed_S[slot] = len(shared)
        self.slots.cached_S[slot] = len(shared) * size
        undrafted = self.pool.undrafted(shared)
        if undrafted < len(shared):
            self.slots.drafted_from_S[slot] = undrafted * size
        sequence.cached_tokens = max(sequence.cached_tokens, len(shared) * size)
        self.prefilling.append(sequence)
        if len(sequence.tokens) == len(sequence.request.prompt_ids):
            self._leaders[tuple(sequence.tokens)] = sequence
        return True

    def _take_slot(self, sequence: Sequence) -> None:
        sequence.slot = self._free.pop()
        if sequence.entered is None:
            sequence.entered = time.perf_counter()
        self.slots.enter(sequence.slot, sequence.request, sequence.tokens, sequence.limit, sequence.stop_ids)
        self._indexed_S[sequence.slot] = 0

    def chunks(self, most: int) -> tuple[list[Sequence], np.ndarray, Followers]:
        """The next prefill, at most `most` tokens: sequences, how many tokens of each, and who starts as a copy."""
        chosen, counts = [], []
        followers: Followers = {}
        for sequence in self.prefilling:
            if most <= 0:
                break
            pending = int(self.slots.length_S[sequence.slot] - self.slots.cached_S[sequence.slot])
            count = min(pending, most)
            most -= count
            chosen.append(sequence)
            counts.append(count)
            if count == pending and sequence in self._followers:
                followers[sequence.slot] = self._copies(sequence)
        return chosen, np.array(counts, dtype=np.int64), followers

    def _copies(self, leader: Sequence) -> tuple[list[int], list[tuple[int, int]]]:
        """Give pages to the sequences that start as copies of this one; those that find none wait again."""
        slots, size = self.slots, self.pool.page_size
        full, pages = len(leader.tokens) // size, self.slots.pages(leader.slot)
        started, copies = [], []
        for sequence in self._followers[leader]:
            needed = self._pages_for(len(leader.tokens) + 1) - full
            if self.pool.available < needed:
                self._free.append(sequence.slot)
                sequence.slot = -1
                self.waiting.appendleft(sequence)
                continue
            for page in pages[:full]:
                self.pool.hold(page)
                slots.add_page(sequence.slot, page)
            for _ in range(needed):
                slots.add_page(sequence.slot, self.pool.take())
            if len(leader.tokens) % size:
                copies.append((pages[full], int(slots.table_SP[sequence.slot, full])))
            # The leader's full pages are, or are about to be, in the index under the leader's keys, and under no other.
            sequence.serial, self._indexed_S[sequence.slot] = leader.serial, self._indexed_S[leader.slot]
            sequence.cached_tokens = len(leader.tokens)
            started.append(sequence.slot)
        self._followers[leader] = [sequence for sequence in self._followers[leader] if sequence.slot >= 0]
        return started, copies

    def prefilled(self, drew: Container[int]) -> None:
        """After a prefill: sequences in the slots that `drew` their first token run, with their followers."""
        for sequence in self.prefilling:
            if sequence.slot in drew:
                self._leaders.pop(tuple(sequence.tokens), None)
                self.running += [sequence, *self._followers.pop(sequence, ())]
        there = set(map(id, self.running))
        self.prefilling = [sequence for sequence in self.prefilling if id(sequence) not in there]

    def grow(self) -> None:
        """See that every running sequence has pages for the tokens that the next round may bring it."""
        slots = self.slots
        rows_B = np.array([sequence.slot for sequence in self.running], dtype=np.int64)
        needed_B = self._pages_for(slots.length_S[rows_B])
        short = np.nonzero(slots.held_S[rows_B] < needed_B)[0].tolist()
        for sequence, needed in [(self.running[row], int(needed_B[row])) for row in short]:
            while sequence.slot >= 0 and slots.held_S[sequence.slot] < needed:
                if self.pool.available:
                    slots.add_page(sequence.slot, self.pool.take())
                else:
                    self._preempt()

    def _pages_for(self, length: Any) -> Any:
        """Pages for a sequence of so many tokens (a number or an array) and the drafts of the next round."""
        # A round writes the newest token and the drafts behind it, and drafts from there as many again.
        room = np.minimum(length + 2 * self.drafts, self.slots.tokens_SW.shape[1])
        return -(-room // self.pool.page_size)

    def _preempt(self) -> None:
        """The sequence that came last gives up its pages and waits, first in the queue."""
        victim = (self.prefilling or self.running)[-1]
        victim.tokens = self.slots.tokens(victim.slot)
        self.preempted += 1
        self.leave(victim)
        self.waiting.appendleft(victim)

    def leave(self, sequence: Sequence) -> None:
        """Take a sequence out of its slot, or out of the queue. Followers of one that has not run yet wait again."""
        if sequence.slot < 0:
            self.waiting.remove(sequence)
            return
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.prefilling:
            self.prefilling.remove(sequence)
            self._leaders.pop(tuple(sequence.tokens), None)
            for follower in reversed(self._followers.pop(sequence, [])):
                self._free.append(follower.slot)
                follower.slot = -1
                self.waiting.appendleft(follower)
        else:
            next(others for others in self._followers.values() if sequence in others).remove(sequence)
        self.pool.release(self.slots.pages(sequence.slot))
        self._free.append(sequence.slot)
        sequence.slot = -1

    def index_pages(self) -> None:
        """Enter the pages that were filled, so that others find them."""
        slots, size = self.slots, self.pool.page_size
        live = self.running + self.prefilling
        rows_B = np.array([sequence.slot for sequence in live], dtype=np.int64)
        for row in np.nonzero(slots.cached_S[rows_B] // size > self._indexed_S[rows_B])[0].tolist():
            sequence, slot = live[row], int(rows_B[row])
            for number in range(int(self._indexed_S[slot]), int(slots.cached_S[slot]) // size):
                tokens = slots.tokens_SW[slot, number * size : (number + 1) * size].tolist()
                drafted = 0 <= slots.drafted_from_S[slot] <= number * size
                page = int(slots.table_SP[slot, number])
                sequence.serial = self.pool.index(page, sequence.serial, tokens, bool(drafted))
                self._indexed_S[slot] = number + 1
