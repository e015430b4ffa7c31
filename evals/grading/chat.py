"""A model behind any OpenAI-compatible endpoint, asked for text, every reply kept on disk.

No log-probabilities are asked for. A reply's file is named by the hash of everything that it depends on (model,
messages, settings, number of the vote), so a replay costs nothing and a change of any of these asks anew. The key
comes from the environment only and is never written.
"""

import hashlib
import http.client
import json
import os
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPLY_BYTES = 1 << 20
IN_A_ROW = 8  # requests without a reply after which nobody is taken to be there


class NoReply(Exception):
    """The endpoint gave no usable reply within the time."""


class Refused(NoReply):
    """The endpoint refuses this request (too long for it, say), and would do so again."""


class Unreachable(NoReply):
    """The endpoint answers nothing: nobody listens, the key or the address is wrong, or it fails again and again."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


@dataclass(frozen=True)
class ChatModel:
    """Settings of a model to ask. Raises ValueError for settings that cannot work.

    base_url: up to and including /v1. n: votes, odd. cache: folder of the replies. key_variable: the environment
    variable with the key, which may be unset for a local server. seconds: of one reply with all attempts.
    """

    base_url: str
    model: str
    cache: Path
    n: int = 3
    temperature: float = 0.6
    max_tokens: int = 4096
    seconds: float = 120.0
    attempts: int = 3
    pause: float = 0.5  # seconds before the second attempt, doubling
    key_variable: str = "DISTILL_JUDGE_KEY"
    _failed: list[str] = field(default_factory=list, init=False, repr=False, compare=False)  # since the last reply

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"the judge's base_url {self.base_url!r} does not start with http:// or https://")
        if self.n < 1 or self.n % 2 == 0:
            raise ValueError(f"a judge needs an odd number of votes for a majority, found n = {self.n}")

    def reply(self, messages: list[dict[str, str]], number: int) -> str:
        """The text of the reply; `number` tells votes on the same messages apart. Thread-safe.

        Empty if the model was cut off before it said anything. Raises NoReply, whose kinds say what to do about it.
        """
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": number,
        }
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        path = Path(self.cache) / digest[:2] / f"{digest}.json"
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["text"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass  # not asked yet, or torn by a full disk: asked again and replaced
        text = self._request(body)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump({"request": body, "text": text}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
        return text

    def _request(self, body: dict[str, Any]) -> str:
        if len(self._failed) >= IN_A_ROW:
            raise Unreachable(self._failed[-1])
        try:
            text = self._attempts(body)
        except Refused:
            raise
        except NoReply as error:
            self._failed.append(str(error))
            raise
        self._failed.clear()
        return text

    def _attempts(self, body: dict[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        key = self._key()
        if key:
            headers["Authorization"] = f"Bearer {key}"
        url = self.base_url.rstrip("/") + "/chat/completions"
        opener = urllib.request.build_opener(_NoRedirects)
        deadline = time.monotonic() + self.seconds
        failure: NoReply = NoReply("no attempt")
        for attempt in range(self.attempts):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            try:
                with opener.open(request, timeout=left) as answer:
                    return _text(_read(answer, deadline))
            except urllib.error.HTTPError as error:
                said = f"HTTP {error.code}"
                failure = NoReply(said)
                if error.code < 400 or error.code in (401, 403, 404, 405):
                    raise Unreachable(said) from None
                if error.code < 500 and error.code not in (408, 409, 425, 429):
                    raise Refused(said + _complaint(error, key)) from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                cause = getattr(error, "reason", error)
                said = f"{type(cause).__name__}: {str(cause)[:100]}"
                nobody = isinstance(error, urllib.error.URLError) and not isinstance(cause, TimeoutError)
                failure = Unreachable(said) if nobody else NoReply(said)
            if attempt + 1 < self.attempts:
                time.sleep(max(0.0, min(self.pause * 2**attempt, deadline - time.monotonic())))
        raise failure

    def _key(self) -> str:
        """Checked here, for http.client's own complaint about a header quotes it."""
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise Unreachable(f"the environment variable {self.key_variable} holds what no HTTP header can")
        return key


def fenced(content: str, *others: str | None) -> tuple[str, str]:
    """(fence, the text between two lines of it). The fence is a hash of all that is shown: no text can know its own."""
    fence = hashlib.sha256(json.dumps([*others, content]).encode()).hexdigest()[:24]
    return fence, f"{fence}\n{content}\n{fence}"


def asked(system: str, parts: list[str]) -> list[dict[str, str]]:
    """Messages for `reply`; what is no Unicode text becomes a question mark."""
    user = "\n\n".join(parts).encode(errors="replace").decode()
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _complaint(error: urllib.error.HTTPError, key: str) -> str:
    """What the endpoint says is wrong with a request, on one line, or nothing."""
    try:
        said = json.loads(error.read(65536))
        text = said.get("error", said)
        text = text.get("message") if isinstance(text, dict) else text
    except (OSError, http.client.HTTPException, ValueError, AttributeError, RecursionError):
        return ""
    if not isinstance(text, str) or (key and key in text):
        return ""
    return ": " + "".join(c for c in " ".join(text.split()) if c.isprintable())[:160]


def _read(answer: Any, deadline: float) -> bytes:
    data = b""
    while part := answer.read1(65536):
        data += part
        if len(data) > REPLY_BYTES:
            raise ValueError(f"a reply of more than {REPLY_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError("a reply that trickles")
    return data


def _text(data: bytes) -> str:
    try:
        choice = json.loads(data)["choices"][0]
        text = choice["message"]["content"]
        cut_off = choice.get("finish_reason") == "length"
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise ValueError("a reply that is no chat completion") from None
    if text is None and cut_off:
        return ""  # it thought until the end
    if not isinstance(text, str):
        raise ValueError("a reply without text")
    return text
