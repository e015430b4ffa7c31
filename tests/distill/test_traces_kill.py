"""kill -9 in the middle of the trace stage, again and again: the same set of traces in the end, none twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from distill import problems
from distill.traces import plan
from tests.distill.small_run import make_recipe, open_run

# The child makes its traces with pauses, so that a kill at any moment meets it at work.
CHILD = """
import sys, time
from pathlib import Path
from distill import traces
from tests.distill.small_run import FakeTeacher, make_recipe, open_run

def reply(ask):
    time.sleep(0.004)
    return f"{ask.seed} " + "word " * 400 + "\\n</think>\\n\\n\\\\boxed{1}", "stop"

teacher = FakeTeacher(reply)
traces.identify_teacher = lambda settings: {"id": teacher.id}
traces.open_teacher = lambda *_: teacher
recipe = make_recipe(problems={"count": 40}, sampling={"samples": 3})
with open_run(Path(sys.argv[1]), recipe) as run:
    traces.run(recipe, run)
    print("made", len(teacher.asked), flush=True)
"""


def start(folder):
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
    )  # fmt: skip


def whole_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_runs_end_in_the_same_set_of_traces(tmp_path):
    recipe = make_recipe(problems={"count": 40}, sampling={"samples": 3})
    with open_run(tmp_path, recipe) as run:
        problems.run(recipe, run)
        wanted = {
            ask.id
            for _, _, ask in plan(recipe, problems.read_problems(run.path("problems.jsonl")), "fake@000000000000")
        }
    path = tmp_path / "traces" / "traces.jsonl"
    pause = random.Random(0)
    survived = []
    for _ in range(3):
        before = whole_lines(path)
        child = start(tmp_path)
        while whole_lines(path) <= before + 5 and child.poll() is None:
            time.sleep(0.002)
        time.sleep(pause.uniform(0, 0.05))
        child.send_signal(signal.SIGKILL)
        child.wait()
        survived.append(path.read_bytes().rpartition(b"\n")[0].split(b"\n"))
    assert 0 < len(survived[0]) < len(survived[1]) < len(survived[2]) < len(wanted), "the kills came too late"
    # As a power cut leaves it, which a kill of the process alone does only by chance.
    with open(path, "ab") as file:
        file.write(b'{"id": "torn')
    child = start(tmp_path)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    found = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    assert sorted(row["id"] for row in found) == sorted(wanted)
    assert output.split() == ["made", str(len(wanted) - len(survived[-1]))]
    final = path.read_bytes().split(b"\n")
    for kept in survived:
        assert final[: len(kept)] == kept
