import os
import signal
import subprocess
import sys
import time

import pytest

from distill.errors import UserError
from distill.manifest import Manifest
from distill.recipe_load import load_recipe
from distill.runfolder import RunFolder

RECIPE = load_recipe("quickstart")

HOLDER = """
import sys, time
from distill.recipe_load import load_recipe
from distill.runfolder import RunFolder
run = RunFolder.open(sys.argv[1], load_recipe("quickstart"))
run.begin("traces", "hash")
with run.progress("traces", 1000, "samples") as bar:
    bar._last_beat -= 10
    time.sleep(0.3)
    bar.advance()
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_second_process_is_refused_with_the_pid_of_the_first(tmp_path, holder):
    with pytest.raises(UserError, match=rf"another process \(pid {holder.pid}\) is using .*run"):
        RunFolder.open(tmp_path / "run", RECIPE)


def test_a_killed_process_leaves_no_lock_and_its_seconds_count(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunFolder.open(tmp_path / "run", RECIPE) as run:
        assert run.manifest.stage("traces")["status"] == "running"
        assert not run.stage_done("traces", "hash")
        before = run.manifest.stage("traces")["seconds"]
        assert before >= 0.3
        run.begin("traces", "hash")
        time.sleep(0.05)
        run.finish("traces", tokens=7, samples=3)
        entry = run.manifest.stage("traces")
        assert before + 0.05 <= entry["seconds"] < before + 30
        assert (entry["tokens"], entry["samples"], entry["attempts"]) == (7, 3, 2)
        assert entry["peak_rss_bytes"] > 1_000_000
        assert run.stage_done("traces", "hash")


def test_the_lock_goes_with_the_folder_object(tmp_path):
    with RunFolder.open(tmp_path / "run", RECIPE), pytest.raises(UserError, match=f"pid {os.getpid()}"):
        RunFolder.open(tmp_path / "run", RECIPE)
    RunFolder.open(tmp_path / "run", RECIPE).close()


def test_other_inputs_start_the_stage_afresh(tmp_path):
    with RunFolder.open(tmp_path / "run", RECIPE) as run:
        run.begin("filter", "one")
        time.sleep(0.05)
        run.finish("filter", tokens=5, rows=9)
        assert run.stage_done("filter", "one")
        assert not run.stage_done("filter", "two")
        run.begin("filter", "two")
        assert not run.stage_done("filter", "one")
        entry = run.manifest.stage("filter")
        assert entry["seconds"] == 0 and "rows" not in entry


def test_resolved_recipe_and_identity_are_written(tmp_path):
    with RunFolder.open(tmp_path / "run", RECIPE) as run:
        run.begin("problems", "one")
        assert load_recipe(run.folder) == RECIPE
        assert run.path("a", "b") == tmp_path / "run" / "a" / "b"
        assert not run.path("a").exists()
    data = Manifest(tmp_path / "run" / "manifest.json").data
    assert data["name"] == "quickstart" and len(data["recipe"]) == 64


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file, expected a run folder"):
        RunFolder.open(tmp_path / "run", RECIPE)
    with pytest.raises(UserError, match="is a file, expected a run folder"):
        RunFolder.open(tmp_path / "run" / "deeper", RECIPE)


def test_a_spoilt_manifest_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: not valid JSON"):
        RunFolder.open(tmp_path / "run", RECIPE)
    (tmp_path / "run" / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match=r"manifest\.json: expected an object"):
        RunFolder.open(tmp_path / "run", RECIPE)
    (tmp_path / "run" / "manifest.json").unlink()
    RunFolder.open(tmp_path / "run", RECIPE).close()  # the refusals above gave the lock back
