"""What the kernels can take, said in one place: a ValueError names what was found and what is taken."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

# Triton reads the variable when it is imported; afterwards it changes nothing.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_LEAST_CAPABILITY = (9, 0)


@functools.cache
def obstacle(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`; None where they can."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton is missing ({error})"
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"tensors are on {device.type}; the kernels take CUDA, or any device under TRITON_INTERPRET=1"
    if torch.version.cuda is None:
        return "this build of torch is not for CUDA"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}; the kernels take 9.0 (Hopper) or later"
    return None


def take(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], dims: tuple[int, ...], contiguous: bool = False
) -> None:
    """Refuse a tensor of another dtype or number of dimensions, or whose rows do not lie value by value."""
    if (missing := obstacle(tensor.device)) is not None:
        raise ValueError(f"{name}: {missing}")
    if tensor.dtype not in dtypes:
        taken = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}; taken: {taken}")
    if tensor.dim() not in dims:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; taken: {' or '.join(map(str, dims))} dimensions")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {list(tensor.stride())}; taken: a contiguous tensor")
    if tensor.numel() and tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        raise ValueError(f"{name} has strides {list(tensor.stride())}; taken: a last dimension of stride 1")


def same_device(**tensors: Tensor) -> None:
    places = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(places.values())) > 1:
        raise ValueError("tensors on several devices: " + ", ".join(f"{name} on {at}" for name, at in places.items()))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
