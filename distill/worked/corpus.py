"""Training text from worked solutions: whole ones for the teacher's cold start, pieces of them for the student bases.

Everything is a pure function of (seed, index), so that a training run can be resumed, rebuilt and checked, and
nothing is built from a problem that `distill.identity.held_out` reserves for evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from random import Random
from typing import Any

from distill.errors import UserError
from distill.identity import held_out
from distill.procedural import check_families, family_seed
from distill.worked.steps import Worked

SOLVED_FAMILIES = (
    "chain_sum",
    "count_bits",
    "leg_counting",
    "letter_counting",
    "products",
    "simple_equations",
    "spell_backward",
)
KINDS = ("lines", "unfinished", "ending", "small")
# Items of a reasoning-gym dataset are Random(seed + index): a held-out item is replaced by one far outside any run.
_STRIDE = 1_000_000_007


def solve(family: str, problem: str) -> Worked:
    """The worked solution of one problem statement of one of SOLVED_FAMILIES."""
    return import_module(f"distill.worked.{family}").solve(problem)


@dataclass(frozen=True)
class WorkedExample:
    """One problem with its worked solution."""

    family: str
    problem: str
    worked: Worked

    @property
    def response(self) -> str:
        """What the teacher writes after `<think>\\n`: working, end of thinking, boxed answer."""
        working = "\n".join(self.worked.lines)
        return f"{working}\n</think>\n\nThe answer is \\boxed{{{self.worked.answer}}}"


@dataclass(frozen=True)
class WorkedProblems:
    """An endless numbered list of solved training problems, the families taking turns.

    A family named in `turns` has so many turns a round instead of one.
    """

    families: Mapping[str, Mapping[str, Any]]
    seed: int
    turns: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_families(self.families, "families")
        for family in self.families:
            if family not in SOLVED_FAMILIES:
                raise UserError(f"families.{family}: no solver is written for it; known: {', '.join(SOLVED_FAMILIES)}")

        for family in self.turns:
            if family not in self.families:
                raise UserError(f"turns.{family}: no such family here; families: {', '.join(self.families)}")

    @cached_property
    def _round(self) -> list[tuple[str, Any, int, int]]:
        """A round's turns: family, its dataset, which of its turns this is, and how many it has."""
        from reasoning_gym.factory import create_dataset

        turns = []
        for family, settings in self.families.items():
            dataset = create_dataset(family, seed=family_seed(self.seed, family), size=1, **settings)
            count = self.turns.get(family, 1)
            turns += [(family, dataset, turn, count) for turn in range(count)]
        return turns

    def statement(self, index: int) -> tuple[str, str]:
        """Family and problem statement."""
        rounds, place = divmod(index, len(self._round))
        family, dataset, turn, count = self._round[place]
        item = rounds * count + turn
        while held_out(problem := str(dataset[item]["question"]).strip()):
            item += _STRIDE
        return family, problem

    def __getitem__(self, index: int) -> WorkedExample:
        family, problem = self.statement(index)
        return WorkedExample(family, problem, solve(family, problem))


@dataclass(frozen=True)
class BaseCorpus:
    """Plain-text documents that a student base is pretrained on: pieces of working, whole solutions of `small` only.

    `weights` has the kinds' shares; UserError for a kind that is none of these:

    lines       one to `longest_piece` consecutive lines of a full-size working, without its problem and answer
    unfinished  a full-size problem statement and the beginning of its working, always short of the last line
    ending      the last line or two of a full-size working and the answer, without the problem
    small       the whole worked solution of a much smaller problem

    None of it is in the chat form, has `<think>` tags or boxes its answer.
    """

    full: WorkedProblems
    small: WorkedProblems
    weights: Mapping[str, float]
    longest_piece: int = 4

    def __post_init__(self) -> None:
        for kind in self.weights:
            if kind not in KINDS:
                raise UserError(f"mixture.{kind}: no such kind of document; known: {', '.join(KINDS)}")

    def __getitem__(self, index: int) -> str:
        rng = Random(f"{self.full.seed}/{index}")
        kinds: Sequence[str] = sorted(self.weights)
        kind = rng.choices(kinds, [self.weights[kind] for kind in kinds])[0]
        example = self.small[index] if kind == "small" else self.full[index]
        lines, answer = example.worked.lines, f"The answer is {example.worked.answer}"
        if kind == "small":
            piece = [example.problem, *lines, answer]
        elif kind == "unfinished":
            piece = [example.problem, *lines[: rng.randint(0, len(lines) - 1)]]
        elif kind == "ending":
            piece = [*lines[-rng.randint(1, 2) :], answer]
        else:
            length = rng.randint(1, min(self.longest_piece, len(lines)))
            start = rng.randint(0, len(lines) - length)
            piece = lines[start : start + length]
        return "\n".join(piece)
