"""Tokens that a teacher names by their text, as most servers do: a table that gives each a number.

It is traces/logprobs_texts.jsonl; the text on its n-th line, from 0, has the id 2**31 + n, which no vocabulary reaches.
It grows with the vocabulary that is met, not with the traces, and is durable before a frame that uses it. Ids of the
teacher's vocabulary come in when it is read, by whoever has the tokenizer.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distill.jsonl import Appender, read_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "logprobs_texts.jsonl"
FIRST_ID = 2**31


class TokenTexts:
    """The table of `folder`, written to as new texts come; the file is made with the first of them."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._file = Appender(self._path) if self._path.exists() else None
        self._ids = {text: FIRST_ID + n for n, text in enumerate(read_texts(folder))}
        self._new: list[str] = []

    def ids(self, texts: Sequence[str]) -> list[int]:
        return [self._ids[text] if text in self._ids else self._add(text) for text in texts]

    def _add(self, text: str) -> int:
        self._new.append(text)
        return self._ids.setdefault(text, FIRST_ID + len(self._ids))

    def sync(self) -> None:
        """Bring new rows to the disk."""
        if self._new:
            self._file = self._file or Appender(self._path)
            self._file.append_many({"text": text} for text in self._new)
            self._new = []

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_texts(folder: Path) -> list[str]:
    """Text n has the id FIRST_ID + n; empty where all tokens have ids of a vocabulary."""
    path = folder / NAME
    return [row["text"] for _, row in read_jsonl(path, torn_ok=True)] if path.is_file() else []


def ids_of_texts(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """The id of every token whose text no other token has: parts of a character all read as the same mark."""
    found: dict[str, int] = {}
    several = set()
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        if found.setdefault(text, token) != token:
            several.add(text)
    return {text: token for text, token in found.items() if text not in several}
