"""`distill teacher bench`: the kernels on this machine's GPU, right and fast."""

import subprocess
import sys
from pathlib import Path

import distill
from distill.errors import UserError


def run(quick: bool, json: Path | None, plot: Path | None) -> int:
    """The exit status of `python -m tests.bench.kernels`, which is part of the source tree."""
    root = Path(distill.__file__).resolve().parent.parent
    if not Path(root, "tests", "bench", "kernels.py").is_file():
        raise UserError("the bench of the kernels is in the source tree, not in an installed package: run it there")
    command = [sys.executable, "-m", "tests.bench.kernels", *(["--quick"] if quick else [])]
    for name, path in (("--json", json), ("--plot", plot)):
        if path is not None:
            command += [name, str(path.resolve())]
    return subprocess.run(command, cwd=root).returncode
