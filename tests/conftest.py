"""In CI hypothesis draws the same examples every time: a run there judges the change, and not the luck of the draw."""

import os

from hypothesis import settings

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
