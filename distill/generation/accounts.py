"""What generation costs while it goes on, and what it came to: the accounts of the trace stage.

What the trace lines say (tokens, seconds, cost, attempts, outcomes) is summed up from them in the end, so a kill loses
nothing of it. What they do not say (time, throughput, errors, failures) is kept in traces/accounts.json, written
every few seconds: a kill loses those seconds of it.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from distill.generation.live import Standing, lines
from distill.generation.record import NAME, Record
from distill.generation.throughput import Amount, Recent
from distill.generation.totals import Totals, error_kind
from distill.records import EndpointState, Reply

if TYPE_CHECKING:
    from distill.recipe import Sampling, Teacher
    from distill.runfolder import RunFolder

_SHOW_SECONDS = 0.2
_SAVE_SECONDS = 5.0


class Spent(NamedTuple):
    """Over all starts, for the budget."""

    cost: float
    tokens: int  # prompts and replies together
    hours: float


class Accounts:
    """Context manager around the stage's loop; shows the progress and keeps traces/accounts.json.

        with Accounts(run, wanted, done) as accounts:
            for replies in teacher.generate(asks):
                ...                              # made durable
                accounts.add(replies)
                accounts.tick(teacher.states())
        return {..., "generation": accounts.facts(totals)}

    `wanted` and `done` count the plan's samples. Until facts() is given exact sums, those of earlier starts are what
    accounts.json says, which a kill may have left a few seconds behind.
    """

    def __init__(self, run: "RunFolder", wanted: int, done: int) -> None:
        self._path = run.path("traces", NAME)
        self._record = Record.load(self._path)
        sums = self._record.totals.all()
        self._cost = sums.cost + self._record.failed_cost
        self._amount = Amount(sums.finished, sums.prompt_tokens, sums.completion_tokens)
        self._earlier = {name: Counter(kinds) for name, kinds in self._record.errors.items()}
        self._states: Mapping[str, EndpointState] = {}
        self._recipe, self._gpus = run.recipe, 0.0
        self._progress = run.progress("traces", wanted, "traces", done=done)
        self._wanted, self._done = wanted, done
        self._unshown = 0
        self._now = time.monotonic()

    def __enter__(self) -> "Accounts":
        if self._wanted > self._done:
            self._gpus = gpus(self._recipe.teacher, self._recipe.sampling)
            self._record.starts += 1
            self._save()  # where the folder takes no new file, that is known before anything is asked
        self._now = self._shown = self._saved = time.monotonic()
        self._counted = self._amount
        self._recent = Recent(self._now, self._amount)
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pass_time()
        try:
            self._show()
        finally:
            self._progress.__exit__(kind, error, trace)
        if self._record.starts:
            try:
                self._save()
            except OSError:
                if kind is None:  # else the error under way says what there is to say, of a full disk maybe
                    raise

    def add(self, replies: Iterable[Reply]) -> None:
        """Count replies that are on the disk, those that `failed` too."""
        of, record = self._record.totals.of, self._record
        finished = prompt = completion = 0
        for reply in replies:
            self._cost += reply.cost
            if reply.finish_reason == "failed":
                record.failed[error_kind(reply.error)] += 1
                record.failed_cost += reply.cost
                continue
            tokens = reply.reasoning_tokens + reply.answer_tokens
            of(reply.endpoint).count(
                reply.finish_reason, reply.prompt_tokens, tokens, reply.seconds, reply.cost, reply.attempts
            )
            finished += 1
            prompt += reply.prompt_tokens
            completion += tokens
        before = self._amount
        self._amount = Amount(
            before.finished + finished, before.prompt_tokens + prompt, before.completion_tokens + completion
        )
        self._done += finished
        self._unshown += finished

    def expect(self, wanted: int) -> None:
        """The plan has grown or shrunk (adaptive sampling)."""
        self._wanted = self._progress.total = wanted

    def graded(self, right: int, wrong: int) -> None:
        """So many more traces were verified; `wrong` with those that could not be."""
        self._record.right += right
        self._record.wrong += wrong

    def tick(self, states: Mapping[str, EndpointState]) -> None:
        """Show how things stand and, every few seconds, write it down. Call it at least every 0.2 s.

        Raises OSError if accounts.json cannot be written.
        """
        self._states = states
        now = time.monotonic()
        if now - self._shown < _SHOW_SECONDS:
            return
        self._shown = now
        self._pass_time()
        self._show()
        if now - self._saved >= _SAVE_SECONDS:
            self._save()
            self._saved = time.monotonic()

    @property
    def spent(self) -> Spent:
        """Cheap; may be asked at every tick."""
        hours = (self._record.wall_seconds + time.monotonic() - self._now) / 3600
        return Spent(self._cost, self._amount.prompt_tokens + self._amount.completion_tokens, hours)

    def facts(self, totals: Totals | None = None) -> dict[str, Any]:
        """For the manifest, under the stage's "generation". `totals`: sums over the lines of all current traces,
        which the caller makes while it writes the table: `totals.trace(row)` for each."""
        record = self._record.with_shards(self._path.parent)
        record.totals = totals or record.totals
        return record.facts()

    def _pass_time(self) -> None:
        """Book what happened since the last time, at the end of that time."""
        now = time.monotonic()
        record = self._record
        record.wall_seconds += now - self._now
        record.gpu_seconds += self._gpus * (now - self._now)
        self._now = now
        news = Amount(*(a - b for a, b in zip(self._amount, self._counted, strict=True)))
        self._counted = self._amount
        if record.starts:
            record.throughput.count(record.wall_seconds, news)
        self._recent.mark(now, self._amount)
        for name, state in self._states.items():
            record.errors[name] = self._earlier.get(name, Counter()) + Counter(state.errors)
            record.limits[name] = state.limit

    def _show(self) -> None:
        finished, prompt, completion = self._recent.rates(self._now, self._amount)
        standing = Standing(
            prompt, completion, self._record.right, self._record.wrong, self._cost, self._cost_at_the_end(),
            self._states, self._record.failed.total(),
        )  # fmt: skip
        self._progress.tell(finished, lines(standing, brief=not self._progress.on_terminal))
        self._progress.advance(self._unshown)
        self._unshown = 0

    def _cost_at_the_end(self) -> float:
        """What is still to come costs what a sample cost so far."""
        finished = self._amount.finished
        return self._cost + max(self._wanted - self._done, 0) * self._cost / finished if finished else self._cost

    def _save(self) -> None:
        self._record.save(self._path)


def gpus(teacher: "Teacher", sampling: "Sampling | None" = None) -> float:
    """How many GPUs generation keeps busy: those behind the endpoints, or of this machine those that vLLM is given."""
    if teacher.kind == "endpoint":
        return sum(endpoint.gpus for endpoint in teacher.endpoints)
    if teacher.kind != "vllm":
        return 0.0  # our engine, as the embedded teacher, runs on the CPU
    from distill.serving.arguments import sequence_length
    from distill.serving.gpus import gpu_memories
    from distill.serving.model import read_facts
    from distill.serving.placement import place

    memories = gpu_memories()
    if not memories:
        return 0.0
    facts = read_facts(teacher.model, teacher.revision)
    length = sequence_length(teacher, sampling, facts) or (sampling.max_tokens if sampling else 1)
    return float(place(facts, teacher.vllm, memories, length).gpus)
