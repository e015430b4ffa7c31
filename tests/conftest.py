"""What must be set before anything is imported.

In CI hypothesis draws the same examples every time: a run there judges the change, and not the luck of the draw.
Where there is no GPU, Triton's kernels are interpreted; Triton reads the variable once, when the first test imports it.
"""

import os
import shutil

from hypothesis import settings

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
