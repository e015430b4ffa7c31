"""How fast samples finish: over the whole run in a bounded number of steps, and just now."""

from collections import deque
from typing import Any, NamedTuple

_MOST_STEPS = 240


class Amount(NamedTuple):
    finished: int
    prompt_tokens: int
    completion_tokens: int


class Throughput:
    """What finished in each step of the time that generation ran; time between two starts is left out.

    When there are too many steps, neighbours are joined: `step` doubles, from one second.
    """

    def __init__(self) -> None:
        self.step = 1.0
        self.amounts: list[Amount] = []

    def count(self, at: float, amount: Amount) -> None:
        """`amount` finished `at` so many seconds of generation."""
        while at >= self.step * _MOST_STEPS:
            self.coarsen()
        index = int(at / self.step)
        while len(self.amounts) <= index:
            self.amounts.append(Amount(0, 0, 0))
        self.amounts[index] = _sum(self.amounts[index], amount)

    def coarsen(self) -> None:
        self.step *= 2
        pairs = [self.amounts[i : i + 2] for i in range(0, len(self.amounts), 2)]
        self.amounts = [_sum(*pair) if len(pair) == 2 else pair[0] for pair in pairs]

    def thinned(self, most: int) -> "Throughput":
        """A copy in at most so many steps."""
        copy = Throughput()
        copy.step, copy.amounts = self.step, list(self.amounts)
        while len(copy.amounts) > most:
            copy.coarsen()
        return copy

    def add(self, other: "Throughput") -> None:
        """Another process's, as if both had begun at once."""
        while self.step < other.step:
            self.coarsen()
        for index, amount in enumerate(other.amounts):
            self.count(index * other.step, amount)

    def to_json(self) -> dict[str, Any]:
        columns = {name: [getattr(amount, name) for amount in self.amounts] for name in Amount._fields}
        return {"step_seconds": self.step, **columns}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Throughput":
        throughput = cls()
        throughput.step = saved["step_seconds"]
        throughput.amounts = [Amount(*row) for row in zip(*(saved[name] for name in Amount._fields), strict=True)]
        return throughput


def _sum(a: Amount, b: Amount) -> Amount:
    return Amount(*(x + y for x, y in zip(a, b, strict=True)))


# Rates are taken over the last half minute, or longer ago while fewer samples than this finished since:
# reasoning that takes minutes a sample finishes in bursts.
_WINDOW_SECONDS = 30.0
_ENOUGH = 50
_MARK_EVERY = 2.0


class Recent:
    """Rates over a recent window, from marks of the running totals; at most ten minutes of them are held."""

    def __init__(self, now: float, totals: Amount) -> None:
        self._marks: deque[tuple[float, Amount]] = deque([(now, totals)], maxlen=300)

    def mark(self, now: float, totals: Amount) -> None:
        """Called often; marks are kept apart."""
        if now - self._marks[-1][0] >= _MARK_EVERY:
            self._marks.append((now, totals))

    def rates(self, now: float, totals: Amount) -> tuple[float, float, float]:
        """Samples, prompt tokens and completion tokens a second."""
        for then, before in reversed(self._marks):
            if now - then >= _WINDOW_SECONDS and totals.finished - before.finished >= _ENOUGH:
                break
        span = max(now - then, 1e-3)
        finished, prompt, completion = ((a - b) / span for a, b in zip(totals, before, strict=True))
        return finished, prompt, completion
