import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from distill.__main__ import explain, is_disk_full
from distill.errors import UserError

HEAVY = ["torch", "transformers", "datasets", "lm_eval", "reasoning_gym", "math_verify", "numpy", "pydantic", "rich"]
COMMANDS = ["run", "traces", "filter", "train", "eval", "report", "show", "recipe", "doctor", "teacher", "base"]


def distill(*arguments, cwd=None, **env):
    return subprocess.run(
        [sys.executable, "-m", "distill", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **env},
        timeout=120,
    )


def assert_one_line_error(result, code, *parts):
    assert result.returncode == code, result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("distill: "), result.stderr
    for part in parts:
        assert part in result.stderr


def test_help_loads_nothing_heavy():
    # Not a time: `--help` is quick because of what it leaves unimported, and that does not vary with the machine.
    code = f"""
import sys
from distill.__main__ import main
sys.argv = ["distill", "--help"]
try:
    main()
except SystemExit as stop:
    assert stop.code == 0
print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == "[]\n"
    for command in COMMANDS:
        assert f"\n  {command}" in result.stdout


@pytest.mark.parametrize("command", [[c] for c in COMMANDS] + [["teacher", "train"], ["base", "train"]])
def test_each_command_explains_itself(command):
    from typer.testing import CliRunner

    from distill.cli import app

    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_recipe_prints_the_resolved_recipe():
    result = distill("recipe", "quickstart", "students.0.epochs=7")
    assert result.returncode == 0
    assert "weight_decay: 0.1" in result.stdout
    assert "epochs: 7" in result.stdout


def test_unknown_key_is_one_line_and_exit_code_2():
    result = distill("recipe", "quickstart", "sampling.temprature=1")
    assert_one_line_error(result, 2, "sampling.temprature", "did you mean 'temperature'")
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["run", "traces", "filter", "train", "eval", "report", "show", "recipe"])
def test_missing_recipe(command, tmp_path):
    assert_one_line_error(distill(command, "none.yaml", cwd=tmp_path), 2, "none.yaml: no such recipe file")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", ["report", "show"])
def test_missing_run_folder(command, tmp_path):
    assert_one_line_error(distill(command, "quickstart", cwd=tmp_path), 2, "quickstart: no such run folder")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("app", ["teacher", "base"])
def test_missing_training_configuration(app, tmp_path):
    assert_one_line_error(distill(app, "train", "none.yaml", cwd=tmp_path), 2, "none.yaml: no such training config")


@pytest.mark.parametrize(("command", "stage"), [("filter", "traces"), ("train", "filter"), ("eval", "train")])
def test_a_stage_needs_the_one_before(command, stage, tmp_path):
    folder = tmp_path / "runs" / "quickstart"
    folder.mkdir(parents=True)
    assert_one_line_error(distill(command, "quickstart", cwd=tmp_path), 2, "there is nothing to go on from")
    (folder / "problems.jsonl").write_text("")
    result = distill(command, "quickstart", cwd=tmp_path)
    assert result.returncode == 2
    assert f"stage '{stage}' has not been run; run `distill" in result.stderr
    assert "Traceback" not in result.stderr


def test_bad_option_is_a_usage_error():
    result = distill("run", "quickstart", "--no-such-option")
    assert result.returncode == 2
    assert "No such option" in result.stderr and "Traceback" not in result.stderr


def test_debug_keeps_the_traceback():
    result = distill("recipe", "none.yaml", DISTILL_DEBUG="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "UserError" in result.stderr


def test_no_space_left_is_one_line_and_exit_code_1(tmp_path):
    code = """
import errno, sys
import distill.runfolder
def full(path, chunks):
    raise OSError(errno.ENOSPC, "No space left on device", str(path))
distill.runfolder.write_atomic = full
from distill.__main__ import main
sys.argv = ["distill", "run", "quickstart"]
main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1
    assert "distill: no space left on device: runs/quickstart/recipe.yaml" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_interrupt_is_one_line_and_exit_code_130(tmp_path):
    code = """
import os, signal, sys, time
import distill.pipeline
def wait(recipe, folder):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
distill.pipeline.run_all = wait
from distill.__main__ import main
sys.argv = ["distill", "run", "quickstart"]
main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert_one_line_error(result, 130, "interrupted; the same command goes on from here")


def test_bugs_keep_their_traceback(tmp_path):
    code = """
import sys
import distill.pipeline
def broken(recipe, folder):
    raise KeyError("ours")
distill.pipeline.run_all = broken
from distill.__main__ import main
sys.argv = ["distill", "run", "quickstart"]
main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "KeyError: 'ours'" in result.stderr


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/x/y"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "/x/y"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_disk_full_is_known_by_each_name(error):
    assert is_disk_full(error)
    known = explain(error)
    assert known is not None
    code, line = known
    assert code == 1 and line.startswith("no space left on device")


def test_what_is_explained():
    assert explain(UserError("a.yaml: bad\n key")) == (2, "a.yaml: bad key")
    assert explain(PermissionError(errno.EACCES, "Permission denied", "/x")) == (1, "Permission denied: /x")
    assert explain(MemoryError()) == (1, "out of memory (MemoryError); lower the recipe's batch sizes")
    for bug in (KeyError("x"), TypeError("x"), AssertionError("x"), RuntimeError("x")):
        assert explain(bug) is None


def test_a_library_s_value_error_tells_how_to_see_more():
    try:
        json.loads("{")
    except ValueError as error:
        known = explain(error)
    assert known is not None
    assert known[0] == 2 and known[1].endswith("(from decoder.py; DISTILL_DEBUG=1 shows the traceback)")


def test_two_runs_at_once(tmp_path):
    code = """
import sys, time
from distill.recipe_load import load_recipe
from distill.runfolder import RunFolder
with RunFolder.open("runs/quickstart", load_recipe("quickstart")):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=tmp_path)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        result = distill("run", "quickstart", cwd=tmp_path)
        assert_one_line_error(result, 2, f"another process (pid {holder.pid}) is using runs/quickstart")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()


def test_closed_pipe_is_quiet():
    process = subprocess.Popen(
        [sys.executable, "-m", "distill", "recipe", "quickstart"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    time.sleep(0.01)
    assert b"Traceback" not in process.stderr.read()
    process.wait()
