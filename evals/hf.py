"""A transformers model as a backend: students, their bases, and any other dense causal model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

from evals.decode import Decoder, Request
from evals.lm import Answer, Ask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# from_pretrained sets the process's default dtype for a moment, so two threads must not load at once.
_loading = threading.Lock()


class HFBackend:
    """Sampling from a model with its tokenizer; see evals.lm.Backend.

    load_model: called once, when something is to be generated, so that going on from finished samples loads nothing.
    chat_template: replaces the tokenizer's own, so that a base is asked in the form its student was trained on.
    Raises ValueError if there is no chat template, and from generate() what load_model raises.
    """

    def __init__(
        self,
        tokenizer: Any,
        load_model: Callable[[], PreTrainedModel],
        *,
        batch_size: int = 256,
        device: str = "cpu",
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer, self._load_model, self.batch_size, self.device = tokenizer, load_model, batch_size, device
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        if not tokenizer.chat_template:
            raise ValueError(f"{tokenizer.name_or_path}: no chat template, so the model cannot be asked")

    @cached_property
    def decoder(self) -> Decoder:
        with _loading:
            model = self._load_model().to(self.device)
        return Decoder(model, self.batch_size)

    def render(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def generate(self, asks: Iterable[Ask]) -> Iterator[Answer]:
        """A prompt that fills the context is answered 'prompt_too_long', with no text."""
        model = self.decoder.model
        limit, stop_ids = model.config.max_position_embeddings, _stop_ids(model, self.tokenizer)
        requests = []
        for ask in asks:
            # The template wrote the special tokens, so none may be added again (a second BOS changes the answer).
            prompt_ids = self.tokenizer(ask.prompt, add_special_tokens=False)["input_ids"]
            room = min(ask.max_tokens, limit - len(prompt_ids))
            if room < 1:
                yield Answer(ask.id, "", "prompt_too_long", 0, 0.0)
                continue
            requests.append(Request(ask.id, prompt_ids, ask.temperature, ask.top_p, room, ask.seed, stop_ids))
        for done in self.decoder.generate(requests):
            text = self.tokenizer.decode(done.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            yield Answer(done.id, text, done.finish_reason, len(done.token_ids), done.seconds)


def _stop_ids(model: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    """End-of-sequence ids of the generation config, and the tokenizer's own."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    ids.discard(None)
    if not ids:
        raise ValueError(f"{model.config.name_or_path}: neither generation config nor tokenizer names an end token")
    return tuple(sorted(ids))
