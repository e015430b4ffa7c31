"""Our side of tests/bench/traces.py: the real trace stage on a run folder, as a child process.

    python -m tests.bench.traces_ours URL FOLDER CONCURRENCY [--stream]

FOLDER is made by make_folder: a run folder whose problems are there and whose traces are not (or not all). The child
does what `distill traces` does after its imports: folder locked, inputs hashed, finished samples indexed, everything
asked, verified on the way and written durably, and the table at the end.
"""

import argparse
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.traces_children import MAX_TOKENS, MODEL, SAMPLING, Channel

if TYPE_CHECKING:
    from distill.recipe import Recipe

# What the stage imports when it needs it: the other sides too are timed from when their imports are done.
LATER = ("distill.endpoints", "distill.judging", "distill.traces", "pandas", "pyarrow.parquet", "rich.progress")


def make_recipe(url: str, stream: bool, concurrency: int, samples: int = 1, verify: bool = True) -> "Recipe":
    from distill.recipe import Recipe

    # Adaptive sampling verifies each sample as it comes; its cap leaves the number of samples as it is.
    adaptive = {"verified": samples, "most": samples} if verify else None

    return Recipe.model_validate(
        {
            "name": "bench",
            "problems": {"source": "bench.jsonl"},
            "teacher": {
                "kind": "endpoint", "model": MODEL, "stream": stream,
                "endpoints": [{"url": url, "concurrency": concurrency}],
            },
            "sampling": {**SAMPLING, "max_tokens": MAX_TOKENS, "samples": samples, "adaptive": adaptive},
            "filters": {"correctness": {}},
            "students": [{"name": "student", "base": "tiny-qwen"}],
            "evals": {"tasks": ["gsm8k_r1"], "teacher": False},
        }
    )  # fmt: skip


def make_folder(folder: Path, problems: int) -> None:
    """A run folder with that many sums to add, as the problems stage would leave it."""
    from distill.jsonl import write_jsonl_atomic
    from distill.problems import problem_hash

    def rows():  # type: ignore[no-untyped-def]
        for number in range(problems):
            text = f"What is {number} plus 7?"
            yield {
                "id": problem_hash(text)[:16], "problem": text, "answer": str(number + 7), "kind": "math",
                "source": "bench.jsonl", "meta": {},
            }  # fmt: skip

    folder.mkdir(parents=True)
    write_jsonl_atomic(folder / "problems.jsonl", rows())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("folder", type=Path)
    parser.add_argument("concurrency", type=int)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--no-verify", dest="verify", action="store_false")
    options = parser.parse_args()
    channel = Channel()
    from distill.manifest import Manifest
    from distill.pipeline import run_stages

    for name in LATER:
        importlib.import_module(name)
    recipe = make_recipe(options.url, options.stream, options.concurrency, options.samples, options.verify)
    channel.ready()
    run_stages(["traces"], recipe, options.folder)
    channel.done(finished=Manifest(options.folder / "manifest.json").stage("traces")["made"])


if __name__ == "__main__":
    main()
