"""The demo's recipe with the shipped models, killed in every stage: slow, so `pytest -m slow` runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.jsonl import read_jsonl
from distill.shipped import configs_folder

STAGES = ("problems", "traces", "filter", "train", "eval", "report")
SMALL = [
    "problems.count=70", "sampling.samples=2", "students.0.epochs=0.5", "students.1.epochs=0.5",
    "students.0.checkpoint_every=2", "students.1.checkpoint_every=2",
    "evals.problems.count=21", "evals.samples=2", "evals.bootstrap=200",
]  # fmt: skip


def _start(runs: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "distill", "run", str(configs_folder() / "quickstart.yaml"), *SMALL]
    return subprocess.Popen(
        [*command, "--runs-dir", str(runs)], start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def _finish(runs: Path) -> str:
    process = _start(runs)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


def _kill_in(stage: str, runs: Path, delay: float) -> None:
    """Start the run and kill it, with all its children, some time after `stage` began."""
    manifest = runs / "quickstart" / "manifest.json"

    def attempts() -> int:
        stages = json.loads(manifest.read_bytes())["stages"] if manifest.exists() else {}
        return stages.get(stage, {}).get("attempts", 0)

    earlier = attempts()  # an earlier kill has left the stage's entry behind
    process = _start(runs)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if attempts() > earlier:
            time.sleep(delay)
            break
        time.sleep(0.02)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _outcome(runs: Path) -> dict[str, object]:
    folder = runs / "quickstart"
    traces = [row for _, row in read_jsonl(folder / "traces" / "traces.jsonl")]
    assert len({row["id"] for row in traces}) == len(traces) == 140
    rows = {}
    for path in sorted((folder / "evals").glob("*.jsonl")):
        answers = [row for _, row in read_jsonl(path)]
        assert len({row["id"] for row in answers}) == len(answers) == 42, path
        rows[path.name] = sorted((row["id"], row["correct"]) for row in answers)
    return {
        "traces": sorted((row["id"], row["text"]) for row in traces),
        "dataset": (folder / "dataset" / "train.jsonl").read_text(),
        "weights": [path.read_bytes() for path in sorted(folder.glob("students/*/model.safetensors"))],
        "evals": rows,
    }


@pytest.mark.slow
def test_a_run_killed_in_every_stage_ends_in_the_same_results(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _finish(whole)
    for stage in STAGES:
        for delay in (0.05, 1.5) if stage in ("traces", "train", "eval") else (0.02,):
            _kill_in(stage, broken, delay)
    _finish(broken)
    expected, found = _outcome(whole), _outcome(broken)
    for name, value in expected.items():
        assert found[name] == value, name
    assert _finish(broken).count("already done, skipped") == len(STAGES)
