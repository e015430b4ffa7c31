"""Stage 'traces': k samples a problem from the teacher, none lost and none made twice.

A trace's id is the hash of everything that determines it (problem, sample index, sampling settings, seed,
teacher), so resuming is a set difference: what the recipe asks for minus what the file holds. An edited
problem, another temperature or another teacher asks for other ids; the old lines stay in traces.jsonl,
for they may have cost GPU time and going back to the old settings finds them again. Every reader passes
them over (`table.current_traces`), and traces.parquet does not have them.

Nothing here grows with the number of samples but some 30 bytes of each: problems are read from their file when they
are asked, what comes back is written and forgotten.
"""

import gc
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any, cast

from distill.generation.accounts import Accounts
from distill.generation.asks import Flight, PlannedAsks
from distill.generation.budget import Spending, Spent, worst
from distill.generation.finished import Finished
from distill.generation.interrupts import draining
from distill.generation.logprobs import LogprobsWriter
from distill.generation.plan import Planner, plan, sampling_record, trace_id
from distill.generation.recorder import Made, Recorder
from distill.generation.survey import ProblemFile, survey
from distill.generation.table import current_traces, write_table
from distill.generation.totals import Totals
from distill.generation.verify import Verifier
from distill.jsonl import Appender, read_jsonl
from distill.manifest import utc_now
from distill.reasoning import split_reasoning
from distill.recipe import Recipe, Sampling, Teacher
from distill.records import Reply, TeacherBackend, Trace

if TYPE_CHECKING:
    from distill.runfolder import RunFolder

__all__ = ["identify_teacher", "make_trace", "open_teacher", "plan", "run", "sampling_record", "trace_id"]


def run(recipe: Recipe, run: "RunFolder") -> dict[str, Any]:
    """Generate the traces that are missing, then write traces.parquet. Returns the stage's facts.

    If some are missing in the end (a budget, Ctrl-C, samples that failed), the facts say so under "missing" and
    "stopped", a sentence, and there is no new parquet. Loads the teacher only if something is missing. Traces that
    the recipe imports were written with their problems.
    """
    if recipe.traces:
        sources = run.manifest.data["imported"]
        return {"tokens": 0, "traces": sum(source["traces"] for source in sources), "made": 0}
    facts = identify_teacher(recipe.teacher)
    run.manifest.update(teacher=facts)
    with ExitStack() as stack:
        gc.freeze()  # what is imported is not looked through again and again while millions of samples pass
        stack.callback(gc.unfreeze)
        stage = _Stage(recipe, run, Planner(recipe, facts["id"]), stack)
        stage.generate()
        return {**stage.facts(), "teacher": facts["id"]}


class _Stage:
    """One start of the stage: what it found, what it makes."""

    def __init__(self, recipe: Recipe, run: "RunFolder", planner: Planner, stack: ExitStack) -> None:
        self.recipe, self.run, self.planner = recipe, run, planner
        self.problems = stack.enter_context(closing(ProblemFile(run.path("problems.jsonl"), run.shard)))
        self.folder = run.path("traces")
        self.file = stack.enter_context(Appender(self.folder / "traces.jsonl"))
        self.finished = stack.enter_context(closing(Finished(self.file.path)))
        self.verifier: Verifier | None = None
        if recipe.sampling.adaptive is not None:
            self.verifier = stack.enter_context(Verifier(recipe, self.folder / "grades.jsonl", run.path("judge")))
        self.found = survey(self.problems, planner, self.finished, self.verifier)
        self.accounts = Accounts(run, self.found.wanted, self.found.done)
        spending = self._spending()
        self.asks = PlannedAsks(self.problems, planner, self.finished, self.found, spending, self.verifier)
        self.spending = spending
        self.made = self.tokens = 0
        self.runs_in: str | None = None

    def _spending(self) -> Spending:
        settings, found, failures = self.recipe.budget, self.finished, self.folder / "failures.jsonl"
        failed = 0.0
        if failures.is_file():
            failed = sum(row["cost"] for _, row in read_jsonl(failures, torn_ok=True))
        endpoints = self.recipe.teacher.endpoints
        prices = (
            max((endpoint.prompt_price for endpoint in endpoints), default=0.0) / 1e6,
            max((endpoint.completion_price for endpoint in endpoints), default=0.0) / 1e6,
        )
        longest = (0.0, 0)
        if self.found.open:  # the first is as good as any to judge by what a prompt adds to the reply
            longest = worst(self.planner.ask(self.problems[self.found.open[0]], 0, 0), prices)
        cost = Spent(longest[0], *found.cost, samples=found.lines)
        cost.total += failed
        tokens = Spent(longest[1], *found.tokens, samples=found.lines)
        return Spending(settings, cost, tokens, lambda: self.accounts.spent.hours, prices)

    def generate(self) -> None:
        """Ask the teacher until nothing is missing, or it is to stop."""
        if self.found.open:
            # A table of what an earlier recipe or problems file asked for would pass for this one's, should we stop.
            (self.folder / "traces.parquet").unlink(missing_ok=True)
        with ExitStack() as stack:
            accounts = stack.enter_context(self.accounts)
            if self.asks.closed:
                return
            teacher = open_teacher(self.recipe.teacher, self.recipe.sampling)
            recorder = stack.enter_context(Recorder(self.file, self.folder / "failures.jsonl", self.finished))
            keep_logprobs: Callable[[Sequence[Reply]], None] = lambda replies: None  # noqa: E731
            if self.recipe.sampling.logprobs:
                keep_logprobs = stack.enter_context(LogprobsWriter(self.folder, self.finished)).write
            stack.enter_context(draining(self._drain))
            batches = cast(Generator[list[Reply]], teacher.generate(self.asks))
            for replies in stack.enter_context(closing(batches)):
                if replies:
                    keep_logprobs(replies)
                    self._write(replies, recorder)
                self._count(recorder.durable())
                accounts.tick(teacher.states())
            recorder.flush()
            self._count(recorder.durable())
            while self.asks.grading:
                time.sleep(0.02)
                self._count([])
            # Of our engine: on some machines it is slower, and should say so.
            self.runs_in = getattr(teacher, "runs_in", None)

    def _write(self, replies: Sequence[Reply], recorder: Recorder) -> None:
        made, failures = [], []
        for flight, reply in zip(self.asks.received(replies), replies, strict=True):
            if reply.finish_reason == "failed":
                self.asks.gave_up(flight, reply.error)
                failures.append({
                    "id": reply.id, "problem_id": flight.problem["id"], "sample": flight.sample,
                    "attempts": reply.attempts, "error": reply.error, "cost": reply.cost, "time": utc_now(),
                })  # fmt: skip
            else:
                made.append(Made(flight, make_trace(flight, reply, self.planner), reply))
        if made:
            recorder.write(made)
        if failures:
            recorder.fail(failures)
            self.accounts.add(reply for reply in replies if reply.finish_reason == "failed")

    def _count(self, durable: list[Made]) -> None:
        """Go on from what has reached the disk, and from what has been graded."""
        if durable:
            self.made += len(durable)
            self.tokens += sum(made.reply.reasoning_tokens + made.reply.answer_tokens for made in durable)
            self.accounts.add(made.reply for made in durable)
            self.asks.finished([(made.flight, made.trace) for made in durable])
        right, wrong = self.asks.poll()
        if right or wrong:
            self.accounts.graded(right, wrong)
            self.accounts.expect(self.asks.wanted)

    def _drain(self) -> str:
        self.asks.drain()
        return (
            f"stopping: the {self.asks.in_flight} samples in flight are finished and kept; Ctrl-C again stops at once"
        )

    def facts(self) -> dict[str, Any]:
        """For the manifest. Where nothing is missing, the table is written first."""
        found, asks = self.found, self.asks
        facts: dict[str, Any] = {"made": self.made, "resumed": found.done, "torn": self.file.torn}
        if self.runs_in:
            facts["runs_in"] = self.runs_in
        if asks.drained:
            facts["interrupted"] = True
        missing = asks.wanted - asks.done
        if missing:
            facts |= {"tokens": found.generated + self.tokens, "traces": asks.done, "generation": self.accounts.facts()}
            return facts | {"missing": missing, "stopped": self._why(missing)}
        totals = Totals()

        def counted(traces: Iterable[Trace]) -> Iterator[Trace]:
            for trace in traces:
                totals.trace(trace)
                yield trace

        with closing(Finished(self.file.path)) as finished:
            traces = counted(current_traces(self.problems, self.planner, finished))
            with_endpoint = len(self.recipe.teacher.endpoints) > 1
            write_table(traces, self.folder / "traces.parquet", self.planner.record(0), with_endpoint)
            sums = totals.all()
            stale = finished.lines - sums.finished
        return facts | {
            "tokens": sums.completion_tokens,
            "traces": sums.finished,
            "truncated": sums.outcomes["length"],
            "prompt_too_long": sums.outcomes["prompt_too_long"],
            "stale": stale,
            "generation": self.accounts.facts(totals),
        }

    def _why(self, missing: int) -> str:
        """One sentence: what there is, what is missing, and what helps."""
        asks = self.asks
        count = f"{asks.done} of {asks.wanted} samples are there, {self.made} of them new, and {missing} are missing"
        if asks.drained:
            return f"stopped as asked: {count}; the same command goes on from here"
        if asks.out_of_budget:
            return (
                f"stopped by the budget, for {self.spending.said()}: {count}; raise it and start again, or go on with "
                "`distill filter` and what is there"
            )
        assert asks.failed, f"the teacher left {missing} of {asks.wanted} samples unanswered"
        return (
            f"{asks.failed} of {asks.wanted} samples failed after {self.recipe.teacher.attempts} attempts: most often "
            f"{asks.usual_error!r}; {count}; run again to go on"
        )


def make_trace(flight: Flight, reply: Reply, planner: Planner) -> Trace:
    """The line of a finished sample."""
    reasoning, response = split_reasoning(reply.text)
    trace: Trace = {
        "id": reply.id,
        "problem_id": flight.problem["id"],
        "sample": flight.sample,
        "messages": flight.ask.messages,
        "reasoning": reasoning,
        "response": response,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "reasoning_tokens": reply.reasoning_tokens,
        "answer_tokens": reply.answer_tokens,
        "seconds": round(reply.seconds, 4),
        "cost": reply.cost,
        "attempts": reply.attempts,
        "teacher": planner.teacher_id,
        "sampling": planner.record(flight.ask.seed),
        "text": reply.text,
    }
    if reply.endpoint is not None:
        trace["endpoint"] = reply.endpoint
    return trace


def identify_teacher(teacher: Teacher) -> dict[str, Any]:
    """What the manifest says of the teacher, found without loading it: "id", "model", "kind" and "licence"."""
    if teacher.kind == "endpoint":
        from distill.endpoints import identity
    elif teacher.kind == "vllm":
        from distill.vllm_identity import identity
    else:
        from distill.embedded import identity
    return identity(teacher)


def open_teacher(teacher: Teacher, sampling: Sampling) -> TeacherBackend:
    """The teacher, loaded and ready."""
    if teacher.kind == "endpoint":
        from distill.endpoints import open_endpoints

        return open_endpoints(teacher)
    if teacher.kind == "vllm":
        from distill.vllm_teacher import open_vllm

        return open_vllm(teacher, sampling)
    from distill.embedded import EmbeddedTeacher

    return EmbeddedTeacher(teacher)
