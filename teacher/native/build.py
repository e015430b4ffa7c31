"""Compiling the C of this folder for one model's sizes, once a machine.

The result lies in the user's cache folder under a name that says all that went into it. Without a C compiler, or
without torch's BLAS to call, there is none, and the engine runs in torch alone.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

_SOURCES = ("step.c", "sample.c", "round.c")
# Sums may be taken in any order (they must be, to be vectorised); infinities keep their meaning.
_FLAGS = (
    "-std=gnu11 -O3 -march=native -fopenmp-simd -fno-math-errno -fno-trapping-math -fno-signed-zeros "
    "-fassociative-math -shared -fPIC"
)


def build(sizes: dict[str, int]) -> ctypes.CDLL | None:
    """The library for these sizes (macros of step.c), or None where it cannot be made."""
    return _build(tuple(sorted(sizes.items())))


@functools.cache
def _build(sizes: tuple[tuple[str, int], ...]) -> ctypes.CDLL | None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or os.environ.get("DISTILL_NATIVE") == "0":
        return None
    here = Path(__file__).parent
    command = [compiler, *shlex.split(_FLAGS), *(f"-D{name}={value}" for name, value in sizes)]
    digest = hashlib.sha256(repr((command, _processor(), os.stat(compiler).st_mtime_ns)).encode())
    for name in (*_SOURCES, "maths.h", "step.h"):
        digest.update((here / name).read_bytes())
    library = _cache_folder() / f"{digest.hexdigest()[:32]}.so"
    if not library.is_file():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / "library.so"
            done = subprocess.run(
                [*command, "-o", made, *(here / name for name in _SOURCES), "-lm"], capture_output=True, text=True
            )
            if done.returncode != 0:
                return None
            os.replace(made, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        return None


@functools.cache
def sgemm() -> int | None:
    """Address of torch's own single-precision matrix product, if it lets others call it."""
    found = getattr(_torch_library(), "sgemm_", None)
    return None if found is None else ctypes.cast(found, ctypes.c_void_p).value


@functools.cache
def set_blas_threads() -> Any:
    """What sets the calling thread's number of threads for that product and returns the old one; None without MKL."""
    return getattr(_torch_library(), "MKL_Set_Num_Threads_Local", None)


@functools.cache
def _torch_library() -> ctypes.CDLL | None:
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).is_file():
            return ctypes.CDLL(str(folder / name))
    return None


def _cache_folder() -> Path:
    """The user's own: a library that others can write to would run what they please."""
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "distill"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _processor() -> str:
    """What -march=native depends on, for a home folder that several machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return platform.processor() + platform.machine()
    return "\n".join(line for line in lines.splitlines() if line.startswith(("model name", "flags", "Features")))
