"""Marked tests start vLLM's CPU build for real; elsewhere they are skipped with a reason."""

import os

import pytest

from distill.errors import UserError
from distill.serving.interpreter import vllm_python as find

NAMED = "DISTILL_VLLM_PYTHON"


def pytest_configure(config):
    config.addinivalue_line("markers", "vllm: starts vLLM for real, minutes; skipped where there is no vLLM")


@pytest.fixture(scope="session")
def vllm_python():
    """The interpreter of a vLLM environment."""
    try:
        return find(os.environ.get(NAMED), NAMED)
    except UserError as error:
        pytest.skip(f"{error}; or {NAMED}=PYTHON in the environment")
