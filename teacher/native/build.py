"""Compiling the C of this folder for one model's sizes, once a machine.

The result lies in the user's cache folder under a name that says all that went into it; where there is no such folder
that is safe, it is made anew by each process. Without a C compiler, or without torch's BLAS to call, there is none, and
the engine runs in torch alone: nothing here raises.
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
_SECONDS = 120  # a compiler that takes longer hangs
_SMALL = {
    "HIDDEN": 16, "VOCAB": 16, "HEADS": 2, "RANK": 16, "ROPE": 16, "QRANK": 16, "EXPERTS": 4, "TOP_K": 2, "GROUPS": 2,
    "TOP_GROUPS": 1, "INNER": 16, "PAGE": 16,
}  # fmt: skip


def build(sizes: dict[str, int]) -> ctypes.CDLL | None:
    """The library for these sizes (macros of step.c), or None where it cannot be made."""
    found = _build(tuple(sorted(sizes.items())))
    return None if isinstance(found, str) else found


def obstacle() -> str | None:
    """Why engines on this machine run in torch alone; None where the C step can be made, which is tried."""
    if sgemm() is None:
        return "this build of torch lets nobody call its matrix product"
    found = _build(tuple(_SMALL.items()))
    return found if isinstance(found, str) else None


@functools.cache
def _build(sizes: tuple[tuple[str, int], ...]) -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if os.environ.get("DISTILL_NATIVE") == "0":
        return "DISTILL_NATIVE is 0"
    try:
        name, *options = shlex.split(os.environ.get("CC") or "cc")
        compiler = shutil.which(name)
        if compiler is None:
            return f"no C compiler ({name}; CC names another)"
        command = [compiler, *options, *shlex.split(_FLAGS), *(f"-D{name}={value}" for name, value in sizes)]
        return _load_or_make(command, cache_folder())
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:  # ValueError: a CC that is no command line
        return str(error)


def _load_or_make(command: list[str], cache: Path | None) -> ctypes.CDLL | str:
    here = Path(__file__).parent
    digest = hashlib.sha256(repr((command, _processor(), os.stat(command[0]).st_mtime_ns)).encode())
    for name in (*_SOURCES, "maths.h", "step.h"):
        digest.update((here / name).read_bytes())
    library = None if cache is None else cache / f"{digest.hexdigest()[:32]}.so"
    if library is not None and library.is_file():
        try:
            return ctypes.CDLL(str(library))
        except OSError:  # torn by a crash, or of another C library: made anew
            pass
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder, "library.so")
        done = subprocess.run(
            [*command, "-o", made, *(here / name for name in _SOURCES), "-lm"],
            capture_output=True, text=True, errors="replace", timeout=_SECONDS, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode != 0:
            return f"{command[0]} fails: {done.stderr.strip().partition(chr(10))[0] or f'exit {done.returncode}'}"
        loaded = ctypes.CDLL(str(made))  # stays loaded when the file has gone
        if library is not None:
            os.replace(made, library)
    return loaded


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


def cache_folder() -> Path | None:
    """The user's own, if it can be written to, and by nobody else: a library put there runs what its writer pleases."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "distill"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    safe = found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if safe and os.access(folder, os.W_OK) else None


def _processor() -> str:
    """What -march=native depends on, for a home folder that several machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return platform.processor() + platform.machine()
    return "\n".join(line for line in lines.splitlines() if line.startswith(("model name", "flags", "Features")))
