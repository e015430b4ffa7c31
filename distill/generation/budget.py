"""What may still be spent: so many samples are admitted that none of the recipe's limits is expected to be passed."""

from collections.abc import Callable
from dataclasses import dataclass

from distill.recipe import Budget
from distill.records import Reply

_SEVERAL = 4


@dataclass
class Spent:
    """Of money, or of tokens: what `samples` samples took, the sum of the squares of that, and the `worst` of one."""

    worst: float
    total: float = 0.0
    squares: float = 0.0
    samples: int = 0

    def add(self, amount: float) -> None:
        self.total += amount
        self.squares += amount * amount
        self.samples += 1

    def room(self, limit: float, in_flight: int) -> int:
        """How many further samples the rest of `limit` is expected to be enough for.

        One in flight is expected to take more than the mean, since the long ones are in flight for longest: the mean
        weighted by length. What finishes first is short, so the worst is taken for the mean until several times as
        many have finished as are in flight.
        """
        mean = self.total / self.samples if self.samples else 0.0
        flying = self.squares / self.total if self.total else 0.0
        if self.samples < _SEVERAL * max(in_flight, 2):
            mean, flying = max(mean, self.worst), max(flying, self.worst)
        if not mean:
            return 1 << 30
        left = limit - self.total
        alone = not in_flight and left > 0 and left * self.samples >= self.total  # one more like the others has room
        return max(int((left - in_flight * flying) / mean), int(alone))


class Spending:
    """What generation has spent, and how many more samples there is room for.

    `cost` and `tokens` begin with what the run folder's lines say, stale ones too, for that is spent as well. `hours`
    gives the time so far over all starts.
    """

    def __init__(self, budget: Budget, cost: Spent, tokens: Spent, hours: Callable[[], float]) -> None:
        self.budget, self.cost, self.tokens, self.hours = budget, cost, tokens, hours
        self._time = Spent(0.0)

    def add(self, reply: Reply) -> None:
        if reply.finish_reason == "failed":
            self.cost.total += reply.cost
            return
        self.cost.add(reply.cost)
        self.tokens.add(reply.prompt_tokens + reply.reasoning_tokens + reply.answer_tokens)
        self._time.add(reply.seconds / 3600)

    def room(self, in_flight: int, most: int) -> int:
        """How many of `most` further samples may be admitted now."""
        limits, time = self.budget, self._time
        if limits.hours is not None and self.hours() + time.total / max(time.samples, 1) >= limits.hours:
            return 0
        if limits.cost is not None:
            most = min(most, self.cost.room(limits.cost, in_flight))
        if limits.tokens is not None:
            most = min(most, self.tokens.room(limits.tokens, in_flight))
        return max(most, 0)

    def said(self) -> str:
        """Which limit it was, for a person."""
        limits = self.budget
        if limits.cost is not None and self.cost.room(limits.cost, 0) < 1:
            return f"budget.cost {limits.cost:g} has room for no further sample ({self.cost.total:.4g} spent)"
        if limits.tokens is not None and self.tokens.room(limits.tokens, 0) < 1:
            return f"budget.tokens {limits.tokens} has room for no further sample ({self.tokens.total:.0f} spent)"
        return f"budget.hours {limits.hours:g} is over"
