"""The kernels on a Hopper GPU: first that they are right, then how fast, beside the machine's own limits and peers.

    python -m tests.bench.kernels [--quick] [--json kernels.json] [--plot kernels.svg] [--only experts|mla] [--commit X]

Needs torch, triton and a Hopper GPU, nothing else; peers that can be imported (FlashInfer, DeepGEMM, vLLM) get rows of
their own. The L2 is flushed before every repetition, inputs are random and alternate between sets, times are medians
with quartiles. Under 8 minutes, --quick under 2. A part (experts, mla) of which a check fails is not timed, and the
exit status is 1; the checks' inputs follow from --seed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from teacher.kernels.arguments import obstacle
from tests.bench.kernels_timing import FP8_PEAK, Bench, Ceilings, Row

PARTS = ("experts", "mla")


def about(commit: str | None, command: str = "tests.bench.kernels") -> dict[str, str]:
    """Where and with what the figures came to be."""
    import triton

    def said(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    gpu, driver = said("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").split(", ")
    return {
        "gpu": gpu,
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit or said("git", "rev-parse", "--short", "HEAD"),
        "command": " ".join(["python -m", command, *sys.argv[1:]]),
    }


def line(row: Row, ceilings: Ceilings) -> str:
    """A row for people: against the ceiling that binds it."""
    if row.note and row.seconds != row.seconds:
        return f"{row.kernel:<22} {row.shape:<30} {row.by:<26} — {row.note}"
    spread = (row.high - row.low) / row.seconds
    arithmetic, traffic = row.flops / FP8_PEAK, row.bytes / ceilings.copy_bytes
    bound = (
        f"{arithmetic / row.seconds:6.1%} of FP8 peak"
        if arithmetic > traffic
        else f"{traffic / row.seconds:6.1%} of copy"
    )
    return (
        f"{row.kernel:<22} {row.shape:<30} {row.by:<26} {row.seconds * 1e6:10.1f} us ±{spread:4.0%} "
        f"{row.tflops:8.1f} TFLOP/s {row.terabytes:6.3f} TB/s {bound} {row.note}"
    )


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="tests.bench.kernels", description=__doc__, add_help=True)
    options.add_argument("--quick", action="store_true")
    options.add_argument("--json", type=Path)
    options.add_argument("--plot", type=Path, help="roofline; needs matplotlib")
    options.add_argument("--only", choices=PARTS)
    options.add_argument("--commit", help="name of the code under test, where git does not know it")
    options.add_argument("--seed", type=int, default=0, help="of the random inputs")
    chosen = options.parse_args(arguments)
    missing = obstacle(torch.device("cuda", 0)) if torch.cuda.is_available() else "torch sees no CUDA GPU"
    if missing is not None:
        print(f"tests.bench.kernels cannot run here: {missing}", file=sys.stderr)
        return 2
    torch.manual_seed(chosen.seed)
    bench = Bench(chosen.quick)
    parts = [importlib.import_module(f"tests.bench.kernels_{part}") for part in PARTS if chosen.only in (None, part)]
    found: dict[str, Any] = {"about": about(chosen.commit), "checks": [], "rows": []}
    print(json.dumps(found["about"]), flush=True)

    def keep() -> None:
        if chosen.json:
            chosen.json.write_text(json.dumps(found, indent=1) + "\n")

    failed, sound = 0, []
    for part in parts:
        before = failed
        for check in part.checks(bench):
            failed += not check.passed
            found["checks"].append({"name": check.name, "error": check.error, "bound": check.bound})
            print(
                f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.error:.2e} (bound {check.bound:.0e})",
                flush=True,
            )
            keep()
        if failed == before:
            sound.append(part)
        else:
            print(f"{failed - before} checks failed: {part.__name__} is not timed", flush=True)
    if not sound:
        return 1
    ceilings = Ceilings.measured(bench)
    found["ceilings"] = {"copy_tb_per_s": ceilings.copy_bytes / 1e12, "bf16_tflops": ceilings.bf16_flops / 1e12}
    print(
        f"copy {ceilings.copy_bytes / 1e12:.2f} TB/s, bf16 product {ceilings.bf16_flops / 1e12:.0f} TFLOP/s", flush=True
    )
    for part in sound:
        for row in part.rows(bench):
            found["rows"].append(row.as_dict())
            print(line(row, ceilings), flush=True)
            keep()
    if chosen.plot:
        from tests.bench.kernels_roofline import draw

        draw(found, chosen.plot)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
