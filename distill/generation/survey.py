"""What is there of what the recipe wants: one walk over problems.jsonl at the start, problem by problem.

It leaves 8 bytes a problem (where its line begins) and 8 of each that still wants a sample.
"""

import hashlib
import math
import os
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, cast

from distill.errors import UserError
from distill.generation.finished import Finished
from distill.generation.lines import parse
from distill.generation.plan import Planner
from distill.generation.verify import Verifier
from distill.records import Problem
from distill.runfolder import Shard

_CHUNK = 1024  # problems
_BLOCK = 1 << 14  # bytes


class ProblemFile:
    """Problems by their place among those of this shard; `offsets` fills while `walk` goes on."""

    def __init__(self, path: Path, shard: Shard | None) -> None:
        self.path, self.shard = path, shard
        self.offsets = array("Q")
        self._block, self._block_begin = b"", 0  # of the file, where __getitem__ last read
        self.repeated: frozenset[int] = (
            frozenset()
        )  # places of lines that repeat an earlier one; walk() leaves them out
        try:
            self._file = open(path, "rb")  # noqa: SIM115 (closed by close())
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None

    def walk(self) -> Iterator[tuple[str, Problem]]:
        """(place for messages, problem) of this shard's, in order. Raises UserError for a line that is no problem."""
        position, self.offsets = 0, array("Q")
        self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            if not line.isspace():
                place = f"{self.path}:{number}"
                problem = cast(Problem, parse(line, place))
                if not (isinstance(problem.get("id"), str) and isinstance(problem.get("problem"), str)):
                    raise UserError(f"{place}: expected the fields 'id' and 'problem' with text in them")
                if self.shard is None or in_shard(problem["id"], self.shard):
                    self.offsets.append(position)
                    if len(self.offsets) - 1 not in self.repeated:
                        yield place, problem
            position += len(line)

    def __getitem__(self, index: int) -> Problem:
        begin = self.offsets[index]
        first = begin - self._block_begin
        end = self._block.find(b"\n", first) if first >= 0 else -1
        if end < 0:  # problems are mostly taken in the file's order, so the next ones are in the block too
            first, end = 0, self._read_block(begin)
        return cast(Problem, parse(self._block[first : end + 1], f"{self.path}, byte {begin}"))

    def _read_block(self, begin: int) -> int:
        """Hold what is in the file from `begin` on, at least a line; returns where that ends."""
        self._block, self._block_begin = b"", begin
        while (end := self._block.find(b"\n")) < 0:
            part = os.pread(self._file.fileno(), _BLOCK, begin + len(self._block))
            if not part:
                return len(self._block)
            self._block += part
        return end

    def __len__(self) -> int:
        return len(self.offsets)

    def close(self) -> None:
        self._file.close()


def in_shard(problem_id: str, shard: Shard) -> bool:
    """By the problem, so that all its samples are made on one machine."""
    which, count = shard
    return int.from_bytes(hashlib.sha256(problem_id.encode("utf-8", "surrogatepass")).digest()[:8]) % count == which - 1


class Standing(NamedTuple):
    """How far a problem is: `wanted` samples so far, of which those at `missing` are not there.

    `right` of them are known to be; those at `ungraded` are there, but nobody has graded them.
    """

    wanted: int
    missing: list[int]
    right: int
    ungraded: list[int]
    ids: list[int]


class Survey(NamedTuple):
    open: "array[int]"  # indices of the problems that want something
    wanted: int  # samples that are wanted so far; adaptive sampling may want more
    done: int  # of these, how many are there
    generated: int  # tokens in them


def survey(problems: ProblemFile, planner: Planner, finished: Finished, verifier: Verifier | None) -> Survey:
    """Walk all problems. Raises UserError for a line that is no problem, or that adaptive sampling cannot grade."""
    import numpy as np

    first, wanted, done = array("Q"), array("L"), array("L")
    generated, undecided = 0, array("Q")
    walk = problems.walk()
    while chunk := list(islice(walk, _CHUNK)):
        ids = [planner.ids(problem, 0, planner.samples if len(finished) else 1) for _, problem in chunk]
        first.extend(own[0] for own in ids)
        places = finished.find(np.array(ids, dtype=np.uint64).ravel()).reshape(len(chunk), -1)
        generated += finished.generated(places[places >= 0])
        for (place, problem), there in zip(chunk, (places >= 0).sum(axis=1).tolist(), strict=True):
            want, have = planner.samples, there
            if verifier is not None:
                verifier.check(problem, place)
                if there:
                    standing = stand(problem, planner, finished, verifier)
                    want, have = standing.wanted, standing.wanted - len(standing.missing)
                    if standing.ungraded and not standing.missing:
                        undecided.append(len(wanted))
            wanted.append(want)
            done.append(have)
    # A problem that stands in the file twice is asked once.
    _, once = np.unique(np.array(first, dtype=np.uint64), return_index=True)
    problems.repeated = frozenset(np.setdiff1d(np.arange(len(first)), once).tolist())
    wanted_P, done_P = np.array(wanted, dtype=np.int64)[once], np.array(done, dtype=np.int64)[once]
    is_open_P = (done_P < wanted_P) | np.isin(once, np.array(undecided, dtype=np.int64))
    still_open = array("Q", np.sort(once[is_open_P]).astype(np.uint64).tobytes())
    return Survey(still_open, int(wanted_P.sum()), int(done_P.sum()), generated)


def stand(problem: Problem, planner: Planner, finished: Finished, verifier: Verifier | None) -> Standing:
    """Go through a problem's waves as they were asked for, as far as what is there decides."""
    adaptive = planner.settings.adaptive
    wanted = planner.samples
    while True:
        ids = planner.ids(problem, 0, wanted)
        there = finished.having(ids)
        missing = [n for n, is_there in enumerate(there) if not is_there]
        if adaptive is None or verifier is None:
            return Standing(wanted, missing, 0, [], ids)
        grades = verifier.known(problem, ids) if any(there) else [None] * len(ids)
        right = sum(bool(grade) for grade, is_there in zip(grades, there, strict=True) if is_there)
        if right >= adaptive.verified:
            return Standing(wanted - len(missing), [], right, [], ids)
        ungraded = [n for n, grade in enumerate(grades) if there[n] and grade is None]
        if missing or ungraded or wanted == planner.most:
            return Standing(wanted, missing, right, ungraded if missing or wanted < planner.most else [], ids)
        wanted += wave(wanted, right, adaptive.verified, planner.most)


def wave(asked: int, right: int, needed: int, most: int) -> int:
    """How many more samples to ask for: as many as the rest should take at the rate seen so far (Laplace's)."""
    rate = (right + 1) / (asked + 2)
    return min(most - asked, math.ceil((needed - right) / rate))
