"""Stage 'filter': verdicts, funnel, selection, dataset. Works alone on a run folder's problems and traces.

verdicts.jsonl is a ledger: one line a trace, each filter's verdict with its reason and a key, the hash of
what it rests on (the filter's version and settings, the reference answer). A verdict whose key still holds
is taken from the ledger, so that changing one threshold re-runs one filter, and neither needs the teacher.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from distill.dataset import write_dataset
from distill.errors import UserError
from distill.files import sha256_json, write_json_atomic
from distill.filters import COMPARING, ORDER, filter_module
from distill.jsonl import read_jsonl, write_jsonl_atomic
from distill.problems import read_problems
from distill.progress import Progress
from distill.recipe import Filters, Recipe
from distill.records import FilterVerdict, FunnelRow, LedgerLine, Problem, Trace
from distill.selection import select
from distill.traces import current_traces

if TYPE_CHECKING:
    from pathlib import Path

    from distill.runfolder import RunFolder

_BATCH = 256

Settings = Any  # a section of recipe.Filters, or None for truncation, which has no settings
Judged = dict[str, dict[str, FilterVerdict]]  # trace id -> filter -> verdict


def run(recipe: Recipe, run: "RunFolder") -> dict[str, Any]:
    """Write verdicts.jsonl, funnel.json and dataset/. Raises UserError if there are no traces or none survives.

    The ledger and the funnel are written before that error, so that the reasons can be read.
    """
    problems = {p["id"]: p for p in read_problems(run.path("problems.jsonl"))}
    traces = _traces(recipe, run, problems)
    enabled = enabled_filters(recipe.filters)
    earlier = _read_ledger(run.path("verdicts.jsonl"))
    with run.progress("filter", len(traces) * len(enabled), "verdicts") as progress:
        judged, reused = judge(traces, problems, enabled, earlier, progress)
    ledger = list(_ledger_lines(traces, judged, enabled))
    funnel = count_funnel(traces, judged, list(enabled))
    write_jsonl_atomic(run.path("verdicts.jsonl"), cast(list[dict[str, Any]], ledger))
    write_json_atomic(run.path("funnel.json"), funnel)
    accepted = [trace for trace, line in zip(traces, ledger, strict=True) if line["accepted"]]
    if not accepted:
        raise _nothing_left(run, traces, judged, funnel)
    selected = select(accepted, recipe.selection, recipe.seed)
    facts = write_dataset(run, recipe, selected, problems, funnel)
    verdicts = len(traces) * len(enabled)
    return {"tokens": funnel[0]["tokens_in"], "accepted": len(accepted), "judged": verdicts - reused, **facts}


def enabled_filters(filters: Filters) -> dict[str, Settings]:
    """The filters that the recipe switches on, with their settings, in the order of the funnel."""
    settings = {"truncation": None} | {name: getattr(filters, name) for name in ORDER if name != "truncation"}
    return {name: settings[name] for name in ORDER if name == "truncation" or settings[name] is not None}


def judge(
    traces: Sequence[Trace],
    problems: Mapping[str, Problem],
    enabled: Mapping[str, Settings],
    earlier: Judged,
    progress: Progress,
) -> tuple[Judged, int]:
    """Every filter's verdict on every trace, and how many of them `earlier` supplied."""
    judged: Judged = {trace["id"]: {} for trace in traces}
    reused = 0
    for name, settings in enabled.items():
        # Traces that passed all filters before come first; see filters/duplicates.py.
        ordered = sorted(traces, key=lambda t: not all(v["pass"] for v in judged[t["id"]].values()))
        keys = _keys(name, settings, ordered, problems)
        todo = [t for t in ordered if not _holds(earlier, t["id"], name, keys[t["id"]])]
        if name in COMPARING and todo:
            todo = ordered
        again = {trace["id"] for trace in todo}
        for trace in ordered:
            if trace["id"] not in again:
                judged[trace["id"]][name] = earlier[trace["id"]][name]
        reused += len(traces) - len(todo)
        progress.advance(len(traces) - len(todo))
        check = filter_module(name).check
        step = len(todo) if name in COMPARING else _BATCH
        for start in range(0, len(todo), max(step, 1)):
            batch = todo[start : start + step]
            for trace, verdict in zip(batch, check(batch, problems, settings), strict=True):
                key = keys[trace["id"]]
                judged[trace["id"]][name] = {"pass": verdict.passed, "reason": verdict.reason, "key": key}
            progress.advance(len(batch), filter=name)
    return judged, reused


def _holds(earlier: Judged, trace: str, name: str, key: str) -> bool:
    verdicts = earlier.get(trace)
    return verdicts is not None and name in verdicts and verdicts[name]["key"] == key


def count_funnel(traces: Sequence[Trace], judged: Judged, names: Sequence[str]) -> list[FunnelRow]:
    """Rows and generated tokens before and after each filter; a trace is out if it passed this one and all before."""
    funnel: list[FunnelRow] = []
    left = list(traces)
    for name in names:
        kept = [trace for trace in left if judged[trace["id"]][name]["pass"]]
        funnel.append(
            {"filter": name, "in": len(left), "out": len(kept), "tokens_in": _tokens(left), "tokens_out": _tokens(kept)}
        )
        left = kept
    return funnel


def _tokens(traces: Sequence[Trace]) -> int:
    return sum(trace["reasoning_tokens"] + trace["answer_tokens"] for trace in traces)


def _keys(name: str, settings: Settings, ordered: Sequence[Trace], problems: Mapping[str, Problem]) -> dict[str, str]:
    """By trace id: the hash of all that a verdict rests on besides the trace, whose own id covers its content."""
    base = [name, filter_module(name).VERSION, _plain(settings)]
    if name in COMPARING:
        base.append(sha256_json([trace["id"] for trace in ordered]))
    by_reference: dict[tuple[str, str | None], str] = {}
    keys = {}
    for trace in ordered:
        problem = problems[trace["problem_id"]]
        reference = (problem["kind"], problem["answer"])
        if reference not in by_reference:
            by_reference[reference] = sha256_json([*base, *reference])[:12]
        keys[trace["id"]] = by_reference[reference]
    return keys


def _plain(settings: Settings) -> dict[str, Any] | None:
    return None if settings is None else settings.model_dump(mode="json")


def _ledger_lines(traces: Sequence[Trace], judged: Judged, enabled: Mapping[str, Settings]) -> Iterator[LedgerLine]:
    digest = sha256_json({name: _plain(settings) for name, settings in enabled.items()})[:12]
    for trace in traces:
        verdicts = judged[trace["id"]]
        yield {
            "trace_id": trace["id"],
            "problem_id": trace["problem_id"],
            "sample": trace["sample"],
            "verdicts": verdicts,
            "accepted": all(verdict["pass"] for verdict in verdicts.values()),
            "settings": digest,
        }


def _read_ledger(path: "Path") -> Judged:
    if not path.exists():
        return {}
    return {row["trace_id"]: row["verdicts"] for _, row in read_jsonl(path)}


def _traces(recipe: Recipe, run: "RunFolder", problems: Mapping[str, Problem]) -> list[Trace]:
    """The traces that this recipe asked for, or, where no teacher is on record, all there are."""
    path = run.path("traces", "traces.jsonl")
    teacher = run.manifest.data.get("teacher")
    if teacher is not None:
        traces = current_traces(path, recipe, problems.values(), teacher["id"])
    else:
        traces = [cast(Trace, row) for _, row in read_jsonl(path, torn_ok=True)]
        unknown = next((t for t in traces if t["problem_id"] not in problems), None)
        if unknown is not None:
            raise UserError(
                f"{path}: problem {unknown['problem_id']} of trace {unknown['id']} is not in problems.jsonl"
            )
    if not traces:
        raise UserError(f"{path}: holds no trace of this recipe's problems, teacher and sampling settings")
    return traces


def _nothing_left(run: "RunFolder", traces: Sequence[Trace], judged: Judged, funnel: Sequence[FunnelRow]) -> UserError:
    worst = max(funnel, key=lambda row: row["in"] - row["out"])
    name = worst["filter"]
    reasons = Counter(v[name]["reason"] for v in judged.values() if not v[name]["pass"])
    return UserError(
        f"none of the {len(traces)} traces passed the filters: '{name}' dropped the most, {worst['in'] - worst['out']} "
        f"of {worst['in']} (mostly: {reasons.most_common(1)[0][0]}); all reasons are in {run.path('verdicts.jsonl')}"
    )
