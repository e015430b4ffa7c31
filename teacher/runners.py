"""Which runner serves a model where it lies: in C, in torch, by CUDA graphs, with Triton's kernels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache

import torch

from teacher.cache import LatentCache
from teacher.decoding import Runner
from teacher.graphs import GraphRunner
from teacher.kernels.arguments import obstacle
from teacher.model import DeepseekV3
from teacher.native.runner import native_runners
from teacher.runner import TorchRunner

_log = logging.getLogger(__name__)

# Latent and rotary sizes for which the MLA kernel is proved on a GPU with a cache in FP8 (docs/kernels.md);
# DeepSeek-V2's, V3's and R1's. In bf16 it is for all that it takes.
_PROVED = (512, 64)


def runners(
    model: DeepseekV3, cache: LatentCache, threads: int, native: bool, graphs: bool, kernels: bool
) -> Sequence[Runner]:
    """A runner a thread, of the fastest kind that serves this model here."""
    weight = model.lm_head.weight
    in_c = native_runners(model, cache, threads) if native and cache.latents_LPGC.dtype == weight.dtype else None
    if in_c:
        return in_c
    kind = GraphRunner if graphs and weight.device.type == "cuda" and weight.dtype == torch.bfloat16 else TorchRunner
    return [kind(model, cache, kernels) for _ in range(threads)]


def decodes_by_kernel(model: DeepseekV3, cache_dtype: torch.dtype, page_size: int) -> bool:
    """Whether the MLA decoding kernel can serve this model; on a GPU the log says once what is used, and why."""
    weight, config = model.lm_head.weight, model.config
    if weight.device.type != "cuda":
        return False
    missing = obstacle(weight.device)
    if missing is None and weight.dtype != torch.bfloat16:
        missing = f"the model is in {weight.dtype}, the kernel takes bfloat16"
    sizes = config.kv_lora_rank, config.qk_rope_head_dim
    if missing is None and sizes != _PROVED and cache_dtype != torch.bfloat16:
        proved = f"{_PROVED[0]} + {_PROVED[1]}"
        missing = f"latents of {sizes[0]} + {sizes[1]} in FP8, on a GPU the kernel is proved for {proved}"
    if missing is None:
        from teacher.kernels.mla_decode import cache_obstacle

        missing = cache_obstacle(config.kv_lora_rank, config.qk_rope_head_dim, page_size, cache_dtype, weight.device)
    _log_path("the Triton kernel" if missing is None else f"torch, not the Triton kernel: {missing}")
    return missing is None


@lru_cache
def _log_path(path: str) -> None:
    _log.info("decoded tokens attend in %s", path)
