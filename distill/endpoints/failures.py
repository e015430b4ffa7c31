"""What can go wrong with a request, and what each thing means for the sample, its endpoint and the run."""

import email.utils
import re
import time
from collections.abc import Mapping
from typing import Any

import orjson

LONGEST_WAIT = 300.0  # seconds that a server's Retry-After can make us wait
_RETRIED = {408, 409, 425, 429}
_OVERLOAD = {429, 503, 529}
_ENDPOINT = {401, 402, 403, 404, 405, 407}  # key, balance, address, model: no sample would fare better there
_FILTERED = ("content_filter", "data_inspection_failed", "content exists risk", "content management policy")


class Failure(Exception):
    """An attempt that brought nothing. The sample is asked again.

    kind: one word for the accounts. sent: whether the server may have worked on it. retry_after: seconds that the
    server asks for. overload: the server says that it has too much to do. usage: what it charged all the same.
    """

    def __init__(
        self,
        kind: str,
        message: str = "",
        *,
        sent: bool = True,
        retry_after: float | None = None,
        overload: bool = False,
        usage: Any = None,
    ) -> None:
        super().__init__(f"{kind}: {message}" if message else kind)
        self.kind, self.message, self.sent = kind, message, sent
        self.retry_after, self.overload, self.usage = retry_after, overload, usage


class Stale(Exception):
    """A kept connection turned out to be closed before the server can have seen the request: asked anew, uncounted."""


class Refused(Exception):
    """The server will not take this request, and no other attempt changes that.

    endpoint: whether it is the endpoint's key, address or model that is wrong, rather than this one request.
    """

    def __init__(self, status: int, message: str, endpoint: bool) -> None:
        super().__init__(f"HTTP {status}: {message}" if message else f"HTTP {status}")
        self.status, self.endpoint = status, endpoint


class TooLong(Exception):
    """Prompt and reply do not fit the context. The numbers are the server's, None where it does not say.

    limit: tokens in all, or of the reply alone where `prompt` is 0. exact: whether `prompt` is a count, no lower bound.
    """

    def __init__(self, message: str, limit: int | None = None, prompt: int | None = None, exact: bool = True) -> None:
        super().__init__(message)
        self.limit, self.prompt, self.exact = limit, prompt, exact


class Filtered(Exception):
    """The server's content filter refuses the prompt."""


def by_status(status: int, headers: Mapping[bytes, bytes], body: bytes) -> Exception:
    """What an HTTP answer other than 200 means."""
    code, message = _said(body)
    known = _by_message(code, message) if 400 <= status < 500 or code == 400 else None
    if known is not None:
        return known
    if code == "insufficient_quota":  # OpenAI's 429 for an empty account
        return Refused(status, message, endpoint=True)
    if status in _RETRIED or status >= 500:
        wait = retry_after(headers)
        return Failure(f"http_{status}", message, retry_after=wait, overload=status in _OVERLOAD)
    if 300 <= status < 400:
        target = headers.get(b"location", b"").decode("latin-1")
        return Refused(status, tidy(f"a redirect to {target}, which is not followed"), endpoint=True)
    return Refused(status, message, endpoint=status in _ENDPOINT or code == "model_not_found")


def by_event(error: Any) -> Exception:
    """What an error in the middle of a stream, or in a body with status 200, means."""
    body = orjson.dumps({"error": error})
    code, message = _said(body)
    return _by_message(code, message) or Failure("server_error", message)


def _by_message(code: Any, message: str) -> Exception | None:
    lower = message.lower()
    for pattern, exact in _CONTEXT:
        found = pattern.search(message)
        if found:
            numbers = found.groupdict()
            prompt = numbers.get("prompt")
            return TooLong(message, int(numbers["limit"]), None if prompt is None else int(prompt), exact)
    found = _MOST_REPLY.search(message)
    if found:
        return TooLong(message, int(found["limit"] or found["range"]), 0)
    if code == "context_length_exceeded" or "maximum context length" in lower or "context_length_exceeded" in lower:
        return TooLong(message)
    if code in ("content_filter", "data_inspection_failed") or any(word in lower for word in _FILTERED):
        return Filtered(message)
    return None


# In their order: what says both numbers exactly comes before what says less.
_CONTEXT = [
    # OpenAI, DeepSeek, vLLM to 0.9: "... 16384 tokens. However, you requested 19591 tokens (9591 in the messages, ..."
    (re.compile(r"maximum context length is (?P<limit>\d+) tokens.*?\((?P<prompt>\d+) in (?:the|your) \w+"), True),
    # vLLM: "... is 128000 tokens. However, you requested 65535 output tokens and your prompt contains at least 62466
    # input tokens": it stops counting where the prompt no longer fits.
    (re.compile(r"maximum context length is (?P<limit>\d+) tokens.*?contains at least (?P<prompt>\d+)"), False),
    (re.compile(r"maximum context length is (?P<limit>\d+) tokens.*?(?:contains|request has) (?P<prompt>\d+)"), True),
    (re.compile(r"maximum context length is (?P<limit>\d+) tokens.*?resulted in (?P<prompt>\d+)"), True),
    # SGLang: "... context length of 202752 tokens. You requested a total of 202941 tokens: 170941 tokens from the
    # input messages and 32000 tokens for the completion."
    (re.compile(r"maximum context length of (?P<limit>\d+) tokens.*?: (?P<prompt>\d+) tokens from the"), True),
    (re.compile(r"input \((?P<prompt>\d+) tokens\) is longer than the model's context length \((?P<limit>\d+)"), True),
    (re.compile(r"nput length \((?P<prompt>\d+) tokens\) exceeds the maximum .*?\((?P<limit>\d+) tokens\)"), True),
    # Our server.
    (re.compile(r"the prompt has (?P<prompt>\d+) tokens.*?this model takes (?P<limit>\d+) at most in all"), True),
]  # fmt: skip
# OpenAI: "max_tokens is too large: 100000. This model supports at most 16384 completion tokens"; DeepSeek: "Invalid
# max_tokens value, the valid range of max_tokens is [1, 8192]".
_MOST_REPLY = re.compile(
    r"supports at most (?P<limit>\d+) completion tokens|range of max_tokens is \[\d+, ?(?P<range>\d+)\]"
)


def _said(body: bytes) -> tuple[Any, str]:
    """(code, message) of an error body in any of the usual forms."""
    try:
        said = orjson.loads(body)
    except ValueError:
        return None, tidy(body.decode(errors="replace"))
    error = said
    if isinstance(said, dict):
        error = said.get("error", said)
    if isinstance(error, dict):
        code = error.get("code")
        message = error.get("message") or error.get("detail") or error.get("msg") or ""
        return code if isinstance(code, int | str) else None, tidy(str(message))
    return None, tidy(str(error))


def tidy(message: str) -> str:
    """A server's words on one printable line of bounded length."""
    return "".join(c for c in " ".join(message.split()) if c.isprintable())[:400]


def retry_after(headers: Mapping[bytes, bytes], now: float | None = None) -> float | None:
    """Seconds that the header Retry-After asks for (RFC 9110, 10.2.3), at most LONGEST_WAIT; None without it.

    A date is read against the server's own header Date, so that its clock need not agree with ours; where it sends
    none, against ours, and the bound holds the damage.
    """
    said = headers.get(b"retry-after", b"").decode("latin-1").strip()
    if not said:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", said):
        return min(float(said[:12]), LONGEST_WAIT)
    until, server_now = _date(said), _date(headers.get(b"date", b"").decode("latin-1"))
    if until is None:
        return None
    if server_now is None:
        server_now = time.time() if now is None else now
    return min(max(0.0, until - server_now), LONGEST_WAIT)


def _date(text: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
