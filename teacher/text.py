"""From tokens to text as they come: nothing shown is ever taken back, and all of it together is what one decode gives.

A token may hold part of a character, and text may be the beginning of a stop string: both wait until it is certain.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary


class TextStream:
    """Text of one completion.

    Equals `tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)`, up to the stop string
    that is complete first (of two complete at once, the longer), however the tokens are dealt over the calls of `push`.
    Raises ValueError for an empty stop string.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise ValueError("a stop string is empty; expected at least one character")
        self._decoder = _decoder(tokenizer)
        self._searches = [_Search(text) for text in sorted(set(stop), key=len, reverse=True)]
        self._firsts = {text[0] for text in stop}
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self._shown: list[str] = []
        self.stop_text: str | None = None  # the stop string that ended the text
        self.tokens = 0  # tokens taken, up to and with the one that completed the stop string

    @property
    def text(self) -> str:
        """All that was shown so far."""
        return "".join(self._shown)

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens make certain. Tokens behind a stop string are not taken."""
        parts = []
        for token in token_ids:
            if self.stop_text is not None:
                break
            self.tokens += 1
            parts.append(self._certain(self._decoder.decode(token)))
        return self._show("".join(parts))

    def flush(self) -> str:
        """What was held back, when no token comes any more: half a character shows as U+FFFD, as it does in decode."""
        if self.stop_text is not None:
            return ""
        rest = self._certain(self._decoder.finish())
        if self.stop_text is None:
            rest += self._held
            self._held = ""
        return self._show(rest)

    def _certain(self, text: str) -> str:
        if not self._searches:
            return text
        held = self._held + text
        if not self._held and self._firsts.isdisjoint(text):
            return text
        for place, character in enumerate(text, start=len(self._held) + 1):
            for search in self._searches:
                if search.complete_with(character):
                    self.stop_text, self._held = search.text, ""
                    return held[: place - len(search.text)]
        certain = len(held) - max(search.length for search in self._searches)
        self._held = held[certain:]
        return held[:certain]

    def _show(self, text: str) -> str:
        if text:
            self._shown.append(text)
        return text


class _Search:
    """Knuth, Morris and Pratt's search, a character at a time: a long stop string costs no more than a short one."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.length = 0  # of the longest beginning of `text` that ends here
        self._border = [0, 0]  # of the first n characters: the longest proper beginning that is also their end
        border = 0
        for character in text[1:]:
            border = self._longer(border, character)
            self._border.append(border)

    def complete_with(self, character: str) -> bool:
        self.length = self._longer(self.length, character)
        return self.length == len(self.text)

    def _longer(self, length: int, character: str) -> int:
        while length and self.text[length] != character:
            length = self._border[length]
        return length + (self.text[length] == character)


class _Decoder(Protocol):
    def decode(self, token: int) -> str: ...

    def finish(self) -> str: ...


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes that one token stands for; they need not be valid UTF-8 alone. An id that is no token is nothing."""
    known = _bytes_of.setdefault(tokenizer, {})
    found = known.get(token)
    if found is None:
        if _is_byte_level(tokenizer):
            found = _bytes_named(tokenizer.backend_tokenizer.id_to_token(token))
        else:
            found = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False).encode()
        known[token] = found
    return found


# Bytes of the tokens seen so far, by tokenizer: all requests share them, and only what is used is looked up.
_bytes_of: WeakKeyDictionary[Any, dict[int, bytes]] = WeakKeyDictionary()


def _decoder(tokenizer: Any) -> _Decoder:
    """By bytes where the tokenizer is byte-level, as DeepSeek's, Llama 3's and Qwen's are; else by decoding anew."""
    return _ByBytes(tokenizer) if _is_byte_level(tokenizer) else _DecodeAnew(tokenizer)


def _is_byte_level(tokenizer: Any) -> bool:
    from tokenizers import decoders

    backend = getattr(tokenizer, "backend_tokenizer", None)
    return isinstance(getattr(backend, "decoder", None), decoders.ByteLevel)


class _ByBytes:
    """A byte-level tokenizer's text is the tokens' bytes, one after the other, read as UTF-8."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known = _bytes_of.setdefault(tokenizer, {})
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def decode(self, token: int) -> str:
        found = self._known.get(token)
        return self._utf8.decode(token_bytes(self._tokenizer, token) if found is None else found)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _DecodeAnew:
    """Any other tokenizer: all tokens are decoded at each step, so it costs the square of the length. Bytes that are no
    UTF-8 may show otherwise than in one decode, where SentencePiece's kind lets them spoil the valid bytes before."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._ids, self._given = tokenizer, list[int](), 0

    def decode(self, token: int) -> str:
        self._ids.append(token)
        return self._new(self._whole().rstrip("\ufffd"))  # which may be part of a character

    def finish(self) -> str:
        return self._new(self._whole())

    def _whole(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _new(self, text: str) -> str:
        new = text[self._given :]
        self._given += len(new)
        return new


def _bytes_named(text: str | None) -> bytes:
    """The bytes that a byte-level token stands for: its characters name them, unless one is outside their alphabet, as
    in `<｜User｜>`: such a token is its own text."""
    if text is None:
        return b""
    try:
        return bytes(_BYTE_OF[character] for character in text)
    except KeyError:
        return text.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: the printable characters of Latin-1 name themselves, the other bytes the characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()
