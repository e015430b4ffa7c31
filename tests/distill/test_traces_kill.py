"""kill -9 and Ctrl-C in the middle of the trace stage, again and again: the same traces in the end, none twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill import problems
from distill.errors import UserError
from distill.generation.past import generation
from distill.traces import plan
from tests.distill.small_run import make_recipe, open_run

ADAPTIVE = {"samples": 2, "adaptive": {"most": 4}}
# The child makes its traces with pauses, so that a kill at any moment meets it at work.
CHILD = """
import json, sys, time
from pathlib import Path
from distill import traces
from tests.distill.small_run import FakeTeacher, make_recipe, open_run

def reply(ask):
    time.sleep(0.004)
    return f"{ask.seed} " + "word " * 400 + "\\n</think>\\n\\n\\\\boxed{no}", "stop"

teacher = FakeTeacher(reply, at_once=8)
traces.identify_teacher = lambda settings: {"id": teacher.id}
traces.open_teacher = lambda *_: teacher
recipe = make_recipe(problems={"count": 40}, sampling=eval(sys.argv[2]))
with open_run(Path(sys.argv[1]), recipe) as run:
    facts = traces.run(recipe, run)
    print(json.dumps([facts["made"], facts["generation"]]), flush=True)
"""


def start(folder, sampling):
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), repr(sampling)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def whole_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def begin(folder, sampling):
    """Problems, and the ids of all samples that are wanted of them."""
    recipe = make_recipe(problems={"count": 40}, sampling=sampling)
    with open_run(folder, recipe) as run:
        problems.run(recipe, run)
        asked = problems.read_problems(run.path("problems.jsonl"))
    return {ask.id for _, _, ask in plan(recipe, asked, "fake@000000000000")}


def at_work(folder, sampling, more=5):
    """A child that has added a few lines."""
    path = folder / "traces" / "traces.jsonl"
    before = whole_lines(path)
    child = start(folder, sampling)
    while whole_lines(path) <= before + more:
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.002)
    return child


def check_totals(facts, lines):
    """The accounts say exactly what the lines do."""
    rows = [json.loads(line) for line in lines]
    assert facts["finished"] == sum(facts["outcomes"].values()) == len(rows)
    assert facts["attempts"] == len(rows)
    assert facts["prompt_tokens"] == sum(row["prompt_tokens"] for row in rows)
    assert facts["completion_tokens"] == sum(row["reasoning_tokens"] + row["answer_tokens"] for row in rows)


@pytest.mark.parametrize("sampling", [{"samples": 3}, ADAPTIVE])
def test_killed_runs_end_in_the_same_set_of_traces(tmp_path, sampling):
    wanted = begin(tmp_path, sampling)
    path = tmp_path / "traces" / "traces.jsonl"
    pause = random.Random(0)
    survived = []
    for _ in range(3):
        child = at_work(tmp_path, sampling)
        time.sleep(pause.uniform(0, 0.05))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        survived.append(path.read_bytes().rpartition(b"\n")[0].split(b"\n"))
        check_totals(generation(tmp_path, {}, None), survived[-1])  # what the report says of a run that was killed
    assert 0 < len(survived[0]) < len(survived[1]) < len(survived[2]) < len(wanted), "the kills came too late"
    # As a power cut leaves it, which a kill of the process alone does only by chance.
    with open(path, "ab") as file:
        file.write(b'{"id": "torn')
    child = start(tmp_path, sampling)
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors
    found = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    assert sorted(row["id"] for row in found) == sorted(wanted)
    made, told = json.loads(output)
    assert made == len(wanted) - len(survived[-1])
    check_totals(told, path.read_bytes().splitlines())
    assert told["starts"] == 4 and told["wall_seconds"] > 0
    final = path.read_bytes().split(b"\n")
    for kept in survived:
        assert final[: len(kept)] == kept


def test_a_second_process_is_refused_and_ctrl_c_finishes_what_is_in_flight(tmp_path):
    wanted = begin(tmp_path, {"samples": 3})
    child = at_work(tmp_path, {"samples": 3})
    with pytest.raises(UserError, match=rf"another process \(pid {child.pid}\) is using"):
        open_run(tmp_path, make_recipe())
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors
    made = whole_lines(tmp_path / "traces" / "traces.jsonl")
    assert json.loads(output)[0] == made and made % 8 == 0 and 0 < made < len(wanted)
    assert "samples in flight are finished and kept; Ctrl-C again stops at once" in errors
