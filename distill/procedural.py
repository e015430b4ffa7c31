"""Problems from reasoning-gym: generated, verifiable, and the same on every machine for the same seed."""

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from distill.errors import UserError
from distill.identity import hash_held_out, problem_hash
from distill.records import Kind, Problem

Split = Literal["train", "heldout"]

# Datasets are made in chunks of this many items, since some families precompute all of theirs.
_CHUNK = 1000
# A family is called exhausted after this many draws in a row brought nothing new, or ten times the
# number of distinct problems seen, if that is more (the rarest of n equally likely problems needs about
# n ln n draws in all).
_PATIENCE = 5000
_NUMBER = re.compile(r"[-+]?(\d[\d,]*(\.\d+)?|\.\d+)(\s*/\s*\d+)?")


def family_seed(seed: int, family: str) -> int:
    """A seed for one family, so that adding or removing a family leaves the others' problems as they are."""
    return int(hashlib.sha256(f"{seed}/{family}".encode()).hexdigest()[:7], 16)


def answer_kind(answer: str) -> Kind:
    """Numbers are compared as numbers, everything else (words, lists, times) as it is written."""
    return "math" if _NUMBER.fullmatch(answer.strip()) else "exact"


def _near(word: str, words: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(words), n=1, cutoff=0.4)
    return f"; did you mean '{match[0]}'?" if match else ""


def check_families(families: Mapping[str, Mapping[str, Any]], field: str = "problems.families") -> None:
    """Raise UserError for an unknown family, an unknown setting or a setting that the family refuses."""
    from reasoning_gym.factory import DATASETS

    if not families:
        raise UserError(f"{field}: the source reasoning-gym needs at least one family, for example chain_sum: {{}}")
    for family, config in families.items():
        if family not in DATASETS:
            raise UserError(f"{field}.{family}: reasoning-gym has no family '{family}'{_near(family, DATASETS)}")
        settings_class = DATASETS[family][1]
        known = {f.name for f in dataclasses.fields(settings_class)} - {"seed", "size"}
        for key in config or {}:
            if key in ("seed", "size"):
                raise UserError(f"{field}.{family}.{key}: set by the recipe's own seed and count; remove it")
            if key not in known:
                raise UserError(f"{field}.{family}.{key}: '{family}' has no setting '{key}'{_near(key, known)}")
        try:
            chosen = settings_class(seed=0, size=1, **(config or {}))
            if hasattr(chosen, "validate"):  # two families' settings have none
                chosen.validate()
        except (AssertionError, ValueError, TypeError) as error:
            settings = json.dumps(dict(config or {}), default=str)
            raise UserError(f"{field}.{family}: '{family}' does not accept the settings {settings}: {error}") from error


def _draws(family: str, config: Mapping[str, Any], seed: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """The family's endless stream of (dataset seed, index, entry), repetitions included."""
    from reasoning_gym.factory import create_dataset

    first = family_seed(seed, family)
    for start in range(first, 2**32 - _CHUNK, _CHUNK):
        dataset = create_dataset(family, seed=start, size=_CHUNK, **config)
        for index in range(_CHUNK):
            yield start, index, dataset[index]


def _family_problems(
    family: str, config: Mapping[str, Any], seed: int, split: Split | None, unique: bool
) -> Iterator[Problem]:
    """One family's problems of one split; raises UserError when there are no more."""
    seen: set[str] = set()
    dry = found = 0
    for dataset_seed, index, entry in _draws(family, config, seed):
        text = str(entry["question"]).strip()
        digest = problem_hash(text)
        wanted = split is None or hash_held_out(digest) == (split == "heldout")
        if wanted and digest not in seen:
            dry, found = 0, found + 1
            answer = str(entry["answer"])
            # reasoning-gym's own scorers need the metadata; through JSON so that it is what a reader gets back.
            metadata = json.loads(json.dumps(entry["metadata"], default=str))
            yield {
                "id": digest[:16],
                "problem": text,
                "answer": answer,
                "kind": answer_kind(answer),
                "source": f"reasoning-gym/{family}",
                "meta": {"family": family, "seed": dataset_seed, "index": index, "metadata": metadata},
            }
        else:
            dry += 1
        if unique:
            seen.add(digest)
        if dry > max(_PATIENCE, 10 * len(seen)):
            kind = {"train": "training ", "heldout": "held-out ", None: ""}[split]
            raise UserError(
                f"reasoning-gym family '{family}' has only {found} distinct {kind}problems with these settings "
                f"({dry} more draws brought none); widen its settings or ask for fewer problems"
            )


def reasoning_gym_problems(
    families: Mapping[str, Mapping[str, Any] | None],
    seed: int,
    split: Split | None,
    *,
    unique: bool = True,
    own_scorers: bool = False,
) -> Iterator[Problem]:
    """An endless stream of problems, the families taking turns.

    The same arguments give the same stream, on any machine. With `split` 'train' no problem is held out
    (distill.identity.held_out), with 'heldout' every one is, with None both kinds appear. `unique` yields
    each problem once and raises UserError when a family has no more; without it problems recur as the
    generator draws them, which is what a training corpus longer than a small family needs. With `own_scorers` all are
    of the kind 'reasoning-gym': its own scorers grade them, which know problems with several right answers.

    Raises UserError, before the first problem, for an unknown family or setting.
    """
    check_families({family: config or {} for family, config in families.items()})
    streams = [_family_problems(family, config or {}, seed, split, unique) for family, config in families.items()]
    return map(_scored, _round_robin(streams)) if own_scorers else _round_robin(streams)


def _scored(problem: Problem) -> Problem:
    answer = None if problem["answer"] == "None" else problem["answer"]  # a few families have none, only a scorer
    entry = {"question": problem["problem"], "answer": answer, "metadata": problem["meta"]["metadata"]}
    return {**problem, "kind": "reasoning-gym", "answer": json.dumps(entry)}


def _round_robin(streams: list[Iterator[Problem]]) -> Iterator[Problem]:
    while True:
        for stream in streams:
            yield next(stream)
