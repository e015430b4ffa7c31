"""Our FP8 kernels inside vLLM: `vllm serve CHECKPOINT --quantization distill_fp8`.

Installed beside vLLM, the entry point `vllm.general_plugins` calls `register` in each of its processes. Checkpoints
in block FP8 as DeepSeek-V3 and R1 publish them are taken; nothing of vLLM is patched.
"""


def register() -> None:
    """Make the quantization method `distill_fp8` known to vLLM. Calling it again changes nothing."""
    from teacher.vllm_plugin import config  # noqa: F401 (its import registers)
