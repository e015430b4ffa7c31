"""Which Config serves MLA decode best: the sweep behind teacher/kernels/mla_decode.py's CONFIGS.

    python -m tests.bench.kernels_mla_tune [--json FILE]         all forms, on a Hopper GPU
    python -m tests.bench.kernels_mla_tune --compile 3/16        only compile every 16th from the third on (in parallel)

Every configuration is first held to the reference, then timed as tests.bench.kernels times, at 64 sequences of 8,192
tokens. One that does not fit into an SM's shared memory says so.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import torch

from teacher.kernels.mla_decode import Config, mla_decode
from tests.bench.kernels_mla import SCALE, _bound, _caches
from tests.bench.kernels_timing import Bench
from tests.teacher.kernels.mla_cases import Case, error

ROWS, CONTEXT = 64, 8192
FORMS = {16: (16, 1), 32: (16, 2), 64: (128, 1)}  # queries of a program: heads, tokens


def candidates() -> list[tuple[bool, int, Config]]:
    bf16 = {
        16: [(32, 4, 2, 4), (64, 4, 2, 2), (32, 4, 5, 2), (64, 8, 2, 2), (16, 4, 5, 3), (32, 8, 2, 2), (64, 4, 5, 1)],
        32: [(32, 4, 2, 2), (32, 4, 5, 2), (64, 8, 2, 1), (32, 8, 5, 1)],
        64: [(64, 8, 2, 1), (64, 8, 3, 1), (32, 8, 5, 1)],
    }
    fp8 = {
        16: [(32, 4, 2, 2), (32, 4, 5, 2), (16, 2, 2, 4), (64, 8, 5, 1), (64, 8, 2, 1), (64, 4, 2, 2), (16, 4, 5, 2)],
        32: [(32, 4, 3, 2), (64, 8, 3, 1), (32, 8, 5, 1)],
        64: [(64, 8, 2, 1), (64, 8, 3, 1), (64, 8, 5, 1)],
    }
    return [
        (kind, queries, Config(*config))
        for kind, forms in ((False, bf16), (True, fp8))
        for queries, configs in forms.items()
        for config in configs
    ]


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--json", type=Path)
    options.add_argument("--compile")
    chosen = options.parse_args()
    cases = {
        (fp8, m): Case([1, 65, 700], heads, tokens, fp8=fp8)
        for fp8, (m, (heads, tokens)) in product((False, True), FORMS.items())
    }
    errors: dict[tuple[bool, int, Config], float | str] = {}
    first, every = map(int, chosen.compile.split("/")) if chosen.compile else (0, 1)
    for candidate in candidates()[first::every]:
        fp8, m, config = candidate
        try:
            case = cases[fp8, m]
            errors[candidate] = error(case.run(config=config, splits=3), case.reference())
        except Exception as refused:  # too much shared memory: the compiler's answer
            errors[candidate] = str(refused).splitlines()[0][:80]
    if chosen.compile:
        return
    bench = Bench(quick=True)
    sets = [_caches(ROWS, CONTEXT) for _ in range(2)]
    rows: list[dict[str, Any]] = []
    for candidate, wrong in errors.items():
        fp8, m, config = candidate
        row = {"fp8": fp8, "queries": m, **config._asdict(), "error": wrong}
        rows.append(row)
        if isinstance(wrong, str):
            continue
        heads, tokens = FORMS[m]
        query = torch.randn(ROWS, tokens, heads, 576, device="cuda").bfloat16()
        position = torch.arange(CONTEXT - tokens, CONTEXT, device="cuda").expand(ROWS, -1).contiguous()
        makes = [
            _bound(
                _configured, config, query[..., :512], query[..., 512:], caches[int(fp8)], caches[2], position, SCALE
            )
            for caches in sets
        ]  # fmt: skip
        size = ROWS * CONTEXT * (656 if fp8 else 1152)
        flops = 2 * ROWS * tokens * heads * CONTEXT * 1088
        measured = bench.measure("mla decode", "", "ours", flops, size, makes)
        row |= {"us": measured.seconds * 1e6, "tb_per_s": measured.terabytes, "tflops": measured.tflops}
    for row in sorted(rows, key=lambda row: (row["fp8"], row["queries"], row.get("us", 1e9))):
        print(json.dumps(row))
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=1) + "\n")


def _configured(config: Config, *arguments: Any) -> torch.Tensor:
    return mla_decode(*arguments, config=config)


if __name__ == "__main__":
    main()
