"""How many GPUs of which size hold a model and a cache, from its config. No torch.

Counted on each GPU, against 90% of the memory on its label (GB = 10^9 bytes; the rest is for activations, CUDA graphs
and the runtime; 0.9 is vLLM's default too): its share of the main model's weights, and the whole bf16 latent cache.
Tensor parallelism divides what belongs to a head, an expert or a word of the vocabulary, and wants a power of two that
divides the heads; latents, the projections that make them, routers and norms are on every GPU. Where fewer GPUs do it
so, layers go to a power of two of pipeline stages, which divide the cache too. MTP modules are not counted.

For DeepSeek-V3 this gives what SGLang recommends (docs.sglang.io, DeepSeek usage): FP8 on 8 H200, 8 MI300X or 16 H100,
bf16 on 16 H200, 16 MI300X or 32 H100.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod

from teacher.config import DeepseekV3Config
from teacher.inspect import Precision, Tensors, cache_bytes, scale_block, tensors

USABLE = 0.9
SIZES = {
    24: "RTX 4090, L4",
    40: "A100 40 GB",
    48: "L40S, RTX A6000",
    80: "A100, H100",
    96: "H20, GH200",
    141: "H200",
    192: "B200, MI300X",
}
# For each of the two kinds of parallelism: more than anyone has, and the search ends.
MOST_GPUS = 1024


@dataclass(frozen=True)
class Fit:
    """The fewest GPUs of `size_gb` that hold the weights in `precision` and the cache."""

    size_gb: int
    precision: Precision
    gpus: int | None  # None: not even the largest arrangement holds it
    tensor_parallel: int = 0
    pipeline_stages: int = 0
    weight_bytes_each: int = 0
    cache_tokens: int = 0  # that the memory left over holds, at least as many as were asked for


def fits(config: DeepseekV3Config, precision: Precision, cache_tokens: int) -> list[Fit]:
    """One line for each size of SIZES, with room for `cache_tokens` tokens in the cache (all sequences together)."""
    weights = _Weights(config, precision)
    return [_fit(config, weights, size, precision, cache_tokens) for size in SIZES]


class _Weights:
    """Bytes of the main model by where parallelism puts them."""

    def __init__(self, config: DeepseekV3Config, precision: Precision) -> None:
        block = scale_block(config)
        main = [tensor for tensor in tensors(config) if tensor.part == "main"]

        def total(chosen: list[Tensors]) -> int:
            return sum(tensor.bytes(precision, block) for tensor in chosen)

        self.ends = total([tensor for tensor in main if tensor.kind == "embedding"])  # the head is as large
        inside = [tensor for tensor in main if tensor.kind not in ("embedding", "head")]
        self.split = total([tensor for tensor in inside if tensor.split])
        self.repeated = total([tensor for tensor in inside if not tensor.split])

    def on_each(self, tensor_parallel: int, stage: float, stages: int) -> int:
        """Bytes on a GPU of the fullest stage, which holds the share `stage` of the layers."""
        ends = self.ends * (2 if stages == 1 else 1)
        return round((self.split * stage + ends) / tensor_parallel + self.repeated * stage)


def _fit(config: DeepseekV3Config, weights: _Weights, size: int, precision: Precision, cache_tokens: int) -> Fit:
    usable, layers = USABLE * size * 1e9, config.num_hidden_layers
    powers = [2**power for power in range(MOST_GPUS.bit_length())]
    splits = [power for power in powers if config.num_attention_heads % power == 0]
    pipelines = [power for power in powers if power <= layers]
    for tensor_parallel, stages in sorted(product(splits, pipelines), key=lambda pair: (prod(pair), pair[1])):
        stage = -(-layers // stages) / layers
        held = weights.on_each(tensor_parallel, stage, stages)
        room = int((usable - held) / (cache_bytes(config) * stage))
        if room >= cache_tokens:
            return Fit(size, precision, tensor_parallel * stages, tensor_parallel, stages, held, room)
    return Fit(size, precision, None)
