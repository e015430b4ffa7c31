"""Batched sampling from a dense transformers model: slots that are refilled as sequences end.

Untrained baselines ramble to the token limit while trained students stop after a few dozen tokens, so a batch that
runs until its longest member ends would spend most of its time on rows that are done. Here a finished row's slot goes
to the next request. Against HFLM's generate the other savings are: the cache is written in place instead of
concatenated at every token, and grouped queries share their keys without expanding them.

Legend: B rows of one call, N slots, K key-value heads, H query heads, T new positions, S cached positions, D head size.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from evals.sampling import draw, uniforms

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "distill_slots"


@dataclass(frozen=True)
class Request:
    """One sequence to sample. The same fields as the teacher's engine reads."""

    id: str
    prompt_ids: list[int]
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """`token_ids` are without the stop token; `finish_reason` is 'stop' or 'length'."""

    id: str
    token_ids: list[int]
    finish_reason: str
    seconds: float


@dataclass
class _Row:
    request: Request
    started: float
    tokens: list[int] = field(default_factory=list)


class SlotCache:
    """Keys and values of N slots, each a left-aligned sequence; what transformers' attention layers call `update` on.

    `rows` says what the next forward pass is: a prefill of these slots from position 0, or (None) one more token for
    each of the first slots, whose places `next_token` has set.
    """

    is_compileable = False

    def __init__(self, model: PreTrainedModel, slots: int, length: int) -> None:
        config = model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 2, slots, heads, length, size)
        # Zeros, not empty: masked positions get weight 0, and 0 times an uninitialised NaN would still be NaN.
        self.data = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.rows: torch.Tensor | None = None
        self.active = self.width = 0
        self.place_BK: torch.Tensor

    def next_token(self, position_B: torch.Tensor, width: int) -> None:
        """The next pass adds a token to each of the first B slots at these positions, all of them below `width`."""
        _, _, _, heads, length, _ = self.data.shape
        self.active, self.width = len(position_B), width
        head_BK = torch.arange(self.active * heads, device=position_B.device).view(self.active, heads)
        self.place_BK = head_BK * length + position_B[:, None]

    def update(
        self, key_BKTD: torch.Tensor, value_BKTD: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.data[layer]
        if self.rows is not None:
            length = key_BKTD.shape[2]
            keys[self.rows, :, :length] = key_BKTD
            values[self.rows, :, :length] = value_BKTD
            return key_BKTD, value_BKTD
        for cached, new in ((keys, key_BKTD), (values, value_BKTD)):
            # Rows of D numbers, in half of index_put's time
            size = new.shape[-1]
            cached.view(-1, size).index_copy_(0, self.place_BK.flatten(), new.reshape(-1, size))
        return keys[: self.active, :, : self.width], values[: self.active, :, : self.width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def move(self, source: int, target: int, length: int) -> None:
        self.data[:, :, target, :, :length] = self.data[:, :, source, :, :length]


def _attend(
    module: Any,
    query_BHTD: torch.Tensor,
    key_BKSD: torch.Tensor,
    value_BKSD: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for ATTENTION: at decode the queries of a group are taken as queries of one sequence."""
    batch, heads, length, size = query_BHTD.shape
    groups = heads // key_BKSD.shape[1]
    if length == 1:  # all queries of a group see the same keys and share a mask
        query_BHTD = query_BHTD.view(batch, key_BKSD.shape[1], groups, size)
    elif groups > 1:
        key_BKSD = key_BKSD.repeat_interleave(groups, dim=1)
        value_BKSD = value_BKSD.repeat_interleave(groups, dim=1)
    out = scaled_dot_product_attention(query_BHTD, key_BKSD, value_BKSD, attn_mask=attention_mask, scale=scaling)
    return out.reshape(batch, heads, length, size).transpose(1, 2), None


class Decoder:
    """`generate(requests)` yields each completion as it ends; a result depends on weights and request alone.

    model: a causal LM with full attention in every layer (Qwen2, Qwen3, Llama, Mistral without window, ...).
    Raises ValueError for other models.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int = 256) -> None:
        from transformers import AttentionInterface

        kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(
                f"{type(model).__name__} has layers of the types {sorted(kinds)}; expected full_attention in all"
            )
        AttentionInterface.register(ATTENTION, _attend)
        self.model = model.eval()
        self.batch_size = batch_size

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Sample every request. Order of the results: as they end."""
        # Longest prompts first: rows of a prefill then differ little in length.
        pending = deque(sorted(requests, key=lambda request: -len(request.prompt_ids)))
        if not pending:
            return
        longest = max(len(request.prompt_ids) + request.max_tokens for request in pending)
        slots = min(self.batch_size, len(pending))
        batch = _Batch(self.model, slots, longest)
        refill = max(1, slots // 16)  # a prefill costs about as much as a step, so not for every single slot
        while pending or batch.rows:
            free = slots - len(batch.rows)
            if pending and (free >= min(refill, len(pending)) or not batch.rows):
                batch.add([pending.popleft() for _ in range(min(free, len(pending)))])
            yield from batch.step()


class _Batch:
    """The rows being decoded: always the first slots of the cache."""

    def __init__(self, model: PreTrainedModel, slots: int, length: int) -> None:
        self.model = model
        self.cache = SlotCache(model, slots, length)
        self.rows: list[_Row] = []
        self.token = np.zeros(slots, np.int64)
        self.position = np.zeros(slots, np.int64)
        self.count = np.zeros(slots, np.int64)
        self.seed = np.zeros(slots, np.uint64)
        self.temperature = np.zeros(slots, np.float32)
        self.top_p = np.zeros(slots, np.float32)

    @torch.inference_mode()
    def add(self, requests: list[Request]) -> None:
        """Prefill new rows with all of their prompt but its last token, which the next step feeds like any other."""
        device, first = self.model.device, len(self.rows)
        longest = max(len(request.prompt_ids) for request in requests) - 1
        prompt = np.zeros((len(requests), longest), np.int64)
        now = time.monotonic()
        for row, request in enumerate(requests):
            prompt[row, : len(request.prompt_ids) - 1] = request.prompt_ids[:-1]
            slot = first + row
            self.token[slot], self.position[slot] = request.prompt_ids[-1], len(request.prompt_ids) - 1
            self.count[slot], self.seed[slot] = 0, request.seed
            self.temperature[slot], self.top_p[slot] = request.temperature, request.top_p
            self.rows.append(_Row(request, now))
        if longest == 0:
            return
        self.cache.rows = torch.arange(first, len(self.rows), device=device)
        # Padding is on the right, behind everything that is read, so the mask is the plain causal one.
        causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()[None, None]
        self._forward(torch.from_numpy(prompt).to(device), torch.arange(longest, device=device)[None], causal)
        self.cache.rows = None

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """One token for every row; returns the completions that ended with it and gives their slots free."""
        device, active = self.model.device, len(self.rows)
        position_B = torch.from_numpy(self.position[:active]).to(device)
        width = int(self.position[:active].max()) + 1
        self.cache.next_token(position_B, width)
        seen_BS = torch.arange(width, device=device)[None] <= position_B[:, None]
        mask = torch.zeros(seen_BS.shape, dtype=self.model.dtype, device=device).masked_fill_(~seen_BS, -torch.inf)
        token_B1 = torch.from_numpy(self.token[:active, None]).to(device)
        logits_BV = self._forward(token_B1, position_B[:, None], mask[:, None, None])
        uniform = uniforms(self.seed[:active], self.count[:active].astype(np.uint64))
        temperature_B, top_p_B, uniform_B = (
            torch.from_numpy(values).to(device) for values in (self.temperature[:active], self.top_p[:active], uniform)
        )
        drawn = draw(logits_BV, temperature_B, top_p_B, uniform_B).cpu().numpy()
        self.token[:active] = drawn
        self.position[:active] += 1
        self.count[:active] += 1
        ended: list[tuple[int, str]] = []
        for slot, (row, token) in enumerate(zip(self.rows, drawn.tolist(), strict=True)):
            if token in row.request.stop_ids:
                ended.append((slot, "stop"))
                continue
            row.tokens.append(token)
            if len(row.tokens) >= row.request.max_tokens:
                ended.append((slot, "length"))
        now = time.monotonic()
        done = [
            Completion(row.request.id, row.tokens, reason, now - row.started)
            for row, reason in ((self.rows[slot], reason) for slot, reason in ended)
        ]
        for slot, _ in reversed(ended):  # from the last, so that the row moved into a hole is never an ended one
            self._remove(slot)
        return done

    def _forward(self, ids_BT: torch.Tensor, position_BT: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) of the last position. A four-dimensional mask is taken by transformers as it is."""
        config = self.model.config
        usual, config._attn_implementation = config._attn_implementation, ATTENTION
        try:
            out = self.model(
                input_ids=ids_BT,
                position_ids=position_BT,
                attention_mask=mask,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        finally:
            config._attn_implementation = usual  # the caller's model goes on as it was
        return out.logits[:, -1]

    @torch.inference_mode()
    def _remove(self, slot: int) -> None:
        last = len(self.rows) - 1
        if slot != last:
            self.cache.move(last, slot, int(self.position[last]))
            self.rows[slot] = self.rows[last]
            for values in (self.token, self.position, self.count, self.seed, self.temperature, self.top_p):
                values[slot] = values[last]
        self.rows.pop()
