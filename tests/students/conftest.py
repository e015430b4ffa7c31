"""One thread and one pair of bases for all tests of students."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import tiny


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums are then made in one order, and forked children find no thread pool of their parent's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_qwen(tmp_path_factory.mktemp("bases") / "qwen", initializer_range=0.2)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_llama(tmp_path_factory.mktemp("bases") / "llama", initializer_range=0.2)
