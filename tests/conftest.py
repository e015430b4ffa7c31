"""What must be set before anything is imported.

In CI hypothesis draws the same examples every time: a run there judges the change, and not the luck of the draw.
Where there is no GPU, Triton's kernels are interpreted; Triton reads the variable once, when the first test imports it.
There, and in the workers of pytest-xdist, torch computes in one thread (read when it is imported, inherited by what
a test starts): the tests' tensors are too small for two, and two that spin for each other beside another busy process
took ten to forty times as long. Tests that need a number of threads set it themselves; those wait asleep.
"""

import os
import shutil
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
gpu = shutil.which("nvidia-smi") is not None
if not gpu:
    os.environ.setdefault("TRITON_INTERPRET", "1")
if not gpu or "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(autouse=True)
def threads_of_its_own() -> Iterator[None]:
    """What a test, or a command that it runs, sets for its process does not slow down all tests after it."""
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else None
    yield
    if torch:
        torch.set_num_threads(threads)
