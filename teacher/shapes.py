"""Where shapes may depend on values, and where not.

A shape that depends on values (how many positions have a loss, how many rows the experts were filled up to) is cheap
to have on a CPU, and saves work. On a GPU the host would wait for the device to know it, at every such place, and a
step that does so cannot be recorded as a CUDA graph (teacher.train_graph): there the largest shape is taken, and what
is over is masked.
"""

from torch import Tensor


def fixed(x: Tensor) -> bool:
    """Whether what is computed from `x` must have shapes that follow from shapes alone."""
    return x.device.type != "cpu"
