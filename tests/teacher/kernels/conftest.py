"""The kernels' tests run compiled on a GPU, and interpreted (tests/conftest.py) where there is none."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def device() -> str:
    from teacher.kernels.arguments import obstacle

    place = "cuda" if torch.cuda.is_available() else "cpu"
    if (reason := obstacle(torch.device(place))) is not None:
        pytest.skip(reason)
    return place
