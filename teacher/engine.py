"""Generation on one device: continuous batching over a paged latent cache.

A step admits waiting requests, runs a chunk of the prompts that are not in the cache yet, and then brings every running
sequence a token (or several, with MTP speculation). A place that becomes free is filled by the next request, so the
batch stays full until the requests run out. Where things are: scheduler.py (admission, prefix sharing, preemption),
pages.py, cache.py, decoding.py (a round of drawing and drafting), runners.py (the model: torch, CUDA graphs, C).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch

from teacher.cache import LatentCache, row_size
from teacher.decoding import Round, decode, prefill
from teacher.model import DeepseekV3
from teacher.pages import PagePool
from teacher.requests import Completion, EngineStats, FinishReason, Request, Update, problem_with
from teacher.runners import decodes_by_kernel, runners
from teacher.scheduler import Scheduler, Sequence
from teacher.slots import Slots
from teacher.text import TextStream

__all__ = ["Completion", "Engine", "Request"]

_CPU_CACHE_BYTES = 1024**3
_GPU_CACHE_SHARE = 0.8  # of what is free when the engine is made
_ROWS_A_THREAD = 16  # a group smaller than this is not worth another thread


class Engine:
    """Generates with `model` on the device where it lies. One thread at a time may call it.

    `tokenizer_or_eos` says what ends a completion when the request does not: a tokenizer (its eos_token_id; stop
    strings and text need one), a token id, several, or None for the model config's. At most `batch_size` sequences run
    together, of at most `max_len` tokens each (default: the model's context). `cache_tokens` is the room of the cache
    (default: what they need, at most 1 GiB, on a GPU at most 80% of the free memory). `prefill_tokens` bounds the
    prompt tokens of a step. `speculate` is how many tokens the MTP module drafts a step, while no more than
    `speculate_rows` sequences run. `threads` CPU threads each take a share of the sequences (default: torch's number).
    `native` lets a float32 model on a CPU run in C (see teacher/native) where there is a compiler, `graphs` a bf16
    model on a GPU by CUDA graphs, `kernels` its attention, and with it the rest of a step of few tokens, by kernels
    (which may put weights side by side in memory); `runs_in` says what came of it. `cache_dtype`
    "fp8" keeps 656 bytes a token and layer of DeepSeek-V3's sizes instead of 1,152, at e4m3's precision. `page_size`
    is 64 where the kernel reads the cache, else 16. A change of the weights wants a new engine.
    Raises ValueError on sizes that the model cannot have.
    """

    def __init__(
        self,
        model: DeepseekV3,
        tokenizer_or_eos: Any = None,
        batch_size: int = 256,
        max_len: int | None = None,
        *,
        cache_tokens: int | None = None,
        page_size: int | None = None,
        prefill_tokens: int = 8192,
        speculate: int = 0,
        speculate_rows: int = 8,
        threads: int | None = None,
        native: bool = True,
        graphs: bool = True,
        kernels: bool = True,
        cache_dtype: Literal["model", "fp8"] = "model",
    ) -> None:
        context = model.config.max_position_embeddings
        max_len = context if max_len is None else max_len
        if not 2 <= max_len <= context:
            raise ValueError(f"max_len is {max_len}; expected 2 to {context}, the model's max_position_embeddings")
        threads = torch.get_num_threads() if threads is None else threads
        if cache_dtype not in ("model", "fp8"):
            raise ValueError(f"cache_dtype is {cache_dtype!r}; expected 'model' or 'fp8'")
        weight = model.lm_head.weight
        kept = torch.uint8 if cache_dtype == "fp8" else weight.dtype
        kernels = kernels and decodes_by_kernel(model, kept, page_size or 64)
        page_size = (64 if kernels else 16) if page_size is None else page_size
        sizes = {"batch_size": batch_size, "page_size": page_size, "prefill_tokens": prefill_tokens, "threads": threads}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if speculate < 0 or (speculate and not model.mtp_layers):
            raise ValueError(f"speculate is {speculate}; expected 0 without MTP weights, else 0 or more")
        if cache_tokens is not None and cache_tokens < 2:
            raise ValueError(f"cache_tokens is {cache_tokens}; expected at least 2")
        self.model, self.batch_size = model, batch_size
        self.tokenizer = tokenizer_or_eos if hasattr(tokenizer_or_eos, "eos_token_id") else None
        self.stop_ids = _stop_ids(model.config.eos_token_id if tokenizer_or_eos is None else tokenizer_or_eos)
        self.speculate, self.speculate_rows, self.prefill_tokens = speculate, speculate_rows, prefill_tokens
        layers = model.config.num_hidden_layers + (speculate > 0)
        most = batch_size * (-(-max_len // page_size))
        if cache_tokens is not None:
            pages = min(most, -(-cache_tokens // page_size))
        else:
            page_bytes = layers * page_size * row_size(model.config, kept) * kept.itemsize
            pages = max(1, min(most, _memory_for_cache(weight.device) // page_bytes))
        self.max_len = min(max_len, pages * page_size)
        self._pool = PagePool(pages, page_size)
        self._slots = Slots(batch_size, self.max_len, page_size, speculate)
        # Few, larger prefills: waiting for a sixteenth of the slots costs 3% of the batch and saves most of the calls.
        self._scheduler = Scheduler(self._slots, self._pool, max(1, batch_size // 16), speculate)
        self._cache = LatentCache(model.config, layers, pages, page_size, kept, weight.device)
        self._threads = threads if weight.device.type == "cpu" else 1
        self._pool_of_threads = (
            ThreadPoolExecutor(self._threads, "engine", torch.set_num_threads, (1,)) if self._threads > 1 else None
        )
        self._runners = runners(model, self._cache, self._threads, native, graphs, kernels)
        self.runs_in = self._runners[0].name
        self._live: dict[str, Sequence] = {}
        self._cancelled: list[str] = []
        self._awaited: set[str] = set()  # what generations wait for
        self._ended: dict[str, Completion] = {}  # and of it, what they have not taken yet
        self._counts = {"prompt": 0, "cached": 0, "generated": 0, "drafted": 0, "accepted": 0}

    # What a caller does

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield each completion as it finishes. `requests` is read as slots become free.

        A completion also ends, by length, when prompt and completion fill `max_len`. Raises ValueError for a request
        that cannot be served (see `check`) when it is read. An iterator that is closed early cancels what it started.
        """
        self._end_cancelled()  # what an earlier iterator left would stand in the way of requests of the same names
        waiting = iter(requests)
        mine: set[str] = set()
        exhausted = False
        try:
            while True:
                if not exhausted and len(self._live) < self.batch_size:
                    new = list(islice(waiting, self.batch_size - len(self._live)))
                    exhausted = not new
                    for request in new:
                        self.add(request)
                        mine.add(request.id)
                        self._awaited.add(request.id)
                if exhausted and not mine:
                    return
                self.step()
                # The step that ended one of these may have been another generation's.
                for identity in [identity for identity in self._ended if identity in mine]:
                    mine.remove(identity)
                    self._awaited.remove(identity)
                    yield self._ended.pop(identity)
        finally:
            for identity in mine:
                self._awaited.remove(identity)
                self._ended.pop(identity, None)
                self.cancel(identity)

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError if it cannot be served, or if its id is that of a live one."""
        self.check(request)
        if request.id in self._live:
            raise ValueError(f"request {request.id!r} cannot be served: another with this id has not ended")
        prompt = list(request.prompt_ids)
        stop_ids = self.stop_ids if request.stop_ids is None else request.stop_ids
        stop_ids = sorted({token for token in stop_ids if 0 <= token < self.model.config.vocab_size})
        sequence = Sequence(request, prompt, stop_ids, min(len(prompt) + request.max_tokens, self.max_len))
        if request.stop or request.text:
            sequence.stream = TextStream(self.tokenizer, request.stop)
        self._live[request.id] = sequence
        self._scheduler.waiting.append(sequence)
        self._counts["prompt"] += len(prompt)

    def cancel(self, identity: str) -> bool:
        """End a live request at the next step, with what it has; False if there is none of this id."""
        if identity not in self._live:
            return False
        self._cancelled.append(identity)
        return True

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._live)

    def stats(self) -> EngineStats:
        """Counts so far, and what is held now."""
        running = len(self._scheduler.running) + len(self._scheduler.prefilling)
        used = (self._pool.pages - self._pool.available) * self._pool.page_size
        counts = self._counts
        return EngineStats(
            waiting=len(self._live) - running, running=running, preempted=self._scheduler.preempted,
            cache_tokens_total=self._pool.pages * self._pool.page_size, cache_tokens_used=used,
            prompt_tokens=counts["prompt"], cached_prompt_tokens=counts["cached"],
            generated_tokens=counts["generated"], drafted=counts["drafted"], accepted=counts["accepted"],
        )  # fmt: skip

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of the cache that one token takes, all layers together (and the draft module's, if it is used)."""
        return self._cache.bytes_per_token

    def check(self, request: Request) -> None:
        """Raise ValueError, naming the request and the setting, for one that cannot be served."""
        problem = problem_with(request, self.max_len, self.model.config.vocab_size, self.tokenizer is not None)
        if problem:
            raise ValueError(f"request {request.id!r} cannot be served: {problem}")

    # A step

    def step(self) -> list[Update]:
        """Let every sequence go on by a round. Returns the updates of those that ended or that stream."""
        scheduler = self._scheduler
        updates = self._end_cancelled()
        scheduler.admit()
        if scheduler.prefilling:
            sequences, count_B, followers = scheduler.chunks(self.prefill_tokens)
            rows_B = np.array([sequence.slot for sequence in sequences], dtype=np.int64)
            drafts = self._drafts(len(scheduler.running) + len(scheduler.prefilling))
            done = self._run(prefill, rows_B, count_B, followers, drafts)
            scheduler.prefilled(done.new)
            updates += self._after(done)
        if scheduler.running:
            scheduler.grow()
            rows_B = np.array([sequence.slot for sequence in scheduler.running], dtype=np.int64)
            updates += self._after(self._run(decode, rows_B, self._drafts(len(rows_B))))
        return updates

    def _end_cancelled(self) -> list[Update]:
        names = [name for name in dict.fromkeys(self._cancelled) if name in self._live]
        self._cancelled.clear()
        return [self._end(self._live[name], "cancelled") for name in names]

    def _drafts(self, rows: int) -> int:
        return self.speculate if rows <= self.speculate_rows else 0

    def _run(self, work: Any, rows_B: np.ndarray, *rest: Any) -> Round:
        """Deal the sequences to the threads, each a share of about as many, and put together what they bring."""
        groups = min(self._threads, -(-len(rows_B) // _ROWS_A_THREAD))
        if groups <= 1 or self._pool_of_threads is None:
            return work(self._runners[0], self._slots, rows_B, *rest)
        ends = [len(rows_B) * (n + 1) // groups for n in range(groups)]
        futures = []
        for runner, first, end in zip(self._runners, [0, *ends], ends, strict=False):
            share = [x[first:end] if isinstance(x, np.ndarray) else x for x in rest]
            futures.append(self._pool_of_threads.submit(work, runner, self._slots, rows_B[first:end], *share))
        whole = Round({}, {})
        for future in futures:
            part = future.result()
            whole.new.update(part.new)
            whole.logprobs.update(part.logprobs)
        return whole

    def _after(self, done: Round) -> list[Update]:
        """Take note of a round's tokens: pages to index, texts to stream, sequences that have ended."""
        slots, scheduler = self._slots, self._scheduler
        scheduler.index_pages()
        self._counts["generated"] += sum(done.new.values())
        updates = []
        for sequence in list(scheduler.running):
            slot = sequence.slot
            new = done.new.get(slot)
            if new is None:
                continue
            sequence.logprobs += done.logprobs.get(slot, ())
            if sequence.stream is not None or sequence.request.stream:
                update = self._stream(sequence, new)
                if update is not None:
                    updates.append(update)
            elif slots.ended_S[slot]:
                updates.append(self._end(sequence, "stop" if _stop_id(slots, sequence) is not None else "length"))
        return updates

    def _stream(self, sequence: Sequence, new: int) -> Update | None:
        """Show the tokens of a round, or only decode them; ends the sequence if it has ended."""
        slots, slot = self._slots, sequence.slot
        stop_id = _stop_id(slots, sequence) if slots.ended_S[slot] else None
        tokens = slots.tokens(slot, int(slots.length_S[slot]) - new)
        text = ""
        if sequence.stream is not None:
            text = sequence.stream.push(tokens[:-1] if stop_id is not None else tokens)
            if sequence.stream.stop_text is not None:
                # What was drawn behind the stop string does not count.
                slots.length_S[slot] = slots.prompt_S[slot] + sequence.stream.tokens
                return self._end(sequence, "stop", text)
        if slots.ended_S[slot]:
            return self._end(sequence, "stop" if stop_id is not None else "length", text)
        if not sequence.request.stream:
            return None
        first = sequence.shown
        sequence.shown = int(slots.length_S[slot] - slots.prompt_S[slot])
        unseen = slots.tokens(slot, int(slots.prompt_S[slot]) + first)
        return Update(sequence.request.id, unseen, text, sequence.logprobs[first : sequence.shown])

    def _end(self, sequence: Sequence, reason: FinishReason, text: str = "") -> Update:
        """Take a sequence out and say what came of it."""
        slots, slot, request = self._slots, sequence.slot, sequence.request
        stop_id = stop_text = None
        if slot >= 0:
            drawn = slots.tokens(slot, len(request.prompt_ids))
            if reason == "stop" and (sequence.stream is None or sequence.stream.stop_text is None):
                stop_id = drawn.pop()
            drafted, accepted = slots.draft_counts_S[slot].tolist()
            self._counts["drafted"] += drafted
            self._counts["accepted"] += accepted
        else:
            drawn = sequence.tokens[len(request.prompt_ids) :]
        self._counts["cached"] += min(sequence.cached_tokens, len(request.prompt_ids))
        if sequence.stream is not None:
            text += sequence.stream.flush()
            text = text if request.stream else sequence.stream.text
            stop_text = sequence.stream.stop_text
        self._scheduler.leave(sequence)
        del self._live[request.id]
        completion = Completion(
            id=request.id,
            token_ids=drawn,
            finish_reason=reason,
            stop_id=stop_id,
            prompt_tokens=len(request.prompt_ids),
            seconds=0.0 if sequence.entered is None else time.perf_counter() - sequence.entered,
            text=None if sequence.stream is None else sequence.stream.text,
            stop_text=stop_text,
            logprobs=None if request.logprobs is None else sequence.logprobs[: len(drawn)],
            cached_tokens=min(sequence.cached_tokens, len(request.prompt_ids)),
        )
        if request.id in self._awaited:
            self._ended[request.id] = completion
        first = sequence.shown
        return Update(request.id, drawn[first:], text, sequence.logprobs[first : len(drawn)], completion)


def _stop_id(slots: Slots, sequence: Sequence) -> int | None:
    """The newest token, if it is one that ends the sequence."""
    last = int(slots.tokens_SW[sequence.slot, slots.length_S[sequence.slot] - 1])
    return last if last in sequence.stop_ids else None


def _memory_for_cache(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _GPU_CACHE_SHARE)
    return _CPU_CACHE_BYTES


def _stop_ids(source: Any) -> list[int]:
    """Token ids from a tokenizer, an id, several ids, or None."""
    found = getattr(source, "eos_token_id", source)
    if found is None:
        return []
    return [int(found)] if isinstance(found, int) else [int(token) for token in found]
