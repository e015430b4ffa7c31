"""vLLM's engine arguments, by its names, from a recipe's words: the same for its engine and for its server."""

import json
from collections.abc import Mapping
from typing import Any

from distill.errors import UserError
from distill.recipe import Sampling, Teacher
from distill.serving.model import Facts
from distill.serving.placement import Placement

# Room for the prompt beside `sampling.max_tokens`, where the recipe gives no max_model_len.
PROMPT_TOKENS = 4096


def sequence_length(teacher: Teacher, sampling: Sampling | None, facts: Facts) -> int | None:
    """Tokens of a sequence, prompt and reply: what the recipe needs, within the model's context; None: unknown."""
    length = teacher.vllm.max_model_len
    if length is not None:
        if facts.context is not None and length > facts.context:
            raise UserError(f"teacher.vllm.max_model_len: {length} is more than the model's context of {facts.context}")
        return length
    if sampling is None:
        return facts.context
    wanted = sampling.max_tokens + PROMPT_TOKENS
    return wanted if facts.context is None else min(wanted, facts.context)


def engine_arguments(teacher: Teacher, facts: Facts, at: Placement, length: int | None) -> dict[str, Any]:
    """Raises UserError for a setting that vLLM would misunderstand or that we forbid."""
    vllm = teacher.vllm
    arguments: dict[str, Any] = {"model": facts.model}
    if facts.revision is not None:
        arguments |= {"revision": facts.revision, "tokenizer_revision": facts.revision}
    if teacher.dtype is not None:
        arguments["dtype"] = teacher.dtype
    for name, value, usual in (
        ("tensor_parallel_size", at.tensor, 1),
        ("pipeline_parallel_size", at.pipeline, 1),
        ("data_parallel_size", at.data, 1),
        ("enable_expert_parallel", at.expert and at.gpus > 1, False),
        ("quantization", vllm.quantization, None),
        ("kv_cache_dtype", vllm.kv_cache_dtype, "auto"),
        ("max_model_len", length, None),
    ):
        if value != usual:
            arguments[name] = value
    # What one copy decodes at once; the copies share the recipe's number.
    arguments["max_num_seqs"] = -(-teacher.batch_size // at.data)
    # Left out where the recipe does not say: on a CPU vLLM refuses its own default, see distill/serving/worker.py.
    if "gpu_memory_utilization" in vllm.model_fields_set:
        arguments["gpu_memory_utilization"] = vllm.gpu_memory_utilization
    if vllm.speculate:
        arguments["speculative_config"] = _speculation(vllm.speculate, facts, at)
    return arguments | _checked(vllm.args)


def _speculation(tokens: int, facts: Facts, at: Placement) -> dict[str, Any]:
    if not facts.mtp_layers:
        raise UserError(f"teacher.vllm.speculate: {facts.model} has no multi-token prediction layer to draft with")
    if at.pipeline > 1:
        raise UserError(
            "teacher.vllm.speculate: vLLM cannot draft with MTP under pipeline parallelism (vllm-project/vllm#49355);"
            " set speculate=0, or data_parallel instead of pipeline_parallel"
        )
    return {"method": "mtp", "num_speculative_tokens": tokens}


def _checked(extra: Mapping[str, Any]) -> dict[str, Any]:
    names = {name.replace("-", "_").lstrip("_"): value for name, value in extra.items()}
    if names.get("trust_remote_code"):
        raise UserError("teacher.vllm.args: trust_remote_code runs a stranger's program; no teacher is worth that")
    if "api_key" in names:
        raise UserError("teacher.vllm.args: api_key would stand in every process list; put it into VLLM_API_KEY")
    return names


def as_flags(arguments: Mapping[str, Any]) -> list[str]:
    """For `vllm serve`: the model first, the rest as --options."""
    flags = [str(arguments["model"])]
    for name, value in arguments.items():
        option = f"--{name.replace('_', '-')}"
        if name == "model" or value is None:
            continue
        if isinstance(value, bool):
            flags.append(option if value else f"--no-{option[2:]}")
        elif isinstance(value, list):
            flags += [option, *(item if isinstance(item, str) else json.dumps(item) for item in value)]
        elif isinstance(value, Mapping):
            flags += [option, json.dumps(value, separators=(",", ":"))]
        else:
            flags += [option, str(value)]
    return flags
