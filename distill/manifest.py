"""manifest.json: what made a run (versions, commit, seeds, hashes), and each stage's state, seconds and tokens."""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.files import write_json_atomic

PACKAGES = (
    "distill", "torch", "transformers", "tokenizers", "safetensors", "accelerate", "peft", "datasets", "lm-eval",
    "math-verify", "reasoning-gym", "numpy", "pydantic",
)  # fmt: skip


class Manifest:
    """The manifest's dict with atomic saves. `data` is plain JSON; call save() after changing it by hand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"stages": {}}
        if path.exists():
            try:
                self.data = json.loads(path.read_bytes())
            except ValueError as error:
                raise UserError(f"{path}: not valid JSON ({error}); move it away to start the stages anew") from None
            if not isinstance(self.data, dict) or not isinstance(self.data.setdefault("stages", {}), dict):
                raise UserError(f"{path}: expected an object with 'stages'; move it away to start the stages anew")

    def save(self) -> None:
        write_json_atomic(self.path, self.data)

    def update(self, **facts: Any) -> None:
        """Set top-level entries (`teacher`, `problems`, ...) and save."""
        self.data.update(facts)
        self.save()

    def stage(self, stage: str) -> dict[str, Any]:
        """The stage's entry: status, seconds, tokens, inputs and its facts; empty before its first start."""
        return self.data["stages"].setdefault(stage, {})


def environment() -> dict[str, Any]:
    """Versions, machine and commit of this process."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: installed for name in PACKAGES if (installed := installed_version(name))},
        "commit": git_commit(Path(__file__).resolve().parent.parent),
        "command": sys.argv,
    }


def utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit(root: Path) -> str | None:
    """Commit of the checkout at `root`, with '-dirty' if tracked files differ; None when installed from a wheel."""
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def peak_rss_bytes() -> int:
    """Largest resident memory of this process or of any finished child so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
