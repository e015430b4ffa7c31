"""Compiling a .cu file of this folder for Hopper (sm_90a), once a machine.

A source is plain CUDA with `extern "C"` functions that take pointers, sizes and a stream and return a cudaError_t, so
that neither torch's headers nor its ABI are needed: nvcc takes seconds, and the same library serves any torch. The
result lies in the user's cache folder under a name that says all that went into it. Where there is no nvcc there is no
library and `library` says why; the caller then takes Triton's kernel. `DISTILL_CUDA=0` asks for that.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from teacher.native.build import cache_folder

_FLAGS = (
    "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr", "-shared",
    "-Xcompiler", "-fPIC",
)  # fmt: skip
_SECONDS = 600  # a compiler that takes longer hangs


@functools.cache
def library(name: str) -> ctypes.CDLL | str:
    """The library of `name`.cu, or in a sentence why there is none."""
    missing = obstacle()
    if missing is not None:
        return missing
    compiler = nvcc()
    assert compiler is not None
    try:
        return _load_or_make(compiler, name, cache_folder())
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def obstacle() -> str | None:
    """Why nothing can be compiled here, or None; compiles nothing."""
    if os.environ.get("DISTILL_CUDA") == "0":
        return "DISTILL_CUDA is 0"
    return "no nvcc (CUDA's compiler) on the PATH or in CUDA_HOME" if nvcc() is None else None


def nvcc() -> str | None:
    """CUDA's compiler: on the PATH, in CUDA_HOME, or where CUDA installs itself."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    return shutil.which("nvcc") or next(
        (found for home in homes if home and (found := shutil.which("nvcc", path=str(Path(home, "bin"))))), None
    )


def _load_or_make(compiler: str, name: str, cache: Path | None) -> ctypes.CDLL | str:
    here = Path(__file__).parent
    digest = hashlib.sha256(repr((compiler, _FLAGS, os.stat(compiler).st_mtime_ns)).encode())
    for source in (here / f"{name}.cu", *sorted(here.glob("*.cuh"))):
        digest.update(source.read_bytes())
    made_before = None if cache is None else cache / f"{name}-{digest.hexdigest()[:32]}.so"
    if made_before is not None and made_before.is_file():
        try:
            return ctypes.CDLL(str(made_before))
        except OSError:  # torn by a crash, or of another C library: made anew
            pass
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder, "library.so")
        done = subprocess.run(
            [compiler, *_FLAGS, "-o", made, here / f"{name}.cu"],
            capture_output=True, text=True, errors="replace", timeout=_SECONDS, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode != 0:
            said = (done.stderr + done.stdout).strip().partition("\n")[0]
            return f"{compiler} fails on {name}.cu: {said or f'exit {done.returncode}'}"
        loaded = ctypes.CDLL(str(made))  # stays loaded when the file has gone
        if made_before is not None:
            os.replace(made, made_before)
    return loaded


def call(function: ctypes._CFuncPtr, *arguments: object) -> None:  # type: ignore[name-defined]
    """Launch. RuntimeError with CUDA's number if it refuses: the caller has checked shapes, so this is a bug or a
    device that failed before."""
    status = function(*arguments)
    if status != 0:
        raise RuntimeError(f"{function.__name__} failed with CUDA error {status}")
