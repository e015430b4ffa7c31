"""vLLM's CPU build for real, on tiny-r1 in float32: `pytest -m vllm` (three minutes; DISTILL_VLLM_PYTHON names it)."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from distill.embedded import EmbeddedTeacher
from distill.recipe import Sampling, Teacher
from distill.records import Ask
from distill.shipped import resolve_model
from distill.vllm_teacher import open_vllm
from tests.distill.serving.test_vllm_teacher import Listed

pytestmark = pytest.mark.vllm

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ARGS = {"enforce_eager": True, "kv_cache_memory_bytes": 2**28}
COUNT = 400
DISTILL = [sys.executable, "-m", "distill"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """quickstart's problems asked greedily, so that replies can be compared."""
    tree = yaml.safe_load((Path(__file__).parents[3] / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    tree["problems"]["count"] = COUNT
    tree["sampling"] |= {"samples": 1, "temperature": 0}
    tree["teacher"] = {"model": "tiny-r1", "dtype": "float32", "batch_size": 32}
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


class Run:
    """`distill traces` as a process."""

    def __init__(self, folder, recipe, *teacher):
        self.file = folder / "run" / "traces" / "traces.jsonl"
        command = [*DISTILL, "traces", str(recipe), "name=run", "--runs-dir", str(folder), *teacher]
        self.process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)

    def lines(self):
        return self.file.read_bytes().count(b"\n") if self.file.exists() else 0

    def until(self, lines):
        end = time.monotonic() + 150
        while self.lines() < lines:
            assert self.process.poll() is None and time.monotonic() < end, self.lines()
            time.sleep(0.02)

    def finish(self):
        said = self.process.communicate(timeout=200)[1]
        assert self.process.returncode == 0, said
        rows = [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]
        # Nothing lost, nothing repeated.
        assert len({row["id"] for row in rows}) == len(rows) == COUNT
        return rows


@pytest.fixture(scope="module")
def ours(recipe, tmp_path_factory):
    """What our engine replies."""
    return texts(Run(tmp_path_factory.mktemp("ours"), recipe, "teacher.kind=embedded").finish())


def texts(rows):
    return {row["problem_id"]: (row["reasoning"], row["response"], row["finish_reason"]) for row in rows}


def processes_of(parent):
    """(pid, command line) of every descendant."""
    found = []
    for child in subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True).stdout.split():
        line = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        found += [(int(child), line), *processes_of(child)]
    return found


def test_traces_through_the_engine_whose_core_is_killed_equal_ours(vllm_python, recipe, ours, tmp_path):
    run = Run(tmp_path, recipe, "teacher.kind=vllm", f"teacher.vllm.python={vllm_python}",
              f"teacher.vllm.args={json.dumps(ARGS)}")  # fmt: skip
    run.until(40)
    [core] = [pid for pid, line in processes_of(run.process.pid) if "EngineCore" in line]
    os.kill(core, signal.SIGKILL)
    before = run.lines()
    rows = run.finish()
    assert before < COUNT and max(row.get("attempts", 1) for row in rows) == 2
    assert texts(rows) == ours
    assert processes_of(os.getpid()) == []


def test_traces_through_a_server_that_is_killed_and_comes_again(vllm_python, recipe, ours, tmp_path):
    serve = [*DISTILL, "teacher", "serve", str(recipe), "--engine", "vllm", "--vllm-python", vllm_python, "--port", "0",
             f"teacher.vllm.args={json.dumps(ARGS)}"]  # fmt: skip
    environment = ENVIRONMENT | {"DISTILL_API_KEY": "open sesame"}
    server = subprocess.Popen(serve, env=environment, stderr=subprocess.PIPE, text=True)
    said = []
    try:
        for line in server.stderr:
            said.append(line)
            if found := re.search(r"ready after .*: (http\S+)", line):
                break
        assert found, said
        threading.Thread(target=said.extend, args=(server.stderr,), daemon=True).start()
        endpoint = f"teacher.endpoints=[{{url: '{found[1]}', key: TEACHER_KEY}}]"
        os.environ["TEACHER_KEY"] = ENVIRONMENT["TEACHER_KEY"] = "open sesame"
        run = Run(tmp_path, recipe, "teacher.kind=endpoint", endpoint, "teacher.attempts=100")
        run.until(40)
        [(api, _)] = [child for child in processes_of(server.pid) if "vllm.entrypoints" in child[1]][:1]
        os.kill(api, signal.SIGKILL)
        before = run.lines()
        rows = run.finish()
        assert before < COUNT and texts(rows) == ours
        assert sum("restart 1 in" in line for line in said) == 1
        assert "open sesame" not in "".join(said)
        server.terminate()
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
    assert processes_of(os.getpid()) == []


@pytest.mark.parametrize("speculate", [0, 1])
def test_rope_that_is_not_scaled_is_right_on_a_cpu(speculate, vllm_python, tmp_path, monkeypatch):
    """vLLM's trap: eager DeepSeek with plain RoPE is silently wrong there, unless told otherwise. With the model's own
    MTP layer drafting it is the same text, as greedy speculation must be."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    folder = Path(shutil.copytree(resolve_model("tiny-r1"), tmp_path / "plain"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": None}))
    asks = [
        Ask(str(n), [{"role": "user", "content": f"Calculate {n + 10} + {3 * n}."}], 0, 1, 48, 0) for n in range(16)
    ]
    settings = {"model": str(folder), "dtype": "float32", "batch_size": 16}
    theirs = open_vllm(
        Teacher(kind="vllm", vllm={"python": vllm_python, "args": ARGS, "speculate": speculate}, **settings),
        Sampling(samples=1, max_tokens=48),
    )
    got, want = (
        {reply.id: reply for batch in teacher.generate(Listed(asks)) for reply in batch}
        for teacher in (theirs, EmbeddedTeacher(Teacher(**settings)))
    )
    for ask in asks:
        one, other = got[ask.id], want[ask.id]
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
        assert (one.prompt_tokens, one.reasoning_tokens, one.answer_tokens) == (
            other.prompt_tokens, other.reasoning_tokens, other.answer_tokens
        )  # fmt: skip
