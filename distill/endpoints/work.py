"""One call of generate(): many requests to one or several servers at once, each sample until it has its reply.

What counts as an attempt. A sample has `teacher.attempts` tries in one start, with pauses that double from half a
second to a minute, drawn between zero and that ("full jitter": Brooker, AWS Architecture Blog, 2015), or as long as
the server asks. Not counted are: tries that never reached a server; a kept connection that turned out closed; a reply
cut down to the room that the server says there is; and tries at an endpoint that then proved to be down, up to
`attempts` of them, so that a sample which itself brings servers down ends too.

While no endpoint is up, samples wait; after `teacher.timeout` seconds of that (which a request may take anyway) those
in hand are answered "failed", and the run ends with ConnectionError: another start asks them again.

An endpoint that refuses its key, its model or its address gets no more work; the others go on. When none is left the
run ends with UserError, which says what the server said.
"""

import asyncio
import contextlib
import random
import sys
from collections import deque
from dataclasses import dataclass, replace

from distill.endpoints.endpoint import Endpoint, clock
from distill.endpoints.failures import Failure, Filtered, Refused, TooLong
from distill.endpoints.outcomes import charged, make_reply
from distill.endpoints.requests import room_for
from distill.errors import UserError
from distill.recipe_teacher import Teacher
from distill.records import Ask, Asks, Reply

_BATCH = 64  # replies that are handed over without waiting for more
_BATCH_SECONDS = 0.1
_SWEEP_SECONDS = 0.1
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0
_HELD_SECONDS = 0.25
_SHRINKS = 3  # times that max_tokens of one request is cut down to what fits
_QUIET_SECONDS = 30.0  # between words about one endpoint


@dataclass(slots=True)
class _Sample:
    """An Ask on its way."""

    ask: Ask
    attempts: int = 0
    moves: int = 0  # attempts that were not counted, for the endpoint was down
    cost: float = 0.0
    charged: tuple[Endpoint, int] | None = None  # where the latest attempt was counted, and how often it had been down


class Work:
    """All of it runs in the loop, which runs only inside `step`; replies before an `error` are handed over first."""

    def __init__(
        self, teacher: Teacher, endpoints: list[Endpoint], asks: Asks, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._teacher, self._endpoints, self._asks, self._loop = teacher, endpoints, asks, loop
        self.error: BaseException | None = None  # ends the run
        self._done: list[Reply] = []
        self._ready: deque[_Sample] = deque()  # to be sent again as soon as there is room
        self._in_hand: dict[str, _Sample] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._dry = False  # the source has nothing more for now
        self._filling = False
        self._wake: asyncio.Future[None] | None = None
        self._all_down_since: float | None = None
        self._spoke: dict[str, float] = {}
        self._told_down: set[str] = set()
        for endpoint in endpoints:
            endpoint.limit.restart(clock())
            if not endpoint.up and endpoint.out is None:  # since an earlier call
                self._start(self._bring_back(endpoint))
        self._start(self._sweeps())

    @property
    def over(self) -> bool:
        return not self._in_hand and not self._done and self._asks.closed

    async def step(self) -> list[Reply]:
        """Work for a moment; what was finished."""
        self._dry = False
        self._fill()
        if len(self._done) < _BATCH and self.error is None and not self.over:
            self._wake = self._loop.create_future()
            timer = self._loop.call_later(_BATCH_SECONDS, self._waken)
            await self._wake
            timer.cancel()
        done, self._done = self._done, []
        return done

    async def close(self) -> None:
        """Give up at once what is in flight."""
        others = asyncio.all_tasks() - {asyncio.current_task()}  # with the step that Ctrl-C may have left
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for endpoint in self._endpoints:
            endpoint.close()
            endpoint.in_flight = 0
        await asyncio.sleep(0)  # the loop closes an aborted socket in its next turn
        await asyncio.sleep(0)

    # Giving out work.

    def _fill(self) -> None:
        self._filling = False
        while self.error is None:
            room = sum(max(0, endpoint.room) for endpoint in self._endpoints)
            if not room or not (self._ready or not self._dry):
                return
            if not self._ready:
                asks = self._asks.take(room)
                self._dry = len(asks) < room
                for ask in asks:
                    self._in_hand[ask.id] = sample = _Sample(ask)
                    self._ready.append(sample)
            while self._ready and (endpoint := self._next(self._ready[0])) is not None:
                self._send(self._ready.popleft(), endpoint)

    def _next(self, sample: _Sample) -> Endpoint | None:
        """The endpoint whose turn it is by weight (stride scheduling: Waldspurger and Weihl, 1995), among those with
        room; the one where the sample just failed only if there is no other."""
        if len(self._endpoints) == 1:
            return self._endpoints[0] if self._endpoints[0].room > 0 else None
        failed = sample.charged[0] if sample.charged else None
        open_ = [endpoint for endpoint in self._endpoints if endpoint.room > 0]
        if not open_:
            return None
        chosen = min(open_, key=lambda endpoint: (endpoint is failed, endpoint.turn))
        # Who was away does not catch up.
        now = min(endpoint.turn for endpoint in open_)
        chosen.turn = max(chosen.turn, now) + 1 / chosen.settings.weight
        return chosen

    def _send(self, sample: _Sample, endpoint: Endpoint) -> None:
        endpoint.in_flight += 1
        endpoint.limit.sent(endpoint.in_flight)
        self._start(self._serve(sample, endpoint))

    def _again(self, sample: _Sample) -> None:
        self._ready.append(sample)
        self._fill_soon()

    def _fill_soon(self) -> None:
        if not self._filling:
            self._filling = True
            self._loop.call_soon(self._fill_now)

    def _fill_now(self) -> None:
        try:
            self._fill()
        except Exception as error:  # the source's; the loop would only print it
            self.error = self.error or error
            self._waken()

    # One attempt.

    async def _serve(self, sample: _Sample, endpoint: Endpoint) -> None:
        failure: Failure | None = None
        try:
            await self._attempt(sample, endpoint)
        except Failure as error:
            failure = error
        except Filtered:
            self._finish(sample, endpoint, Reply(sample.ask.id, "", "content_filter", 0, 0, 0, 0.0))
        except Refused as error:
            self._refused(sample, endpoint, error)
        if failure is not None and failure.overload:
            # Its place stays empty for a moment, so that a server that is full is not asked again in the next.
            await asyncio.sleep(random.uniform(0, _HELD_SECONDS))
        endpoint.in_flight -= 1
        if failure is not None and failure.overload:
            endpoint.limit.rejected(clock(), endpoint.in_flight)
        elif failure is None or failure.sent:
            endpoint.limit.finished(clock(), endpoint.in_flight)
        if failure is not None:
            self._failed(sample, endpoint, failure)
        self._fill_soon()

    async def _attempt(self, sample: _Sample, endpoint: Endpoint) -> None:
        ask, max_tokens = sample.ask, sample.ask.max_tokens
        for shrinks in range(_SHRINKS + 1):
            try:
                answer, seconds = await endpoint.ask(ask, max_tokens)
            except TooLong as error:
                room = room_for(ask, max_tokens, error)
                if room is None or shrinks == _SHRINKS:
                    reply = Reply(ask.id, "", "prompt_too_long", error.prompt or 0, 0, 0, 0.0)
                    endpoint.succeeded()
                    self._finish(sample, endpoint, reply)
                    return
                max_tokens = room
                continue
            break
        names = endpoint.names
        if not names.knows(answer.model) and not names.listed:
            names.listed = True
            with contextlib.suppress(Failure, Refused, TooLong, Filtered):
                names.learn(await endpoint.models())
        if not names.accepts(answer.model):
            said = f"the reply is of '{answer.model}', not of '{endpoint.model}'"
            raise Failure("wrong_model", said, usage=answer.usage)
        reply = make_reply(ask, answer, seconds, self._teacher.api == "chat")
        endpoint.succeeded()
        sample.cost += self._price(endpoint, answer.usage)
        self._finish(sample, endpoint, reply)

    def _price(self, endpoint: Endpoint, usage: object) -> float:
        return charged(usage, endpoint.settings.prompt_price, endpoint.settings.completion_price)

    def _finish(self, sample: _Sample, endpoint: Endpoint | None, reply: Reply) -> None:
        several = len(self._endpoints) > 1
        attempts = sample.attempts + (endpoint is not None)
        name = endpoint.name if several and endpoint is not None else None
        self._done.append(replace(reply, attempts=attempts, cost=sample.cost, endpoint=name))
        del self._in_hand[sample.ask.id]
        if len(self._done) >= _BATCH or self.over:
            self._waken()

    # When it brought nothing.

    def _failed(self, sample: _Sample, endpoint: Endpoint, failure: Failure) -> None:
        sample.cost += self._price(endpoint, failure.usage)
        downs = endpoint.downs
        if endpoint.failed(failure):
            self._went_down(endpoint, failure)
        if not failure.sent:
            self._take_back(sample)
            self._again(sample)
            return
        sample.attempts += 1
        sample.charged = (endpoint, downs)
        self._take_back(sample)
        if sample.attempts >= self._teacher.attempts:
            self._finish(sample, None, _failed_reply(sample.ask, self._hide(str(failure))))
            return
        pause = random.uniform(0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(sample.attempts - 1, 16)))
        self._loop.call_later(max(pause, failure.retry_after or 0.0), self._after_pause, sample)

    def _after_pause(self, sample: _Sample) -> None:
        self._take_back(sample)
        self._again(sample)

    def _take_back(self, sample: _Sample) -> None:
        """Uncount the latest attempt if its endpoint has gone down since."""
        if sample.charged is None or sample.moves >= self._teacher.attempts:
            return
        endpoint, downs = sample.charged
        if endpoint.downs > downs:
            sample.charged = None
            sample.attempts -= 1
            sample.moves += 1

    def _refused(self, sample: _Sample, endpoint: Endpoint, error: Refused) -> None:
        endpoint.errors[f"http_{error.status}"] += 1
        endpoint.refusals += not error.endpoint
        if not error.endpoint and not (endpoint.refusals > 1 and not endpoint.answered):
            sample.attempts += 1
            said = self._hide(f"http_{error.status}: {error}")
            self._finish(sample, None, _failed_reply(sample.ask, said))
            return
        self._again(sample)
        if endpoint.out is not None:
            return
        said = self._hide(f"{endpoint.place} ({endpoint.name}, model '{endpoint.model}'): {error}")
        endpoint.up, endpoint.out = False, said
        if all(other.out is not None for other in self._endpoints):
            self.error = UserError("; ".join(str(other.out) for other in self._endpoints))
            self._waken()
        else:
            _say(f"{endpoint.out}; it gets no more work")

    # Health.

    def _went_down(self, endpoint: Endpoint, failure: Failure) -> None:
        now, said = clock(), self._hide(str(failure))
        alone = not any(other.up for other in self._endpoints)
        if alone and self._all_down_since is None:
            self._all_down_since = now
            _say(f"no endpoint is up ({endpoint.name}: {said}); waiting for one")
        elif now - self._spoke.get(endpoint.name, -_QUIET_SECONDS) >= _QUIET_SECONDS:
            self._spoke[endpoint.name] = now
            self._told_down.add(endpoint.name)
            _say(f"{endpoint.name} is down ({said}); its work goes to the others")
        self._start(self._bring_back(endpoint))

    async def _bring_back(self, endpoint: Endpoint) -> None:
        await endpoint.wait_until_back()
        if endpoint.name in self._told_down or self._all_down_since is not None:
            self._all_down_since = None
            self._told_down.discard(endpoint.name)
            _say(f"{endpoint.name} is up again")
        self._fill_soon()

    async def _sweeps(self) -> None:
        pause = min(_SWEEP_SECONDS, self._teacher.idle_timeout / 4, self._teacher.timeout / 4)
        while True:
            await asyncio.sleep(pause)
            now = clock()
            for endpoint in self._endpoints:
                endpoint.sweep(now)
            self._fill_soon()
            if self._all_down_since is not None and now - self._all_down_since > self._teacher.timeout:
                self._give_up(now - self._all_down_since)

    def _give_up(self, seconds: float) -> None:
        names = ", ".join(endpoint.name for endpoint in self._endpoints if endpoint.out is None)
        said = f"no endpoint was up for {seconds:.0f} s: {names}"
        self._all_down_since = None
        self._ready.clear()
        for sample in list(self._in_hand.values()):
            self._finish(sample, None, _failed_reply(sample.ask, f"no_endpoint: {said}"))
        self.error = ConnectionError(f"{said}; what is finished is kept, start the same command again to go on")
        self._waken()

    def _hide(self, said: str) -> str:
        """A server may quote the key in its complaint."""
        for endpoint in self._endpoints:
            said = said.replace(endpoint.key, "...") if endpoint.key else said
        return said

    # The loop.

    def _start(self, coroutine: "asyncio._CoroutineLike[None]") -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.error = self.error or error  # a mistake of ours: it ends the run, with its traceback
            self._waken()

    def _waken(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


def _failed_reply(ask: Ask, error: str) -> Reply:
    return Reply(ask.id, "", "failed", 0, 0, 0, 0.0, error=error)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
