"""Stage 'traces': k samples a problem from the teacher, none lost and none made twice.

A trace's id is the hash of everything that determines it (problem, sample index, sampling settings, seed,
teacher), so resuming is a set difference: what the recipe asks for minus what the file holds. An edited
problem, another temperature or another teacher asks for other ids; the old lines stay in traces.jsonl,
for they may have cost GPU time and going back to the old settings finds them again. Every reader passes
them over (`current_traces`), and traces.parquet does not have them.
"""

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from distill.errors import UserError
from distill.files import sha256_json, write_atomic
from distill.jsonl import Appender, read_jsonl
from distill.problems import read_problems
from distill.reasoning import split_reasoning
from distill.recipe import Recipe, Sampling, Teacher
from distill.records import Ask, Message, Problem, Reply, TeacherBackend, Trace

if TYPE_CHECKING:
    from distill.progress import Progress
    from distill.runfolder import RunFolder

_SYNC_SECONDS = 0.2


def run(recipe: Recipe, run: "RunFolder") -> dict[str, Any]:
    """Generate the traces that are missing, then write traces.parquet. Returns the stage's facts.

    A trace is counted only when its line is on the disk. Loads the teacher only if something is missing. Traces that
    the recipe imports were written with their problems.
    """
    if recipe.traces:
        sources = run.manifest.data["imported"]
        return {"tokens": 0, "traces": sum(source["traces"] for source in sources), "made": 0}
    problems = read_problems(run.path("problems.jsonl"))
    facts = identify_teacher(recipe.teacher)
    teacher_id = facts["id"]
    run.manifest.update(teacher=facts)
    path = run.path("traces", "traces.jsonl")
    wanted = {ask.id: (problem, sample, ask) for problem, sample, ask in plan(recipe, problems, teacher_id)}
    with Appender(path) as file:
        stale = 0
        done: set[str] = set()
        for _, row in read_jsonl(path):
            stale += row["id"] not in wanted
            done.add(row["id"])
        missing = [ask for identity, (_, _, ask) in wanted.items() if identity not in done]
        with run.progress("traces", len(wanted), "traces", done=len(wanted) - len(missing)) as progress:
            teacher = open_teacher(recipe.teacher) if missing else None
            replies = teacher.generate(missing) if teacher else iter(())
            done |= _record(replies, wanted, recipe.sampling, teacher_id, file, progress)
        made = len(missing)
        assert done >= wanted.keys(), f"the teacher left {len(wanted.keys() - done)} of {made} samples unanswered"
        torn = file.torn
    counts = _write_parquet(current_traces(path, recipe, problems, teacher_id), run.path("traces", "traces.parquet"))
    runs_in = getattr(teacher, "runs_in", None)  # of our engine: on some machines it is slower, and should say so
    return {
        **counts, "made": made, "resumed": len(wanted) - made, "stale": stale, "torn": torn, "teacher": teacher_id,
        **({"runs_in": runs_in} if runs_in else {}),
    }  # fmt: skip


def _record(
    replies: Iterator[Reply],
    wanted: Mapping[str, tuple[Problem, int, Ask]],
    settings: Sampling,
    teacher_id: str,
    file: Appender,
    progress: "Progress",
) -> set[str]:
    """Append a trace a reply; returns their ids.

    Lines are written one by one, which a kill cannot undo, but brought to the disk and counted together every
    _SYNC_SECONDS: an fsync takes milliseconds, in which a teacher in this process does not go on.
    """
    made: set[str] = set()
    start = synced = time.monotonic()
    waiting = tokens = 0

    def count(now: float) -> None:
        file.sync()
        progress.advance(waiting, **{"tokens/s": tokens / max(now - start, 1e-9)})

    for reply in replies:
        problem, sample, ask = wanted[reply.id]
        assert reply.id not in made, f"the teacher answered {reply.id} twice"
        trace = make_trace(problem, sample, ask, reply, settings, teacher_id)
        file.append(cast(dict[str, Any], trace), sync=False)
        made.add(reply.id)
        waiting += 1
        tokens += reply.reasoning_tokens + reply.answer_tokens
        if (now := time.monotonic()) - synced >= _SYNC_SECONDS:
            count(now)
            synced, waiting = now, 0
    if waiting:
        count(time.monotonic())
    return made


def plan(recipe: Recipe, problems: Iterable[Problem], teacher_id: str) -> Iterator[tuple[Problem, int, Ask]]:
    """Every (problem, sample index, ask) that the recipe wants, in order."""
    settings = recipe.sampling
    for problem in problems:
        for sample in range(settings.samples):
            seed = sample_seed(recipe.seed, problem["id"], sample)
            identity = trace_id(problem, sample, sampling_record(settings, seed), teacher_id)
            yield problem, sample, Ask(
                identity, prompt(problem, settings), settings.temperature, settings.top_p, settings.max_tokens, seed
            )  # fmt: skip


def prompt(problem: Problem, settings: Sampling) -> list[Message]:
    """What the teacher is asked: no system prompt, the instruction on a line of its own (R1's usage notes)."""
    content = f"{problem['problem']}\n{settings.instruction}" if settings.instruction else problem["problem"]
    return [{"role": "user", "content": content}]


def sample_seed(seed: int, problem_id: str, sample: int) -> int:
    """A seed of 63 bits for one sample, independent of which other samples are asked for."""
    return int(hashlib.sha256(f"{seed}/{problem_id}/{sample}".encode()).hexdigest()[:16], 16) >> 1


def sampling_record(settings: Sampling, seed: int) -> dict[str, Any]:
    """The settings that a sample depends on. The number of samples is not one: raising it only adds traces."""
    return {**settings.model_dump(mode="json", exclude={"samples"}), "seed": seed}


def trace_id(problem: Problem, sample: int, sampling: dict[str, Any], teacher_id: str) -> str:
    """First 16 hex of the sha256 of the canonical JSON of all that determines the sample."""
    return sha256_json([problem["id"], problem["problem"], sample, sampling, teacher_id])[:16]


def make_trace(problem: Problem, sample: int, ask: Ask, reply: Reply, settings: Sampling, teacher_id: str) -> Trace:
    reasoning, response = split_reasoning(reply.text)
    return {
        "id": ask.id,
        "problem_id": problem["id"],
        "sample": sample,
        "messages": ask.messages,
        "reasoning": reasoning,
        "response": response,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "reasoning_tokens": reply.reasoning_tokens,
        "answer_tokens": reply.answer_tokens,
        "seconds": round(reply.seconds, 4),
        "cost": reply.cost,
        "teacher": teacher_id,
        "sampling": sampling_record(settings, ask.seed),
        "text": reply.text,
    }


def current_traces(path: Path, recipe: Recipe, problems: Iterable[Problem], teacher_id: str) -> list[Trace]:
    """The traces of `path` that this recipe asks for, in the plan's order; stale ones and a torn tail are left out."""
    order = {ask.id: index for index, (_, _, ask) in enumerate(plan(recipe, problems, teacher_id))}
    found: dict[str, Trace] = {}
    for _, row in read_jsonl(path, torn_ok=True):
        if row["id"] in order:
            found.setdefault(row["id"], cast(Trace, row))
    return sorted(found.values(), key=lambda trace: order[trace["id"]])


def identify_teacher(teacher: Teacher) -> dict[str, Any]:
    """What the manifest says of the teacher, found without loading it: "id", "model", "kind" and "licence"."""
    from distill.embedded import teacher_id, teacher_licence

    return {**teacher.model_dump(include={"model", "kind"}), "id": teacher_id(teacher.model),
            "licence": teacher_licence(teacher.model)}  # fmt: skip


def open_teacher(teacher: Teacher) -> TeacherBackend:
    """The teacher, loaded and ready. Later kinds (endpoint, vllm) are further branches here."""
    if teacher.kind == "embedded":
        from distill.embedded import EmbeddedTeacher

        return EmbeddedTeacher(teacher)
    raise UserError(f"teacher.kind: '{teacher.kind}' is not known")


def _write_parquet(traces: list[Trace], path: Path) -> dict[str, Any]:
    """The finished stage's table, for other tools; returns counts."""
    import io

    import pyarrow
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(cast(list[dict[str, Any]], traces)), buffer, compression="zstd")
    write_atomic(path, buffer.getvalue())
    return {
        "tokens": sum(t["reasoning_tokens"] + t["answer_tokens"] for t in traces),
        "traces": len(traces),
        "truncated": sum(t["finish_reason"] == "length" for t in traces),
        "prompt_too_long": sum(t["finish_reason"] == "prompt_too_long" for t in traces),
    }
