"""The single steps that worked solutions are made of: column addition and subtraction, one-digit multiplication.

Every column is written out with its carry or borrow, least significant first, in a fixed shape, because a small
model learns a step it can look up (100 digit pairs) and not one it must compute in its head.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Worked:
    """A worked solution: its lines, in order, and the final answer as it stands in the box."""

    lines: list[str]
    answer: str


def digit(number: int, place: int) -> int:
    """The digit of `number` (>= 0) at 10**place."""
    return number // 10**place % 10


def add(a: int, b: int) -> str:
    """Column addition of a, b >= 0: `47+85: 7+5+0=12 4+8+1=13 =132`; a column reads digit+digit+carry=carry,digit."""
    carry, columns = 0, []
    for place in range(max(len(str(a)), len(str(b)))):
        total = digit(a, place) + digit(b, place) + carry
        columns.append(f"{digit(a, place)}+{digit(b, place)}+{carry}={total:02d}")
        carry = total // 10
    return f"{a}+{b}: {' '.join(columns)} ={a + b}"


def subtract(a: int, b: int) -> str:
    """Column subtraction, a >= b >= 0: `84-56: 4-6-0=18 8-5-1=02 =28`; a column: digit-digit-borrow=borrow,digit."""
    assert a >= b >= 0, f"subtract takes the larger number first, got {a} and {b}"
    borrow, columns = 0, []
    for place in range(len(str(a))):
        difference = digit(a, place) - digit(b, place) - borrow
        columns.append(f"{digit(a, place)}-{digit(b, place)}-{borrow}={int(difference < 0)}{difference % 10}")
        borrow = int(difference < 0)
    return f"{a}-{b}: {' '.join(columns)} ={a - b}"


def multiply(a: int, d: int) -> str:
    """`a` times one digit: `47*6: 7*6=42+0=42 4*6=24+4=28 =282`; a column reads digit*d=product+carry=carry,digit."""
    assert a >= 0 and 0 <= d <= 9, f"multiply takes one digit as its second factor, got {d}"
    carry, columns = 0, []
    for place in range(len(str(a))):
        product = digit(a, place) * d
        columns.append(f"{digit(a, place)}*{d}={product:02d}+{carry}={product + carry:02d}")
        carry = (product + carry) // 10
    return f"{a}*{d}: {' '.join(columns)} ={a * d}"


def signed_add(total: int, term: int) -> str:
    """One step of a running total of any sign.

    Where no sign is in the way it is the plain column line. Else the line says first how the magnitudes are brought
    to one, and last what the sign makes of the result: `12-45=-(45-12) 45-12: ... =33 -33`.
    """
    a, b = abs(total), abs(term)
    if total >= 0 and term >= 0:
        return add(a, b)
    if total >= 0 and a >= b:
        return subtract(a, b)
    asked = f"{total}{'-' if term < 0 else '+'}{b}"
    if total < 0 and term < 0:
        return f"{asked}=-({a}+{b}) {add(a, b)} {total + term}"
    larger, smaller = max(a, b), min(a, b)
    sign = "-" if total + term < 0 else ""
    return f"{asked}={sign}({larger}-{smaller}) {subtract(larger, smaller)} {total + term}"
