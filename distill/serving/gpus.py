"""The GPUs of this machine, without starting CUDA: vLLM's processes shall find them untouched."""

import os
import shutil
import subprocess

from distill.errors import UserError

_MIB = 2**20


def gpu_memories() -> list[int]:
    """Bytes of each GPU that a program started here would see; empty without NVIDIA's driver.

    Raises UserError if the driver is there and does not answer.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"nvidia-smi does not answer ({error}); say --gpus and --gpu-memory") from None
    rows = [[cell.strip() for cell in line.split(",")] for line in found.splitlines() if line.strip()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        wanted = [name.strip() for name in visible.split(",") if name.strip()]
        rows = [row for row in rows if any(row[0] == name or row[1].startswith(name) for name in wanted)]
    return [int(memory) * _MIB for _, _, memory in rows]
