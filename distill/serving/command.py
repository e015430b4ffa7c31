"""The `vllm serve` command for a model or a recipe."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distill.errors import UserError
from distill.recipe import Sampling, Teacher
from distill.serving.arguments import as_flags, engine_arguments, sequence_length
from distill.serving.model import read_facts
from distill.serving.placement import Placement, place
from distill.serving.worker import on_cpu

# Where the model's context is not known and nothing says how long sequences get.
_USUAL_LENGTH = 32768


@dataclass(frozen=True)
class Listening:
    host: str = "127.0.0.1"
    port: int = 8000
    names: tuple[str, ...] = ()
    reasoning_parser: str = "deepseek_r1"  # 'none': replies are passed on as they are


@dataclass(frozen=True)
class Plan:
    """What is to be run where."""

    arguments: tuple[str, ...]  # of `vllm serve`, the model first
    at: Placement
    nodes: int
    node_gpus: int
    port: int
    environment: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """The command for people and for scripts, an option a line."""
        before = "".join(f"{name}={shlex.quote(value)} " for name, value in self.environment.items())
        lines = [f"{before}vllm serve {shlex.quote(self.arguments[0])}"]
        for argument in self.arguments[1:]:
            if argument.startswith("--"):
                lines.append(shlex.quote(argument))
            else:
                lines[-1] += f" {shlex.quote(argument)}"
        return " \\\n    ".join(lines)


def plan(
    teacher: Teacher, sampling: Sampling | None, listening: Listening, node: Sequence[int], nodes: int = 1
) -> Plan:
    """Raises UserError for a model that cannot be served so. `node`: bytes of memory of each GPU of a node."""
    facts = read_facts(teacher.model, teacher.revision)
    length = sequence_length(teacher, sampling, facts)
    at = place(facts, teacher.vllm, node, length or _USUAL_LENGTH, nodes)
    arguments = engine_arguments(teacher, facts, at, length)
    if nodes > 1:
        if not node:
            raise UserError("--nodes: say what each node has, with --gpus and --gpu-memory")
        if at.gpus <= len(node):
            raise UserError(f"--nodes {nodes}: the recipe's parallelism asks for {at.gpus} GPUs, which one node has")
        arguments |= _over_nodes(at, len(node), nodes)
    arguments |= {
        "host": listening.host,
        "port": listening.port,
        "served_model_name": list(listening.names) or _names(teacher.model),
    }
    if listening.reasoning_parser != "none":
        arguments["reasoning_parser"] = listening.reasoning_parser
    environment: dict[str, str] = {}
    if not node:
        arguments, environment = on_cpu(arguments, facts.latent)
    return Plan(tuple(as_flags(arguments)), at, nodes, len(node), listening.port, environment)


def _over_nodes(at: Placement, gpus: int, nodes: int) -> dict[str, object]:
    """Through Ray, which brings one command on one node to all of them."""
    if at.data == 1:
        return {"distributed_executor_backend": "ray"}
    if at.tensor * at.pipeline > gpus:
        raise UserError(
            f"teacher.vllm: a copy of {at.tensor * at.pipeline} GPUs does not fit on a node of {gpus};"
            " data parallelism over several nodes needs copies that do"
        )
    return {"data_parallel_backend": "ray", "data_parallel_size_local": at.data // nodes}


def _names(model: str) -> list[str]:
    """As the recipe writes it, which is what its endpoints are asked for, and a folder's bare name."""
    bare = Path(model).resolve().name if Path(model).exists() else model
    return [model] if bare == model else [model, bare]
