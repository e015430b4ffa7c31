"""Every sample that a recipe wants, each with an id that is the hash of all that determines it.

A plan of a million samples is walked at each start, so an id takes a few microseconds: the canonical JSON is put
together from pieces that were encoded once, and hashed from a state in which the problem is in already. `trace_id` is
the plain definition, which the tests hold the fast one to.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from json.encoder import encode_basestring
from typing import Any

from distill.files import sha256_json
from distill.recipe import Recipe, Sampling
from distill.records import Ask, Message, Problem

# Of the settings, what decides which samples there are, not what one of them is.
_UNDECISIVE = {"samples", "adaptive"}


class Planner:
    """Ids, seeds and asks of one recipe and teacher. `most` is how many samples a problem may get."""

    def __init__(self, recipe: Recipe, teacher_id: str) -> None:
        settings = recipe.sampling
        self.settings, self.teacher_id, self._seed = settings, teacher_id, recipe.seed
        self.samples = settings.samples
        self.most = settings.adaptive.most if settings.adaptive else settings.samples
        self._record = sampling_record(settings, 0)
        # The seed is the one part of the settings that differs from sample to sample.
        before = {name: value for name, value in self._record.items() if name < "seed"}
        after = {name: value for name, value in self._record.items() if name > "seed"}
        self._before_seed = f',{canonical(before)[:-1]},"seed":'.encode()
        self._after_seed = f",{canonical(after)[1:]},{canonical(teacher_id)}]".encode()

    def ids(self, problem: Problem, first: int, last: int) -> list[int]:
        """Ids of samples first to last - 1, as the 64-bit numbers that their 16 hex digits are."""
        start = self._start(problem)
        before, after, seeds = self._before_seed, self._after_seed, self._seeds(problem["id"])
        found = []
        for sample in range(first, last):
            state = start.copy()
            state.update(b"%d%b%d%b" % (sample, before, _seed(seeds, sample), after))
            found.append(int.from_bytes(state.digest()[:8]))
        return found

    def ask(self, problem: Problem, sample: int, identity: int) -> Ask:
        settings = self.settings
        seed = _seed(self._seeds(problem["id"]), sample)
        messages = prompt(problem, settings)
        name = f"{identity:016x}"
        return Ask(name, messages, settings.temperature, settings.top_p, settings.max_tokens, seed, settings.logprobs)

    def record(self, seed: int) -> dict[str, Any]:
        """What a trace's line says of the settings."""
        return {**self._record, "seed": seed}

    def _start(self, problem: Problem) -> "hashlib._Hash":
        return hashlib.sha256(f"[{canonical(problem['id'])},{canonical(problem['problem'])},".encode())

    def _seeds(self, problem_id: str) -> "hashlib._Hash":
        return hashlib.sha256(f"{self._seed}/{problem_id}/".encode())


def plan(recipe: Recipe, problems: Iterable[Problem], teacher_id: str) -> Iterator[tuple[Problem, int, Ask]]:
    """Every (problem, sample index, ask) that the recipe may want, in order."""
    planner = Planner(recipe, teacher_id)
    for problem in problems:
        for sample, identity in enumerate(planner.ids(problem, 0, planner.most)):
            yield problem, sample, planner.ask(problem, sample, identity)


def prompt(problem: Problem, settings: Sampling) -> list[Message]:
    """What the teacher is asked: no system prompt, the instruction on a line of its own (R1's usage notes)."""
    content = f"{problem['problem']}\n{settings.instruction}" if settings.instruction else problem["problem"]
    return [{"role": "user", "content": content}]


def sample_seed(seed: int, problem_id: str, sample: int) -> int:
    """A seed of 63 bits for one sample, independent of which other samples are asked for."""
    return _seed(hashlib.sha256(f"{seed}/{problem_id}/".encode()), sample)


def _seed(state: "hashlib._Hash", sample: int) -> int:
    state = state.copy()
    state.update(b"%d" % sample)
    return int.from_bytes(state.digest()[:8]) >> 1


def sampling_record(settings: Sampling, seed: int) -> dict[str, Any]:
    """The settings that a sample depends on. How many are wanted is none: raising it only adds traces.

    Log-probabilities are named only where they are kept: a trace without them cannot stand for one with them, but
    those made before the setting existed stay what they are.
    """
    left_out = _UNDECISIVE if settings.logprobs else {*_UNDECISIVE, "logprobs"}
    return {**settings.model_dump(mode="json", exclude=left_out), "seed": seed}


def trace_id(problem: Problem, sample: int, sampling: dict[str, Any], teacher_id: str) -> str:
    """First 16 hex of the sha256 of the canonical JSON of all that determines the sample."""
    return sha256_json([problem["id"], problem["problem"], sample, sampling, teacher_id])[:16]


def canonical(value: Any) -> str:
    """As sha256_json reads a value."""
    if isinstance(value, str):  # nearly always, and dumps makes an encoder for each call
        return encode_basestring(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
