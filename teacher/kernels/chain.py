"""Programmatic dependent launch: a kernel is set up while the one before it still runs, and waits for it on the device.

A decoding step of one token is a chain of kernels of a few microseconds each, and between two of them the device is
idle for about one, while the next is launched. A kernel that calls `begin` first of all waits there until everything
before it is done and visible, and then lets the next one be set up; `dependent()` are the launch's options that let
this one be set up early. A kernel launched so must call `begin` before it reads or writes anything.
https://docs.nvidia.com/cuda/cuda-c-programming-guide/#programmatic-dependent-launch-and-synchronization
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from teacher.kernels.arguments import INTERPRETED

_COMPILED = tl.constexpr(not INTERPRETED)
enabled = False  # whether launches say so; `begin` does nothing then


@triton.jit
def begin():
    """Wait for what was launched before; then the next kernel may be set up."""
    if _COMPILED:
        gdc_wait()
        gdc_launch_dependents()


def dependent() -> dict[str, bool]:
    """Options of a launch whose kernel begins with `begin`."""
    return {"launch_pdl": True} if enabled and not INTERPRETED else {}
