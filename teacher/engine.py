"""Generation on one device: continuous batching over a latent cache.

A fixed number of slots decode together, one token a step. A slot whose request has finished is filled by the next
request at once, so the batch stays full until the requests run out. Slots in use are kept at the front of the cache
(the last one moves into the gap), so every step works on plain slices, and attention reads no further than the longest
live sequence. Samples of one prompt that start together share its prefill.

Shapes: S slots, A of them in use, P distinct prompts, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from teacher.cache import LatentCache
from teacher.model import DeepseekV3
from teacher.requests import Completion, Request
from teacher.slots import Slots

__all__ = ["Completion", "Engine", "Request"]


class Engine:
    """Generates with `model` on the device where it lies.

    `tokenizer_or_eos` says what ends a completion when the request does not: a tokenizer (its eos_token_id), a token
    id, several, or None for the model config's. `max_len` bounds prompt plus completion, and is the cache's size a
    slot; it is allocated by each `generate`. Raises ValueError on sizes that the model cannot have.
    """

    def __init__(
        self,
        model: DeepseekV3,
        tokenizer_or_eos: Any = None,
        batch_size: int = 256,
        max_len: int | None = None,
    ) -> None:
        context = model.config.max_position_embeddings
        max_len = context if max_len is None else max_len
        if not 2 <= max_len <= context:
            raise ValueError(f"max_len is {max_len}; expected 2 to {context}, the model's max_position_embeddings")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        self.model = model
        self.batch_size, self.max_len = batch_size, max_len
        self.stop_ids = _stop_ids(model.config.eos_token_id if tokenizer_or_eos is None else tokenizer_or_eos)

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield each completion as it finishes. `requests` is read as slots become free.

        A completion also ends, by length, when prompt and completion fill `max_len`. Raises ValueError for a request
        that cannot be served (see `check`) when it is read.
        """
        waiting = iter(requests)
        weight = self.model.lm_head.weight
        cache = LatentCache(self.model.config, self.batch_size, self.max_len, weight.dtype, weight.device)
        slots = Slots(cache)
        # Few, larger prefills: waiting for a sixteenth of the slots costs 3% of the batch and saves most of the calls.
        refill = max(1, self.batch_size // 16)
        exhausted = False
        while True:
            free = self.batch_size - slots.used
            if not exhausted and (free >= refill or slots.used == 0):
                new = list(islice(waiting, free))
                exhausted = len(new) < free
                for request in new:
                    self.check(request)
                if new:
                    self._prefill(slots, new)
                    yield from self._retire(slots)
                    continue
            if slots.used == 0:
                return
            self._decode(slots)
            yield from self._retire(slots)

    def check(self, request: Request) -> None:
        """Raise ValueError, naming the request and the setting, for one that cannot be served."""
        problem = None
        if not request.prompt_ids:
            problem = "its prompt is empty"
        elif len(request.prompt_ids) >= self.max_len:
            problem = f"its prompt has {len(request.prompt_ids)} tokens; expected fewer than max_len ({self.max_len})"
        elif not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self.model.config.vocab_size:
            problem = f"its prompt has token ids outside the vocabulary of {self.model.config.vocab_size}"
        elif not request.temperature >= 0:
            problem = f"temperature is {request.temperature}; expected 0 or more"
        elif not 0 < request.top_p <= 1:
            problem = f"top_p is {request.top_p}; expected above 0, at most 1"
        elif request.top_k < 0:
            problem = f"top_k is {request.top_k}; expected 0 (no limit) or more"
        elif request.max_tokens < 1:
            problem = f"max_tokens is {request.max_tokens}; expected at least 1"
        elif not -(2**63) <= request.seed < 2**63:
            problem = f"seed is {request.seed}; expected a 64-bit integer"
        if problem:
            raise ValueError(f"request {request.id!r} cannot be served: {problem}")

    @torch.inference_mode()
    def _prefill(self, slots: Slots, new: list[Request]) -> None:
        """Run each distinct prompt once, give every request a slot behind those in use, and draw its first token."""
        prompts: dict[tuple[int, ...], int] = {}
        row_of = [prompts.setdefault(tuple(request.prompt_ids), len(prompts)) for request in new]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        # Padding on the right: causal attention keeps it away from real tokens, and decoding overwrites it.
        padded_PT = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            padded_PT[row, : len(prompt)] = torch.tensor(prompt)
        device = self.model.lm_head.weight.device
        output = self.model(padded_PT.to(device), logits=False)
        last_P = (lengths - 1).to(device)
        logits_PV = self.model.lm_head(output.hidden[torch.arange(len(prompts), device=device), last_P])
        rows = torch.tensor(row_of, device=device)
        first = slots.used
        slots.cache.write_prompts(output.latents, rows, first)
        slots.enter(new, self.stop_ids)
        slots.append(first, logits_PV[rows])

    @torch.inference_mode()
    def _decode(self, slots: Slots) -> None:
        """One token for every slot in use."""
        used = slots.used
        logits_AV = self.model.decode(
            slots.last_S[:used], slots.length_S[:used] - 1, slots.cache.latents_LSMC[:, :used], slots.longest()
        )
        slots.clock += 1
        slots.append(0, logits_AV)

    @torch.inference_mode()
    def _retire(self, slots: Slots) -> list[Completion]:
        """Take finished requests out of their slots."""
        done = slots.finished()
        completions = []
        for slot in done:
            request, tokens, stop_id = slots.result(slot)
            completions.append(
                Completion(
                    id=request.id,
                    token_ids=tokens,
                    finish_reason="length" if stop_id is None else "stop",
                    stop_id=stop_id,
                    prompt_tokens=len(request.prompt_ids),
                    seconds=time.perf_counter() - slots.entered[slot],
                )
            )
        for slot in reversed(done):
            slots.leave(slot)
        return completions


def _stop_ids(source: Any) -> list[int]:
    """Token ids from a tokenizer, an id, several ids, or None."""
    found = getattr(source, "eos_token_id", source)
    if found is None:
        return []
    return [int(found)] if isinstance(found, int) else [int(token) for token in found]
