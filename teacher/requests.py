"""What goes into the engine and what comes out. Free of torch, so that a command line may import it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Request:
    """One prompt to continue. `seed` alone decides the draws: samples of one prompt need different seeds."""

    id: str
    prompt_ids: Sequence[int]
    temperature: float = 0.6  # 0: always the most likely token
    top_p: float = 0.95
    top_k: int = 0  # 0: no limit
    max_tokens: int = 32768
    seed: int = 0  # any int64
    stop_ids: Sequence[int] | None = None  # None: the engine's


@dataclass(frozen=True)
class Completion:
    """A finished request."""

    id: str
    token_ids: list[int]  # without the stop token
    finish_reason: Literal["stop", "length"]
    stop_id: int | None  # the stop token that ended it
    prompt_tokens: int
    seconds: float  # from entering a slot to finishing, shared with the rest of the batch
