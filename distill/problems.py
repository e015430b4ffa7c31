"""Stage 'problems': what is asked, what may be trained on, and the proof that the two do not overlap.

Evaluation problems are built first and training problems that are among them are dropped, whatever the
sources: the proof rests on the hash of the normalised text, not on the names of splits.
"""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, cast

from distill.errors import UserError
from distill.identity import held_out, problem_hash
from distill.jsonl import read_jsonl, write_jsonl_atomic
from distill.problem_sources import source_problems
from distill.procedural import Split, reasoning_gym_problems
from distill.recipe import ProblemSource, Recipe
from distill.records import Problem

if TYPE_CHECKING:
    from pathlib import Path

    from distill.runfolder import RunFolder

__all__ = ["build_problems", "held_out", "problem_hash", "read_problems", "reasoning_gym_problems", "run"]

Counts = dict[str, int]


def run(recipe: Recipe, run: "RunFolder") -> dict[str, Any]:
    """Write problems.jsonl and, if the recipe evaluates on its own problems, eval_problems.jsonl.

    The manifest gets, under 'problems', the counts and set hashes that prove the separation. Where the recipe names
    traces, the problems are theirs, and both are imported.
    """
    if recipe.traces:
        from distill.foreign.importing import run as run_import

        return run_import(recipe, run)
    evaluation: list[Problem] = []
    if recipe.evals.problems is not None:
        evaluation, _ = build_problems(recipe.evals.problems, "evals.problems", "heldout")
    train, dropped = build_problems(recipe.problems, "problems", "train", exclude=evaluation)
    both = {problem_hash(p["problem"]) for p in train} & {problem_hash(p["problem"]) for p in evaluation}
    assert not both, "training problems among the evaluation problems"
    proof = {
        "train": {"count": len(train), "sha256": set_hash(train), "without_answer": _unanswered(train)},
        "eval": {"count": len(evaluation), "sha256": set_hash(evaluation), "without_answer": _unanswered(evaluation)},
        "overlap": len(both),
        "dropped": dropped,
    }
    write_jsonl_atomic(run.path("eval_problems.jsonl"), cast(list[dict[str, Any]], evaluation))
    write_jsonl_atomic(run.path("problems.jsonl"), cast(list[dict[str, Any]], train))
    run.manifest.update(problems=proof)
    return {"tokens": 0, "train": len(train), "eval": len(evaluation)}


def build_problems(
    source: ProblemSource, field: str, default_split: Split, exclude: Iterable[Problem] = ()
) -> tuple[list[Problem], Counts]:
    """The source's distinct problems but for `exclude`, and how many were dropped ("overlap", "repeats").

    `field` names the source in messages; `default_split` is the reasoning-gym split where the recipe names
    none. With `count`, a generated source gives its first `count`; a larger file gives those with the
    smallest hash of (seed, problem), so that editing one row of a file changes one problem of the choice.
    Raises UserError if nothing is left, or less than `count`.
    """
    dropped: Counts = {"overlap": 0, "repeats": 0}
    if source.source == "reasoning-gym":
        split = cast(Literal["train", "heldout"], source.split or default_split)
        own = source.kind == "reasoning-gym"
        stream = reasoning_gym_problems(source.families, source.seed, split, own_scorers=own)
        return list(islice(_distinct(stream, exclude, dropped), source.count)), dropped
    problems = list(_distinct(source_problems(source, field), exclude, dropped))
    if not problems:
        reason = f"all {dropped['overlap']} are evaluation problems" if dropped["overlap"] else "the source is empty"
        raise UserError(f"{source.source}: no problems for '{field}': {reason}")
    if source.count is not None:
        if source.count > len(problems):
            raise UserError(
                f"{field}.count: {source.count} problems asked of {source.source}, which has {len(problems)} "
                f"({dropped['repeats']} repeats and {dropped['overlap']} evaluation problems left out)"
            )
        problems = sorted(problems, key=lambda p: _rank(source.seed, p))[: source.count]
    return problems, dropped


def read_problems(path: "Path") -> list[Problem]:
    """The problems of a run folder's problems.jsonl or eval_problems.jsonl."""
    return [cast(Problem, row) for _, row in read_jsonl(path)]


def set_hash(problems: Iterable[Problem]) -> str:
    """Hex sha256 of the sorted problem hashes, one a line: equal for equal sets, in whatever order."""
    return hashlib.sha256("\n".join(sorted(problem_hash(p["problem"]) for p in problems)).encode()).hexdigest()


def _unanswered(problems: list[Problem]) -> int:
    return sum(p["answer"] is None for p in problems)


def _distinct(problems: Iterable[Problem], exclude: Iterable[Problem], dropped: Counts) -> Iterator[Problem]:
    excluded = {problem_hash(p["problem"]) for p in exclude}
    seen: set[str] = set()
    for problem in problems:
        digest = problem_hash(problem["problem"])
        if digest in excluded:
            dropped["overlap"] += 1
        elif digest in seen:
            dropped["repeats"] += 1
        else:
            seen.add(digest)
            yield problem


def _rank(seed: int, problem: Problem) -> str:
    return hashlib.sha256(f"{seed}/{problem_hash(problem['problem'])}".encode()).hexdigest()
