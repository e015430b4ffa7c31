"""A transformers checkpoint as a backend: students, their bases, and any other dense causal model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.decode import Decoder, Request
from evals.lm import Answer, Ask

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HFBackend:
    """Sampling from a loaded model with its tokenizer; see evals.lm.Backend.

    chat_template: used if the tokenizer has none of its own (bases of students that brought theirs).
    Raises ValueError if there is neither, or if the tokenizer has more tokens than the model.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, *, batch_size: int = 256, chat_template: str | None = None
    ) -> None:
        name = model.config.name_or_path or type(model).__name__
        if not tokenizer.chat_template:
            if chat_template is None:
                raise ValueError(f"{name}: the tokenizer has no chat template, so the model cannot be asked")
            tokenizer.chat_template = chat_template
        rows = model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > rows:
            raise ValueError(f"{name}: the tokenizer has {len(tokenizer)} tokens, the model only {rows}")
        self.tokenizer = tokenizer
        self.decoder = Decoder(model, batch_size)
        self.limit = model.config.max_position_embeddings
        self.stop_ids = _stop_ids(model, tokenizer)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        batch_size: int = 256,
        dtype: str = "float32",
        device: str = "cpu",
        chat_template: str | None = None,
    ) -> HFBackend:
        """Load a checkpoint folder (or hub name). Raises ValueError naming the folder if it is not whole."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), use_safetensors=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder}: not a loadable model folder: {str(error).splitlines()[0]}") from error
        return cls(model.to(device), tokenizer, batch_size=batch_size, chat_template=chat_template)

    def render(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def generate(self, asks: Iterable[Ask]) -> Iterator[Answer]:
        """A prompt that fills the context is answered 'prompt_too_long', with no text."""
        requests = []
        for ask in asks:
            # The template wrote the special tokens, so none may be added again (a second BOS changes the answer).
            prompt_ids = self.tokenizer(ask.prompt, add_special_tokens=False)["input_ids"]
            room = min(ask.max_tokens, self.limit - len(prompt_ids))
            if room < 1 or not prompt_ids:
                yield Answer(ask.id, "", "prompt_too_long", 0, 0.0)
                continue
            requests.append(Request(ask.id, prompt_ids, ask.temperature, ask.top_p, room, ask.seed, self.stop_ids))
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
