"""How a model is laid out over GPUs, from their number and memory.

What generation of traces wants is tokens a second over all sequences, not the first token soon. So a model that fits
on fewer GPUs than there are is copied rather than split further, and where attention keeps latents, which tensor
parallelism cannot divide, attention is copied to every GPU while the experts are spread (data and expert parallelism,
what vLLM's guide to DeepSeek-V3 advises for high load): DeepSeek-R1's cache on 8 H200 is then five times as large.
Over several nodes, tensor parallelism stays within a node and layers go from node to node, as vLLM's guide to scaling
has it: that needs no more than an ordinary network. The recipe's own numbers overrule all of this.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distill.errors import UserError
from distill.recipe import Vllm
from distill.serving.model import Facts

# Sequences of full length that the cache of each copy should hold; a layout with fewer is taken only if none has them.
_SEQUENCES = 8
_GIB = 2**30


@dataclass(frozen=True)
class Placement:
    tensor: int
    pipeline: int
    data: int
    expert: bool

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline * self.data


def place(facts: Facts, vllm: Vllm, node: Sequence[int], length: int, nodes: int = 1) -> Placement:
    """Lay `facts` out on `nodes` nodes of GPUs with `node` bytes of memory each, for sequences of `length` tokens.

    No GPUs at all: a CPU, and whatever the recipe says. Raises UserError where it cannot fit.
    """
    expert = facts.experts if vllm.expert_parallel is None else vllm.expert_parallel
    given = vllm.model_fields_set & {"tensor_parallel", "data_parallel", "pipeline_parallel"}
    if not node or vllm.tensor_parallel is not None:
        chosen = Placement(vllm.tensor_parallel or 1, vllm.pipeline_parallel, vllm.data_parallel, expert)
        return _counted(chosen, len(node) * nodes)
    if nodes > 1 and not given & {"data_parallel", "pipeline_parallel"}:
        candidates = [Placement(_largest(len(node), facts.heads), nodes, 1, expert)]
    elif given:
        groups = vllm.pipeline_parallel * vllm.data_parallel
        within = len(node) * nodes // groups
        if not within:
            raise UserError(
                f"teacher.vllm: pipeline_parallel × data_parallel is {groups}, and there are {len(node) * nodes} GPUs"
            )
        # Never across nodes: a layer's parts talk too much for a network.
        tensor = _largest(min(within, len(node)), facts.heads)
        candidates = [Placement(tensor, vllm.pipeline_parallel, vllm.data_parallel, expert)]
    else:
        candidates = _of_one_node(facts, len(node), expert)
    usable = min(node) * vllm.gpu_memory_utilization
    for sequences in (_SEQUENCES, 1):
        for candidate in candidates:
            if facts.weights is None or _bytes_each(facts, candidate, sequences * length) <= usable:
                return candidate
    needed = _bytes_each(facts, candidates[-1], length)
    raise UserError(
        f"{facts.model}: {candidates[-1].gpus} GPUs would need {needed / _GIB:.0f} GiB each for the weights and"
        f" a sequence of {length} tokens, and have {usable / _GIB:.0f} GiB"
        f" (gpu_memory_utilization {vllm.gpu_memory_utilization:g}); use more nodes, a smaller max_model_len, or"
        " quantization"
    )


def _of_one_node(facts: Facts, gpus: int, expert: bool) -> list[Placement]:
    """In the order in which they are tried."""
    whole = _largest(gpus, facts.heads)
    if facts.weights is None:  # nothing says how large it is: all memory for one copy
        return [Placement(whole, 1, 1, expert)]
    if facts.experts:
        spread = [Placement(1, 1, gpus, True)] if facts.latent and expert and gpus > 1 else []
        return [*spread, Placement(whole, 1, 1, expert)]
    sizes = [size for size in (1 << n for n in range(gpus.bit_length())) if size <= whole and facts.heads % size == 0]
    return [Placement(size, 1, gpus // size, False) for size in sizes]


def _largest(gpus: int, heads: int) -> int:
    """The largest power of two that there are GPUs for and that divides the heads."""
    return max(size for size in (1 << n for n in range(gpus.bit_length())) if size <= gpus and heads % size == 0)


def _bytes_each(facts: Facts, at: Placement, tokens: int) -> float:
    """Weights and a cache of so many tokens a copy, on each GPU."""
    assert facts.weights is not None
    group = at.tensor * at.pipeline
    spread = group * (at.data if at.expert else 1)
    weights = (facts.weights - facts.expert_weights) / group + facts.expert_weights / spread
    divided = at.pipeline if facts.latent else group
    return weights + tokens * facts.cache_per_token / divided


def _counted(chosen: Placement, gpus: int) -> Placement:
    if gpus and chosen.gpus > gpus:
        raise UserError(
            f"teacher.vllm: tensor_parallel × pipeline_parallel × data_parallel is {chosen.gpus},"
            f" and there are {gpus} GPUs"
        )
    return chosen
