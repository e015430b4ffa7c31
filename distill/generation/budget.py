"""What may still be spent: so many samples are admitted that none of the recipe's limits is expected to be passed."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from distill.recipe import Budget
from distill.records import Ask, Reply

_SEVERAL = 4
_TEMPLATE = 256  # tokens that a chat template may put around the messages


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

    def room(self, limit: float, in_flight: int, under_way: float) -> int:
        """How many further samples the rest of `limit` is enough for, unless they come out longer by four sigma.

        What has finished is short, for the long ones are still `in_flight`, with so much `under_way` by now. Hence the
        mean of a censored exponential, all that was made by how many have ended, which is also what each one in flight
        has still to come. Until several times as many have finished as are in flight, the worst is taken for it.
        """
        mean = (self.total + under_way) / self.samples if self.samples else 0.0
        spread = 0.0
        if self.samples < _SEVERAL * max(in_flight, 2):
            mean = max(mean, self.worst)
        else:
            spread = math.sqrt(max(self.squares / self.samples - (self.total / self.samples) ** 2, 0.0))
        if not mean:
            return 1 << 30
        left = limit - self.total
        alone = not in_flight and left > 0 and left * self.samples >= self.total  # one more like the others has room
        return max(_most(left - under_way - in_flight * mean, in_flight, mean, spread), int(alone))


def _most(left: float, in_flight: int, mean: float, spread: float) -> int:
    """The largest n, or one less by rounding, with n means and four sigma of the sum of n + in_flight in `left`."""
    if left <= 0:
        return 0
    # With m = n + in_flight, m mean + 4 spread sqrt(m) = left + in_flight mean is quadratic in sqrt(m).
    root = (math.sqrt(4 * spread * spread + mean * (left + in_flight * mean)) - 2 * spread) / mean
    return int(root * root * (1 + 1e-12)) - in_flight


class Spending:
    """What generation has spent, and how many more samples there is room for.

    `cost` and `tokens` begin with what the run folder's lines say, stale ones too, for that is spent as well. `hours`
    gives the time so far over all starts, `clock` seconds from whenever. `prices` are those of a prompt's and of a
    generated token, at most.

    With `budget.hard` what is expected does not count: of each sample in flight the most that it can take is set aside,
    so that no more is ever spent than the limit. What comes on top of that are attempts that a server charged and that
    brought nothing, and replies longer than the server was told they may be.
    """

    def __init__(
        self,
        budget: Budget,
        cost: Spent,
        tokens: Spent,
        hours: Callable[[], float],
        prices: tuple[float, float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget, self.cost, self.tokens, self.hours, self._prices = budget, cost, tokens, hours, prices
        self._clock, self._begun, self._begun_sum = clock, dict[str, float](), 0.0
        self._replies, self._seconds = 0, 0.0  # of this start
        self._made_cost, self._made_tokens = 0.0, 0  # in those seconds
        self._aside: dict[str, tuple[float, int]] = {}  # id -> the most that it can cost, and take
        self._cost_aside, self._tokens_aside = 0.0, 0
        self._refused: str | None = None  # by which limit, since something was last given back

    def add(self, reply: Reply) -> None:
        self._begun_sum -= self._begun.pop(reply.id, 0.0)
        cost, tokens = self._aside.pop(reply.id, (0.0, 0))
        self._cost_aside, self._tokens_aside = self._cost_aside - cost, self._tokens_aside - tokens
        self._refused = None
        if reply.finish_reason == "failed":
            self.cost.total += reply.cost
            return
        taken = reply.prompt_tokens + reply.reasoning_tokens + reply.answer_tokens
        self.cost.add(reply.cost)
        self.tokens.add(taken)
        self._replies, self._seconds = self._replies + 1, self._seconds + reply.seconds
        self._made_cost, self._made_tokens = self._made_cost + reply.cost, self._made_tokens + taken

    def room(self, in_flight: int, most: int) -> int:
        """How many of `most` further samples may be admitted now."""
        limits = self.budget
        if limits.hours is not None and self.hours() + self._seconds / 3600 / max(self._replies, 1) >= limits.hours:
            return 0
        if limits.hard:
            return 0 if self._refused else most
        age = len(self._begun) * self._clock() - self._begun_sum
        share = age / self._seconds if self._seconds else 0.0  # of all that was made, so much is under way
        if limits.cost is not None:
            most = min(most, self.cost.room(limits.cost, in_flight, share * self._made_cost))
        if limits.tokens is not None:
            most = min(most, self.tokens.room(limits.tokens, in_flight, share * self._made_tokens))
        return max(most, 0)

    def admit(self, ask: Ask) -> bool:
        """Whether this one may be asked, now; of a hard budget its most is then set aside."""
        limits = self.budget
        if not limits.hard:
            self._begun[ask.id] = now = self._clock()
            self._begun_sum += now
            return True
        cost, tokens = worst(ask, self._prices)
        if limits.cost is not None and self.cost.total + self._cost_aside + cost > limits.cost:
            self._refused = f"budget.cost {limits.cost:g}"
        elif limits.tokens is not None and self.tokens.total + self._tokens_aside + tokens > limits.tokens:
            self._refused = f"budget.tokens {limits.tokens}"
        else:
            self._aside[ask.id] = cost, tokens
            self._cost_aside, self._tokens_aside = self._cost_aside + cost, self._tokens_aside + tokens
        return ask.id in self._aside

    def said(self) -> str:
        """Which limit it was, for a person."""
        limits = self.budget
        if self._refused:
            spent = f"{self.cost.total:.4g} and {self.tokens.total:.0f} tokens spent"
            return f"{self._refused}, which is hard, has room for no further sample at its longest ({spent})"
        if limits.cost is not None and self.cost.room(limits.cost, 0, 0.0) < 1:
            return f"budget.cost {limits.cost:g} has room for no further sample ({self.cost.total:.4g} spent)"
        if limits.tokens is not None and self.tokens.room(limits.tokens, 0, 0.0) < 1:
            return f"budget.tokens {limits.tokens} has room for no further sample ({self.tokens.total:.0f} spent)"
        return f"budget.hours {limits.hours:g} is over"


def worst(ask: Ask, prices: tuple[float, float]) -> tuple[float, int]:
    """The most that one attempt can cost, and take: no token of a prompt is shorter than a byte."""
    prompt = sum(len(message["content"].encode("utf-8", "surrogatepass")) for message in ask.messages) + _TEMPLATE
    return prompt * prices[0] + ask.max_tokens * prices[1], prompt + ask.max_tokens
