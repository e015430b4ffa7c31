"""What may still be spent: so many samples are admitted that none of the recipe's limits is expected to be passed."""

from collections.abc import Callable

from distill.recipe import Budget
from distill.records import Reply

_ENOUGH = 8  # samples whose mean is worth more than the worst case


class Spending:
    """What generation has spent, and how many more samples there is room for.

    `samples`, `cost`, `tokens`: what the run folder's lines say was spent at earlier starts, stale ones too, for that
    is spent as well. `hours` gives the time so far over all starts. `worst_cost`, `worst_tokens`: of one sample.

    What finishes first is short, so as long as fewer samples have finished than are in flight, those in flight are
    taken to cost the worst. A lone one is admitted as long as one like the others has room.
    """

    def __init__(
        self, budget: Budget, samples: int, cost: float, tokens: int, hours: Callable[[], float],
        worst_cost: float, worst_tokens: int,
    ) -> None:  # fmt: skip
        self.budget, self.cost, self.tokens, self.hours = budget, cost, tokens, hours
        self._samples, self._worst_cost, self._worst_tokens = samples, worst_cost, worst_tokens
        self._seconds, self._timed = 0.0, 0

    def add(self, reply: Reply) -> None:
        self.cost += reply.cost
        if reply.finish_reason == "failed":
            return
        self.tokens += reply.prompt_tokens + reply.reasoning_tokens + reply.answer_tokens
        self._samples += 1
        self._seconds += reply.seconds
        self._timed += 1

    def room(self, in_flight: int, most: int) -> int:
        """How many of `most` further samples may be admitted now."""
        limits = self.budget
        if limits.hours is not None:
            mean = self._seconds / self._timed / 3600 if self._timed else 0.0
            if self.hours() + mean >= limits.hours:
                return 0
        if limits.cost is not None:
            most = min(most, self._fits(limits.cost, self.cost, self._worst_cost, in_flight))
        if limits.tokens is not None:
            most = min(most, self._fits(limits.tokens, self.tokens, self._worst_tokens, in_flight))
        return max(most, 0)

    def _fits(self, limit: float, spent: float, worst: float, in_flight: int) -> int:
        mean = spent / self._samples if self._samples else 0.0
        each = mean if self._samples >= max(_ENOUGH, in_flight) else max(mean, worst)
        fits = int((limit - spent) / each) - in_flight if each else 1 << 30
        alone = not in_flight and spent < limit and spent + mean <= limit
        return max(fits, int(alone))

    def said(self) -> str:
        """Which limit it was, for a person."""
        limits = self.budget
        if limits.cost is not None and not self._fits(limits.cost, self.cost, self._worst_cost, 0) > 0:
            return f"budget.cost {limits.cost:g} has room for no further sample ({self.cost:.4g} spent)"
        if limits.tokens is not None and not self._fits(limits.tokens, self.tokens, self._worst_tokens, 0) > 0:
            return f"budget.tokens {limits.tokens} has room for no further sample ({self.tokens} spent)"
        return f"budget.hours {limits.hours:g} is over"
