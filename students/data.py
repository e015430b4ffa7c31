"""From `messages` rows to token ids: rendered prompt, then the assistant's text as it is, then end-of-sequence.

The assistant turn never goes through the chat template: R1's own template deletes everything before `</think>` in
assistant turns, so a templated turn would train the student to answer without reasoning. The prompt is what the model
is asked with at inference (generation prompt included); what follows is what it must write.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
OPEN, CLOSE = "<think>", "</think>"
BATCH = 1000


@dataclass(frozen=True, slots=True)
class Example:
    """`input_ids` = prompt + completion + eos; the loss is on everything after the first `prompt_length` ids.

    Nothing predicts the very first id, so an example without a prompt loses that one.
    """

    input_ids: list[int]
    prompt_length: int

    @property
    def loss_tokens(self) -> int:
        return len(self.input_ids) - max(self.prompt_length, 1)


@dataclass(frozen=True)
class Examples:
    """What rows became; `too_long` counts the rows left out because they exceed max_length."""

    examples: list[Example]
    too_long: int

    @property
    def tokens(self) -> int:
        return sum(len(example.input_ids) for example in self.examples)


def build_examples(rows: Iterable[Row], tokenizer: Any, max_length: int, source: str = "dataset") -> Examples:
    """Render and tokenize every row; rows longer than `max_length` tokens are left out whole, never cut.

    Raises ValueError naming `source` and the row for a row without usable messages, for a tokenizer without chat
    template or end-of-sequence token, and if nothing is left.
    """
    check_tokenizer(tokenizer)
    prompts, completions = [], []
    for number, row in enumerate(rows, start=1):
        prompt, completion = render(row, tokenizer, f"{source}, row {number}")
        prompts.append(prompt)
        completions.append(completion)
    examples, too_long = [], 0
    for start in range(0, len(prompts), BATCH):
        # The template has written the special tokens of the prompt; none may be added a second time.
        heads = tokenizer(prompts[start : start + BATCH], add_special_tokens=False)["input_ids"]
        # Text is text: "<|im_end|>" quoted in an answer must not become the token that ends the turn.
        tails = tokenizer(completions[start : start + BATCH], add_special_tokens=False, split_special_tokens=True)
        for head, tail in zip(heads, tails["input_ids"], strict=True):
            ids = [*head, *tail, tokenizer.eos_token_id]
            if len(ids) > max_length:
                too_long += 1
            else:
                examples.append(Example(ids, len(head)))
    if not examples:
        found = f"all {too_long} rows are longer than max_length={max_length} tokens" if too_long else "no rows"
        raise ValueError(f"{source}: nothing to train on, {found}")
    return Examples(examples, too_long)


def render(row: Row, tokenizer: Any, place: str) -> tuple[str, str]:
    """(prompt, completion) of one row, as text.

    If the generation prompt already opens the reasoning ("…<think>\\n", as R1-Distill's does), the same opening is
    taken off the assistant's text; else the completion starts with it. Raises ValueError naming `place`.
    """
    messages = row.get("messages")
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(f"{place}: expected 'messages', a list of at least a user and an assistant turn")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise ValueError(f"{place}: every message needs a 'role' and a 'content' that is text")
        if not message["content"].isascii() and any("\ud800" <= char <= "\udfff" for char in message["content"]):
            raise ValueError(f"{place}: a message holds half a character (a lone surrogate), which is no text")
    if messages[-1].get("role") != "assistant":
        raise ValueError(f"{place}: the last message is by {messages[-1].get('role')!r}, expected 'assistant'")
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    completion = messages[-1]["content"]
    if prompt.rstrip().endswith(CLOSE) and completion.lstrip().startswith(OPEN):
        # Templates with a switch for thinking do this when it is off; the model would be asked so at inference too.
        raise ValueError(
            f"{place}: the chat template's prompt ends with {prompt[-24:]!r}, which closes the reasoning before the "
            "assistant's text opens it; switch thinking on in the template"
        )
    if prompt.rstrip().endswith(OPEN):
        opening = prompt[prompt.rindex(OPEN) :]
        if not completion.startswith(opening):
            raise ValueError(
                f"{place}: the chat template opens the reasoning with {opening!r}, but the assistant's text starts "
                f"with {completion[:20]!r}"
            )
        completion = completion.removeprefix(opening)
    return prompt, completion


def check_tokenizer(tokenizer: Any) -> None:
    """Raise ValueError if the tokenizer cannot make training examples."""
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise ValueError(f"{name}: the tokenizer has no chat template, so prompts cannot be written")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: the tokenizer has no end-of-sequence token, so the student could never stop")
