"""The C step is built where that can be done safely, and done without everywhere else: nothing raises."""

import ctypes
import os
import shutil
import subprocess
import sys

import pytest
import torch

from teacher import load_model
from teacher.engine import Engine
from teacher.native import build
from teacher.requests import Request
from tests.tiny import deepseek_config

needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None or build.sgemm() is None, reason="no C compiler, or a torch whose BLAS cannot be called"
)


@pytest.fixture(autouse=True)
def forget():
    """Libraries are built once a process: here, once a test."""
    build._build.cache_clear()
    yield
    build._build.cache_clear()


def runs_in():
    """What an engine runs in, after having run."""
    torch.manual_seed(0)
    engine = Engine(load_model(deepseek_config()), 257, 1, 16)
    assert len(list(engine.generate([Request("a", [1], max_tokens=3, stop_ids=[])]))) == 1
    return engine.runs_in


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("CC", "no-such-compiler", "no C compiler (no-such-compiler"),
        ("CC", "/bin/false", "/bin/false fails: exit 1"),
        ("CC", "cc 'unbalanced", "No closing quotation"),
        ("DISTILL_NATIVE", "0", "DISTILL_NATIVE is 0"),
    ],
)
def test_without_a_compiler_engines_run_in_torch(monkeypatch, tmp_path, variable, value, reason):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(variable, value)
    assert runs_in() == "torch"
    assert reason in build.obstacle()


@needs_compiler
def test_a_compiler_that_hangs_is_given_up(monkeypatch, tmp_path):
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o700)
    monkeypatch.setenv("CC", str(slow))
    monkeypatch.setattr(build, "_SECONDS", 0.2)
    assert "timed out" in build.obstacle()


@needs_compiler
def test_the_compiler_may_have_options_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "cc -DSOMETHING=1")
    assert runs_in() == "C"


@needs_compiler
def test_the_folder_is_the_users_alone_and_a_second_process_finds_the_library(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.obstacle() is None
    folder = tmp_path / "distill"
    (library,) = folder.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700 and not library.stat().st_mode & 0o022
    build._build.cache_clear()
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: pytest.fail("compiled twice"))
    assert build.obstacle() is None


@needs_compiler
@pytest.mark.parametrize("wrong", ["/proc/x", "others may write", "somebody else's"])
def test_without_a_safe_folder_it_is_built_for_this_process(monkeypatch, tmp_path, wrong):
    base = wrong if wrong.startswith("/") else str(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    if wrong == "others may write":
        (tmp_path / "distill").mkdir()
        (tmp_path / "distill").chmod(0o777)
    elif wrong == "somebody else's":
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert build.cache_folder() is None
    assert build.obstacle() is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@needs_compiler
def test_a_torn_library_is_made_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "distill").mkdir(mode=0o700)
    assert build.obstacle() is None
    (library,) = (tmp_path / "distill").iterdir()
    build._build.cache_clear()
    library.unlink()  # not written over: this process has it loaded
    library.write_bytes(b"torn")
    assert build.obstacle() is None
    assert isinstance(ctypes.CDLL(str(library)), ctypes.CDLL)


@needs_compiler
def test_two_processes_may_build_at_once(tmp_path):
    code = "from teacher.native.build import obstacle; print(obstacle())"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}, stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert [process.communicate()[0].strip() for process in started] == ["None", "None"]
    assert len(list((tmp_path / "distill").iterdir())) == 1
