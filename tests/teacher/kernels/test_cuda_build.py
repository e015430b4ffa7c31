"""Compiling a kernel's CUDA once a machine; the compiler here is a stand-in that compiles C, or does not."""

import ctypes
import os
import shutil
from pathlib import Path

import pytest

from teacher.kernels.cuda import build

library = build.library.__wrapped__  # without the memory of this process


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Writes a stand-in for nvcc, whose script gets the library's path as $OUT, and puts it first on the PATH."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def write(script: str) -> None:
        nvcc = tmp_path / "nvcc"
        nvcc.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nOUT=$2\n{script}\n')
        nvcc.chmod(0o755)

    return write


def test_a_library_is_made_once(compiler, tmp_path, monkeypatch):
    compiler(f"echo run >>{tmp_path}/runs; echo 'int answer(void) {{ return 42; }}' | cc -shared -fPIC -x c - -o $OUT")
    for _ in range(2):
        made = library("casts")
        assert isinstance(made, ctypes.CDLL) and made.answer() == 42
    assert Path(tmp_path, "runs").read_text() == "run\n"
    real = ctypes.CDLL

    def torn(path: str) -> ctypes.CDLL:
        if Path(path).name.startswith("casts-"):
            raise OSError("file too short")
        return real(path)

    monkeypatch.setattr(build.ctypes, "CDLL", torn)
    assert library("casts").answer() == 42 and Path(tmp_path, "runs").read_text() == "run\nrun\n"


def test_what_keeps_it_from_being_made_is_said(compiler, monkeypatch):
    compiler("echo 'casts.cu(7): error: no such thing' >&2; exit 2")
    assert library("casts") == f"{build.nvcc()} fails on casts.cu: casts.cu(7): error: no such thing"
    monkeypatch.setattr(build, "nvcc", lambda: None)
    assert library("casts") == "no nvcc (CUDA's compiler) on the PATH or in CUDA_HOME"
    monkeypatch.setenv("DISTILL_CUDA", "0")
    assert library("casts") == "DISTILL_CUDA is 0"


def test_a_launch_that_is_refused_is_an_error():
    def refused(*arguments: object) -> int:
        return 9

    with pytest.raises(RuntimeError, match="refused failed with CUDA error 9"):
        build.call(refused, 1, 2)
