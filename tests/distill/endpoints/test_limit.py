"""The limit against simulated servers of known capacity, in simulated time."""

import heapq
import itertools
import random

import pytest

from distill.endpoints.limit import START, Limit


class World:
    """A server of `capacity` places, behind which requests queue, or are rejected; and a client without end of work.

    seconds: of a request on a place of its own. reject: requests beyond the capacity are answered 429 at once.
    random_reject: this share is, whatever the load. streams: the client sees the bytes as they are made.
    """

    def __init__(self, most=4096, *, capacity, seconds, reject=False, random_reject=0.0, streams=False, spread=0.3):
        self.draw = random.Random(5)
        self.capacity, self.seconds, self.reject = capacity, seconds, reject
        self.random_reject, self.streams, self.spread = random_reject, streams, spread
        self.now, self.in_flight, self.done, self.rejected = 0.0, 0, 0, 0
        self.events, self.order = [], itertools.count()
        self.busy, self.queue = {}, []
        self.limit = Limit(most, streams, 0.0)
        self.seen = []

    def run(self, seconds):
        """The mean limit over the second half of the time, and replies a second in it."""
        end, start, before = self.now + seconds, self.now + seconds / 2, None
        self.at(self.now + 0.1, "sweep", None)
        area = 0.0
        while True:
            self.fill()
            when, _, kind, name = heapq.heappop(self.events)
            if when > end:
                break
            if when > start:
                before = self.done if before is None else before
                area += self.limit.value * (when - max(start, self.now))
            self.now = when
            getattr(self, kind)(name)
        self.events.clear()
        for name in self.busy:
            self.at(self.busy[name][1], "finish", name)
        return area / (seconds / 2), (self.done - before) / (seconds / 2)

    def at(self, when, kind, name):
        heapq.heappush(self.events, (when, next(self.order), kind, name))

    def fill(self):
        while self.in_flight < self.limit.value:
            self.in_flight += 1
            self.limit.sent(self.in_flight)
            full = self.reject and len(self.busy) >= self.capacity
            name = next(self.order)
            if full or self.draw.random() < self.random_reject:
                self.at(self.now + 0.002 + self.draw.uniform(0, 0.25), "turn_away", name)
            elif len(self.busy) < self.capacity:
                self.begin(name)
            else:
                self.queue.append(name)

    def begin(self, name):
        # Ends are known at the beginning: a place is not slowed down by the others.
        took = self.seconds * self.draw.lognormvariate(-(self.spread**2) / 2, self.spread)
        if self.streams:
            self.limit.accepted(min(1.0, self.seconds / 20))
        self.busy[name] = (self.now, self.now + took, took)
        self.at(self.now + took, "finish", name)

    def finish(self, name):
        if name not in self.busy:
            return
        _, _, took = self.busy.pop(name)
        self.in_flight -= 1
        self.done += 1
        if not self.streams:
            self.limit.accepted(took)
            self.limit.flowed(int(1e4 * took / self.seconds))
        self.limit.finished(self.now, self.in_flight)
        if self.queue and len(self.busy) < self.capacity:
            self.begin(self.queue.pop(0))

    def turn_away(self, name):
        self.in_flight -= 1
        self.rejected += 1
        self.limit.rejected(self.now, self.in_flight)

    def sweep(self, _):
        if self.streams:
            self.limit.flowed(int(1e4 / self.seconds * 0.1 * len(self.busy)))
        self.limit.tick(self.now, self.in_flight)
        self.at(self.now + 0.1, "sweep", None)


@pytest.mark.parametrize(("capacity", "seconds"), [(100, 0.05), (100, 2.0), (1000, 1.0), (256, 300.0)])
def test_it_finds_what_pays_and_not_much_more(capacity, seconds):
    world = World(capacity=capacity, seconds=seconds)
    limit, rate = world.run(120 * seconds)
    assert rate > 0.95 * capacity / seconds
    assert limit < 2.2 * capacity


def test_streams_are_found_out_long_before_the_first_is_done():
    world = World(capacity=256, seconds=600.0, streams=True)
    world.run(60)
    assert world.done == 0 and 230 <= world.limit.value <= 560


def test_replies_of_minutes_in_one_piece_are_not_waited_for():
    world = World(capacity=256, seconds=600.0)
    world.run(60)
    assert world.limit.value >= 200


@pytest.mark.parametrize(("capacity", "seconds"), [(8, 2.0), (100, 2.0), (1000, 1.0)])
def test_a_server_that_turns_away_is_kept_just_below_that(capacity, seconds):
    world = World(capacity=capacity, seconds=seconds, reject=True)
    limit, rate = world.run(180 * seconds)
    assert rate > 0.75 * capacity / seconds
    assert limit < 1.05 * capacity
    assert world.rejected < 0.15 * world.done


def test_rejections_that_load_does_not_cause_are_let_be():
    world = World(capacity=100, seconds=0.2, random_reject=0.3)
    _, rate = world.run(60)
    assert rate > 0.75 * 100 / 0.2


def test_a_server_that_gets_slower_without_doing_more_is_given_less_and_one_that_grows_more():
    world = World(capacity=100, seconds=1.0)
    before, _ = world.run(60)
    world.capacity = 10
    after, _ = world.run(900)
    assert after < 0.6 * before
    world.capacity = 400
    _, rate = world.run(600)
    assert rate > 0.9 * 400


def test_it_never_exceeds_the_cap_and_never_falls_below_one():
    capped = World(most=50, capacity=1000, seconds=0.1)
    assert capped.limit.value == START
    capped.run(20)
    assert capped.limit.value == 50
    full = World(capacity=0, seconds=0.1, reject=True)
    full.run(60)
    assert full.limit.value == 1


def test_without_enough_work_it_stays_where_it_is():
    limit = Limit(1000, False, 0.0)
    for n in range(1000):
        limit.sent(3)
        limit.flowed(1000)
        limit.finished(n * 0.1, 2)
    assert limit.value == START
