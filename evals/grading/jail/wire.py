"""Plain data as JSON between the tests' process and the program's: nothing that is decoded can run code.

None, bool, int, float, str and list go as they are; tuple, set, frozenset, dict, bytes, complex, Fraction, Decimal
and floats that JSON lacks get a tag; subclasses lose their class, so that no foreign __eq__ arrives. Anything else
goes by reference, as the number of an object in the program's process.
"""

import json
import math
import socket
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

MESSAGE = 64 << 20  # bytes of one message


def encode(value: Any, refer: Callable[[Any], int]) -> Any:
    """A JSON value; `refer` keeps an object that is no plain data and numbers it. RecursionError if nested too deep."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        plain = float.__float__(value)
        return plain if math.isfinite(plain) else {"t": "float", "v": repr(plain)}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [encode(item, refer) for item in list.__iter__(value)]
    if isinstance(value, (tuple, set, frozenset)):
        kind: Any = next(k for k in (tuple, set, frozenset) if isinstance(value, k))
        return {"t": kind.__name__, "v": [encode(item, refer) for item in kind.__iter__(value)]}
    if isinstance(value, dict):
        return {"t": "dict", "v": [[encode(k, refer), encode(v, refer)] for k, v in dict.items(value)]}
    if isinstance(value, (bytes, bytearray)):
        return {"t": "bytes", "v": bytes(value).hex()}
    if isinstance(value, complex):
        return {"t": "complex", "v": [repr(complex(value).real), repr(complex(value).imag)]}
    if type(value) in (Fraction, Decimal):
        return {"t": type(value).__name__, "v": str(value)}
    return {"t": "object", "v": refer(value), "n": str(type(value).__name__)[:80]}


def decode(value: Any, resolve: Callable[[int, str], Any]) -> Any:
    """The value again; `resolve` makes something of an object's number. ValueError for what encode does not write."""
    if isinstance(value, list):
        return [decode(item, resolve) for item in value]
    if not isinstance(value, dict):
        return value
    kind, inner = value.get("t"), value.get("v")
    if kind == "object" and isinstance(inner, int):
        return resolve(inner, str(value.get("n")))
    if isinstance(inner, list):
        if kind == "tuple":
            return tuple(decode(item, resolve) for item in inner)
        if kind in ("set", "frozenset"):
            items = [decode(item, resolve) for item in inner]
            return set(items) if kind == "set" else frozenset(items)
        if kind == "dict":
            return {decode(k, resolve): decode(v, resolve) for k, v in inner}
        if kind == "complex":
            return complex(float(inner[0]), float(inner[1]))
    if isinstance(inner, str):
        if kind == "bytes":
            return bytes.fromhex(inner)
        if kind == "float":
            return float(inner)
        if kind == "Fraction":
            return Fraction(inner)
        if kind == "Decimal":
            return Decimal(inner)
    raise ValueError("not plain data")


class Line:
    """JSON messages over a stream socket, one a line."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self._rest = bytearray()

    def send(self, message: Any) -> None:
        self.stream.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Any:
        """The next message; EOFError if the other side has ended, ValueError if it is too long or not JSON."""
        searched = 0
        while (end := self._rest.find(b"\n", searched)) < 0:
            searched = len(self._rest)
            if searched > MESSAGE:
                raise ValueError("a message is too long")
            part = self.stream.recv(1 << 18)
            if not part:
                raise EOFError
            self._rest += part
        line = bytes(self._rest[:end])
        del self._rest[: end + 1]
        return json.loads(line)
