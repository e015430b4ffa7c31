"""`distill teacher serve` through vLLM: the command printed, or run and looked after."""

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import ValidationError

from distill.errors import UserError
from distill.recipe import Sampling, Teacher
from distill.recipe_load import apply_override, explain
from distill.serving.command import Listening, Plan, plan
from distill.serving.gpus import gpu_memories
from distill.serving.interpreter import vllm_python
from distill.serving.supervise import Patience, Supervisor


@dataclass(frozen=True)
class VllmOptions:
    """See the command's options. `gpus` and `gpu_memory` describe a node other than this one."""

    python: str | None = None
    gpus: int | None = None
    gpu_memory: float | None = None  # GB, as on the label
    nodes: int = 1
    output: Literal["run", "print", "slurm", "ssh"] = "run"
    patience: Patience = field(default_factory=Patience)


def run(teacher: Teacher, sampling: Sampling | None, listening: Listening, options: VllmOptions) -> None:
    """Print the command or a launch script, or serve until SIGTERM or Ctrl-C.

    Raises UserError for what cannot be served, ServerLost where vLLM does not stay up.
    """
    node = _node(options)
    if options.output == "run" and options.nodes > 1:
        raise UserError("--nodes: several nodes are started by a script; print one with --script slurm or ssh")
    if options.output == "run" and listening.port == 0:
        listening = replace(listening, port=_free_port(listening.host))
    if options.output in ("slurm", "ssh") and listening.host == Listening.host:
        listening = replace(listening, host="0.0.0.0")  # whoever waits for it, or asks it, is on another machine
    planned = plan(teacher, sampling, listening, node, options.nodes)
    if options.output == "print":
        print(planned.text())
    elif options.output == "run":
        _serve(planned, teacher, listening, options)
    else:
        from distill.serving.scripts import script

        print(script(planned, options.output), end="")


def teacher_for(model: str, overrides: Sequence[str]) -> Teacher:
    """The teacher section of a recipe that was not written: overrides are as for a recipe (teacher.vllm.…=…)."""
    tree: dict[str, Any] = {"teacher": {"kind": "vllm", "model": model}}
    for override in overrides:
        apply_override(tree, override)
    try:
        return Teacher.model_validate(tree["teacher"])
    except ValidationError as error:
        raise UserError(f"teacher: {explain(error, Teacher)}") from None


def _serve(planned: Plan, teacher: Teacher, listening: Listening, options: VllmOptions) -> None:
    python = vllm_python(options.python or teacher.vllm.python, "--vllm-python")
    print(f"distill: {planned.text()}", file=sys.stderr, flush=True)
    # vLLM's own command by its module: `vllm` need not be on the PATH of this environment.
    command = [python, "-m", "vllm.entrypoints.cli.main", "serve", *planned.arguments]
    environment = {"VLLM_NO_USAGE_STATS": "1", **os.environ, **planned.environment}
    # One name for the key, whichever engine serves; from the environment, so that no process list shows it.
    if os.environ.get("DISTILL_API_KEY"):
        environment.setdefault("VLLM_API_KEY", os.environ["DISTILL_API_KEY"])
    host = "127.0.0.1" if listening.host in ("0.0.0.0", "::") else listening.host
    url = f"http://{f'[{host}]' if ':' in host else host}:{listening.port}"
    Supervisor(command, url, options.patience, environment).run()
    print("stopped", file=sys.stderr)


def _node(options: VllmOptions) -> list[int]:
    """Bytes of each GPU of a node: as told, else this machine's."""
    if options.gpu_memory is None and options.gpus is None:
        return gpu_memories()
    if options.gpu_memory is None:
        here = gpu_memories()
        if not here and options.gpus:
            raise UserError("--gpus: there is none here to take the memory from; say --gpu-memory, in GB")
        return here[: options.gpus] if len(here) >= (options.gpus or 0) else here[:1] * (options.gpus or 0)
    return [int(options.gpu_memory * 1e9)] * (options.gpus or len(gpu_memories()) or 1)


def _free_port(host: str) -> int:
    """Taken and given back: vLLM binds it again, and should another program come between, it says so."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
