"""Plain-text documents for the tests of pretraining: pure functions of the index, at module level to be picklable."""

import os
import random
import signal


def sums(index: int) -> str:
    numbers = random.Random(index)
    a, b = numbers.randrange(50), numbers.randrange(50)
    return f"{a}+{b}={a + b}\n" * numbers.randrange(1, 4)


def broken(index: int) -> str:
    if index > 300:
        raise ValueError(f"document {index} cannot be written")
    return sums(index)


def killed(index: int) -> str:
    if index > 300:
        os.kill(os.getpid(), signal.SIGKILL)
    return sums(index)
