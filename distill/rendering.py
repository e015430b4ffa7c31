"""A teacher's chat as tokens: prompts rendered here, and replies counted, for teachers that speak no chat themselves.

Used by the kinds whose server or engine takes a finished prompt (both engines, `api: completions`).
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from distill.errors import UserError
from distill.reasoning import OPEN, closing_tag
from distill.records import Message
from distill.shipped import resolve_model

Think = Literal["auto", "force", "leave"]


class ChatTokenizer:
    """The teacher's tokenizer, loaded unless it is given, and chat template. Raises UserError where there is none."""

    def __init__(
        self,
        name: str,
        revision: str | None = None,
        think: Think = "auto",
        field: str = "teacher.model",
        tokenizer: Any = None,
    ) -> None:
        self.tokenizer: Any = load_tokenizer(name, revision, field) if tokenizer is None else tokenizer
        if not self.tokenizer.chat_template:
            raise UserError(f"{field}: the tokenizer of '{name}' has no chat template, so the teacher cannot be asked")
        self.think = think

    def text(self, messages: list[Message]) -> str:
        """The prompt, ending where the reply starts: after `<think>` and a newline, unless `think` is 'leave'."""
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # DeepSeek advises to force the opening (R1's usage notes); its newer template does it, its first did not.
        if self.think == "leave" or text.rstrip().endswith(OPEN):
            return text
        return f"{text}{OPEN}\n"

    def ids(self, messages: list[Message]) -> list[int]:
        # Rendered to text first: the template writes the special tokens, so none may be added again.
        return list(self.tokenizer(self.text(messages), add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        # Special tokens stay visible: one inside the text is a leak, which the format filter must see.
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def reasoning_tokens(self, text: str, ids: Sequence[int]) -> int:
        """How many of `ids`, which read `text`, are reasoning; see `reasoning_tokens`."""
        return reasoning_tokens(text, ids, self.decode)


def load_tokenizer(name: str, revision: str | None = None, field: str = "teacher.model") -> Any:
    """By folder, shipped model's name or hub name. Raises UserError."""
    from transformers import AutoTokenizer

    found = resolve_model(name)
    # A folder has no revisions; passing one on would be refused.
    which = None if isinstance(found, Path) else revision
    try:
        return AutoTokenizer.from_pretrained(found, revision=which, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{field}: the tokenizer of '{name}' does not load: {reason}") from error


def reasoning_tokens(text: str, ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> int:
    """How many of the tokens it takes to reach the end of the closing tag; all if there is none."""
    close = closing_tag(text)
    if close is None:
        return len(ids)
    # By decoding, not by looking for the tag's id: a model may also spell the tag in several tokens.
    return bisect_left(range(len(ids) + 1), close.end(), key=lambda n: len(decode(ids[:n])))


def stop_ids(name: str, tokenizer: Any, revision: str | None = None) -> tuple[int, ...]:
    """The end-of-sequence ids of generation_config.json, else the tokenizer's. Raises UserError if there is none."""
    from transformers import GenerationConfig

    found = resolve_model(name)
    try:
        config = GenerationConfig.from_pretrained(found, revision=None if isinstance(found, Path) else revision)
        eos: Any = config.eos_token_id
    except OSError:
        eos = None
    if eos is None:
        eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError(f"{name}: neither generation_config.json nor the tokenizer names an end-of-sequence token")
    return tuple(eos) if isinstance(eos, list) else (eos,)
