"""The trace stage on a teacher whose replies a test decides, for the tests of what is asked for."""

import json
import random

from distill import problems, traces
from tests.distill.small_run import FakeTeacher, install, make_recipe, open_run, right_reply

WRONG = "thinking\n</think>\n\n\\boxed{no such thing}"


def rows(folder, name="traces"):
    path = folder / "traces" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else []


def generate(folder, monkeypatch, recipe, reply=None, at_once=1000):
    """The stage; `reply(ask, right)` is given the right reply. Returns (facts, the teacher)."""
    with open_run(folder, recipe) as run:
        if not run.path("problems.jsonl").is_file():
            problems.run(recipe, run)
        right = right_reply(problems.read_problems(run.path("problems.jsonl")))
        said = right if reply is None else lambda ask: reply(ask, right(ask))
        teacher = install(monkeypatch, FakeTeacher(said, at_once=at_once))
        return traces.run(recipe, run), teacher


def samples_of(folder):
    """Problem text -> the samples that were made of it, in the order of the file."""
    made = {}
    for row in rows(folder):
        made.setdefault(row["messages"][0]["content"], []).append(row["sample"])
    return made


def adaptive(samples=2, most=9, verified=1, **sections):
    sampling = {"samples": samples, "adaptive": {"most": most, "verified": verified}}
    return make_recipe(sampling=sampling, **sections)


def luck(ask, chance):
    return random.Random(ask.seed).random() < chance
