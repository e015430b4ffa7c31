"""Which Python has vLLM: the one that the recipe names, this one, or the one that `make vllm` built."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from distill.errors import UserError

# Beside the checkout or in the current directory; `make vllm` makes it.
_BUILT = Path(".vllm/bin/python")
_SECONDS = 60


def vllm_python(named: str | None = None, field: str = "teacher.vllm.python") -> str:
    """An interpreter that can import vLLM. Raises UserError, which says how to get one, if there is none.

    vLLM pins its torch, so it often lives in an environment of its own, and nothing of ours need be there.
    """
    if named is not None:
        return _checked(named, field)
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    root = Path(__file__).resolve().parents[2]
    for place in (Path.cwd() / _BUILT, root / _BUILT):
        if place.is_file():
            return str(place)
    raise UserError(
        f"vLLM is not in this environment: `pip install 'distill[vllm]'` (CUDA), `make vllm` (its CPU build, in .vllm),"
        f" or {field}=PYTHON, an interpreter that has it"
    )


def _checked(named: str, field: str) -> str:
    """`named`, if it runs and finds vLLM; asked of it, since nothing of vLLM is importable here."""
    question = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        asked = subprocess.run([named, "-c", question], capture_output=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{field}: '{named}' does not run ({error}); expected a Python that has vLLM") from None
    if asked.returncode:
        raise UserError(f"{field}: '{named}' has no vLLM; `make vllm` builds its CPU build in .vllm") from None
    return named
