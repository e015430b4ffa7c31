"""Log-probabilities as the two endpoints show them, and those of a prompt, by the model's plain forward pass.

Shapes: B sequences, T tokens, P positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from teacher.requests import TokenLogprobs
from teacher.text import TextStream, token_bytes

if TYPE_CHECKING:
    from teacher.model import DeepseekV3

LOWEST = -9999.0  # for minus infinity, which JSON has not; vLLM's number
_TOKENS = 4096  # of a forward pass, padding counted
_LOGITS = 2**24  # at once in memory, 64 MB in fp32


def chat_entries(tokenizer: Any, ids: Sequence[int], found: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
    """choices[].logprobs.content of the chat endpoint."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(tokenizer, token)
        return {"token": raw.decode(errors="replace"), "logprob": max(LOWEST, logprob), "bytes": list(raw)}

    return [
        entry(token, item.logprob) | {"top_logprobs": [entry(*pair) for pair in item.top]}
        for token, item in zip(ids, found, strict=True)
    ]


class CompletionLogprobs:
    """choices[].logprobs of the completions endpoint; `text_offset` goes on from call to call."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._text = TextStream(tokenizer)
        self._offset = 0

    def entries(self, ids: Sequence[int], found: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """None for a token that nothing stands before."""
        offsets = []
        for token in ids:
            offsets.append(self._offset)
            self._offset += len(self._text.push([token]))
        return {
            "tokens": [self._name(token) for token in ids],
            "token_logprobs": [None if item is None else max(LOWEST, item.logprob) for item in found],
            "top_logprobs": [
                None if item is None else self._top(token, item) for token, item in zip(ids, found, strict=True)
            ],
            "text_offset": offsets,
        }

    def _top(self, token: int, item: TokenLogprobs) -> dict[str, float]:
        """The likeliest and the token itself, by name; of two with one name the likelier."""
        names: dict[str, float] = {}
        for other, logprob in [*item.top, (token, item.logprob)]:
            names.setdefault(self._name(other), max(LOWEST, logprob))
        return names

    def _name(self, token: int) -> str:
        """The token's text; bytes that are no text alone are spelt, as OpenAI does, so that names differ."""
        raw = token_bytes(self._tokenizer, token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


Scores = list[TokenLogprobs | None]


def passes(
    model: DeepseekV3, sequences: Sequence[Sequence[int]], top: int
) -> Iterator[Callable[[], list[tuple[int, Scores]]]]:
    """Forward passes that score the sequences, each to be called on the engine's thread: it gives, for some of the
    sequences by index, each token's log-probability after those before it and the `top` likeliest; None for the first.

    Sequences of like length share a pass, so that little of it is padding.
    """
    order = sorted(range(len(sequences)), key=lambda n: len(sequences[n]))
    group: list[int] = []
    for index in order:
        if group and (len(group) + 1) * len(sequences[index]) > _TOKENS:
            yield lambda group=group: _score(model, sequences, group, top)  # type: ignore[misc]
            group = []
        group.append(index)
    if group:
        yield lambda: _score(model, sequences, group, top)


@torch.inference_mode()
def _score(
    model: DeepseekV3, sequences: Sequence[Sequence[int]], group: list[int], top: int
) -> list[tuple[int, Scores]]:
    device = model.lm_head.weight.device
    ids_BT = torch.zeros(len(group), max(len(sequences[n]) for n in group), dtype=torch.long)
    for row, n in enumerate(group):
        ids_BT[row, : len(sequences[n])] = torch.tensor(sequences[n])  # padding on the right changes nothing before it
    ids_BT = ids_BT.to(device)
    hidden_BTH = model(ids_BT, logits=False).hidden
    vocabulary = model.lm_head.weight.shape[0]
    rows = max(1, _LOGITS // vocabulary)
    scored = []
    for row, n in enumerate(group):
        scores: Scores = [None]
        for start in range(0, len(sequences[n]) - 1, rows):
            end = min(start + rows, len(sequences[n]) - 1)
            logprobs_PV = model.lm_head(hidden_BTH[row, start:end]).float().log_softmax(-1)
            own_P = logprobs_PV.gather(-1, ids_BT[row, start + 1 : end + 1, None]).squeeze(-1)
            best, tokens = logprobs_PV.topk(min(top, vocabulary), dim=-1)
            for own, values, likeliest in zip(own_P.tolist(), best.tolist(), tokens.tolist(), strict=True):
                scores.append(TokenLogprobs(own, list(zip(likeliest, values, strict=True))))
        scored.append((n, scores))
    return scored
