"""How many requests an endpoint is given at once, found from what comes back.

Latency alone does not tell: a server that batches gets slower with each request it takes while it makes more tokens a
second, and a reply of R1 takes minutes for reasons of its own. What tells is Little's law, requests in flight =
throughput x latency: more in flight pays exactly as long as it raises throughput; after that it only raises latency.
So throughput is what is climbed, as BBR's start-up does (Cardwell et al., ACM Queue 14(5), 2016: the rate is doubled
until it brings nothing), and overload that the server reports shrinks by a factor (AIMD: Chiu and Jain, 1989), as in
Netflix's concurrency-limits.

A round lasts until all that was in flight at its beginning has been replaced (a round trip), or, where replies are
streamed, until bytes have flowed for a while, for rounds of minutes would be a late answer. After each change one round
passes unmeasured. Throughput is counted in bytes of replies. A round counts only if the limit was what held requests
back.

- Growing: the limit doubles while that raises throughput by at least GAIN per doubling; two rounds in a row that do not
  take it back, and it rests. Out of the rest, after REST rounds (twice as many each time it was in vain), it tries a
  quarter more.
- Resting: two rounds in a row with throughput down by a third, at the same limit, mean that latency has risen for
  nothing: a fifth less is tried, and again, as long as it costs no more than the noise of the measurement.
- Overload (429, 503, a time out): the limit falls to 0.8 of what was in flight, once a round, climbs back by a
  twentieth a round to just below where it was, unmeasured, and creeps on until it meets overload again. Where two such
  steps do not make the share of rejections smaller, load is not their cause, and that share is let be.
"""

import math

START = 32
GAIN = 1.15  # of throughput, for a doubling of the limit, that makes it worth while
REST = 8
_MOST_REST = 64
_BLIND = 256  # requests that are sent before anything has come back at all
_BLIND_SECONDS = 15.0  # between doublings up to that
_FLOW_SECONDS = 2.0  # of a round of streamed replies
_SHORTEST = 0.1  # seconds of a round
_ENOUGH = 16  # answers that a share of rejections is taken of


class Limit:
    """Feed it what happens; `value` is how many requests may be in flight. All times are by one monotonic clock."""

    def __init__(self, most: int, streams: bool, now: float) -> None:
        self.most, self._streams = most, streams
        self._exact = float(min(START, most))
        self._growing = True
        self._factor = 2.0
        self._base: tuple[float, float] | None = None  # limit and throughput before the latest growth
        self._shrunk: tuple[float, float] | None = None  # the same before a trial with less
        self._rate: float | None = None  # throughput while resting
        self._ceiling: float | None = None  # where overload was met
        self._vain = 0  # rounds in a row without the effect that is looked for
        self._rest, self._rested = REST, 0
        self._settling = False
        self._steps: list[tuple[float, float]] = []  # limit and share of rejections, where it shrank for them
        self._tolerated = 0.0  # share of rejections that load is not the cause of
        self._accepted = self._rejected = 0  # since that share was last looked at
        self._first_byte = 0.0  # seconds until one, smoothed
        self._begin(now, 0)

    @property
    def value(self) -> int:
        return max(1, int(self._exact))

    def _begin(self, now: float, in_flight: int) -> None:
        self._since, self._bytes, self._done = now, 0, 0
        self._bound = in_flight >= self.value  # whether the limit held requests back
        self._due = max(1, in_flight)

    # What happens.

    def restart(self, now: float) -> None:
        """Time has passed in which nothing was asked."""
        self._begin(now, 0)

    def sent(self, in_flight: int) -> None:
        if in_flight >= self.value:
            self._bound = True

    def accepted(self, seconds: float) -> None:
        """The first byte of a reply came, `seconds` after it was asked for."""
        self._accepted += 1
        self._first_byte += (seconds - self._first_byte) / (4 if self._first_byte else 1)

    def flowed(self, size: int) -> None:
        """Bytes of replies came."""
        self._bytes += size

    def finished(self, now: float, in_flight: int) -> None:
        """A request was answered, or failed for a reason that is not load; `in_flight` without it."""
        self._done += 1
        self.tick(now, in_flight)

    def rejected(self, now: float, in_flight: int) -> None:
        """A request met a server that has too much to do."""
        self._done += 1
        self._rejected += 1
        enough = self._rejected >= max(2, min(self.value, self._due) / 8) and now - self._since >= _SHORTEST
        if not (enough and self._overload(now, in_flight)):
            self.tick(now, in_flight)

    def tick(self, now: float, in_flight: int) -> None:
        """Ends the round if it is time; called with each event and from time to time."""
        passed = now - self._since
        if not self._accepted and not self._bytes and not self._done:
            if passed >= _BLIND_SECONDS and self._bound and self._exact < _BLIND:
                self._set(self._exact * 2, now, in_flight)
            return
        flowed = self._streams and self._bytes and passed >= max(_FLOW_SECONDS, 3 * self._first_byte)
        if passed >= _SHORTEST and (self._done >= self._due or flowed) and not self._overload(now, in_flight):
            self._round(now, in_flight)

    # What follows from it.

    def _round(self, now: float, in_flight: int) -> None:
        rate = self._bytes / (now - self._since)
        if self._settling or not self._bound:
            self._settling = False
            self._begin(now, in_flight)
        elif self._shrunk is not None:
            self._judge_less(rate, now, in_flight)
        elif self._base is not None:
            self._judge_more(rate, now, in_flight)
        elif self._growing:
            self._grow(rate, now, in_flight)
        elif self._ceiling is not None and self._exact < self._recovered:
            self._set(min(self._exact * 1.05, self._recovered), now, in_flight)
        else:
            self._resting(rate, now, in_flight)

    @property
    def _recovered(self) -> float:
        assert self._ceiling is not None
        return max(1.0, self._ceiling * 0.95 - 1)

    def _grow(self, rate: float, now: float, in_flight: int) -> None:
        if self._exact >= self.most:
            self._growing = False
            self._begin(now, in_flight)
            return
        self._base, self._vain, self._settling = (self._exact, rate), 0, True
        self._set(self._exact * self._factor, now, in_flight)

    def _judge_more(self, rate: float, now: float, in_flight: int) -> None:
        assert self._base is not None
        limit, before = self._base
        if rate >= before * GAIN ** math.log2(self._exact / limit):
            self._base, self._rest = None, REST
            self._grow(rate, now, in_flight)
        elif self._vain == 0:
            self._vain = 1
            self._begin(now, in_flight)
        else:
            self._settle_down(1.25)
            self._set(limit, now, in_flight)

    def _settle_down(self, factor: float) -> None:
        """Rest; the next growth is by `factor`."""
        self._base, self._shrunk, self._rate, self._growing = None, None, None, False
        self._factor, self._vain, self._rested, self._settling = factor, 0, 0, True

    def _resting(self, rate: float, now: float, in_flight: int) -> None:
        self._rested += 1
        self._rate = rate if self._rate is None else max(rate, self._rate)
        self._vain = self._vain + 1 if rate < self._rate * 2 / 3 else 0
        if self._vain >= 2:
            self._try_less(rate, now, in_flight)
        elif self._rested >= REST and self._ceiling is not None:
            # The server itself says where it ends, so no throughput need show that there was room.
            self._rested, self._rate = 0, None
            if self._exact > 1.2 * self._ceiling:
                self._ceiling = None
            self._set(min(self.most, self._exact * 1.05), now, in_flight)
        elif self._rested >= self._rest and self._exact < self.most:
            self._rest = min(_MOST_REST, 2 * self._rest)
            self._growing = True
            self._grow(rate, now, in_flight)
        else:
            self._begin(now, in_flight)

    def _try_less(self, rate: float, now: float, in_flight: int) -> None:
        self._settle_down(self._factor)
        if self._exact > 1:
            self._shrunk = (self._exact, rate)
        self._set(self._exact * 0.8, now, in_flight)

    def _judge_less(self, rate: float, now: float, in_flight: int) -> None:
        assert self._shrunk is not None
        (limit, before), self._shrunk = self._shrunk, None
        if rate < before * 0.95:
            self._set(limit, now, in_flight)
        else:
            self._try_less(rate, now, in_flight)

    def _overload(self, now: float, in_flight: int) -> bool:
        """Looks at the rejections, if there is enough to see; whether the limit was changed for them."""
        rejected, total = self._rejected, self._accepted + self._rejected
        if total < min(_ENOUGH, 2 * self.value):
            return False
        self._accepted = self._rejected = 0
        if not rejected:
            self._steps.clear()
            self._tolerated *= 0.9
        share = rejected / total
        if rejected < 2 or share <= self._tolerated:
            return False
        self._steps = [*self._steps[-2:], (self._exact, share)]
        limits, shares = zip(*self._steps, strict=True)
        if len(shares) == 3 and max(shares) < 0.6 and shares[2] >= 0.7 * max(shares):
            self._tolerated = min(0.8, 1.5 * share + 0.05)
            self._settle_down(2.0)
            self._steps, self._ceiling, self._growing = [], None, True
            self._set(limits[0], now, in_flight)
            return True
        self._settle_down(1.25)
        self._ceiling = min(self._exact, in_flight + 1.0)
        self._set(self._ceiling * 0.8, now, in_flight)
        return True

    def _set(self, limit: float, now: float, in_flight: int) -> None:
        if limit > self._exact:
            limit = max(limit, self._exact + 1)  # so that small limits move
        self._exact = min(float(self.most), max(1.0, limit))
        self._begin(now, in_flight)
