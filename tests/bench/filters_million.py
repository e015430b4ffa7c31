"""Memory and disk at a million traces: a foreign JSONL imported, judged by every filter but code and judge, selected.

    OMP_NUM_THREADS=1 python -m tests.bench.filters_million [--traces 1000000] [--chars 1000] [--folder DIR]

Four samples a problem. A trace is made of paragraphs of real ones (DISTILL_DATA, default ../shared/data), about
`--chars` characters of reasoning, none like another; a problem is a real one with a number. Import and filter stage run
in processes of their own, on 2 workers. Printed for each: seconds, traces a second, peak memory of the process and of
its largest worker; at the end what lies on the disk, about 9 kB a trace of 1,000 characters while it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.filters import ALL, DATA, Clock, peaks, rows

SAMPLES = 4


def write_source(path: Path, count: int, chars: int) -> None:
    """JSON lines as others publish them: prompt, answer, response with think tags."""
    real = [row for row in rows("traces/r1_normal.jsonl.gz") if "</think>" in row["response"]]
    parts = [part for row in real for part in row["response"].partition("</think>")[0].split("\n\n")]
    pick = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            row = real[number // SAMPLES % len(real)]
            case = f"(Case {number // SAMPLES}.)"
            reasoning, size = [case], 0
            while size < chars:
                reasoning.append(pick.choice(parts))
                size += len(reasoning[-1])
            answer = row["response"].partition("</think>")[2].strip()
            text = "<think>\n" + "\n\n".join(reasoning) + f"\n</think>\n\n{answer}"
            line = {"prompt": f"{row['prompt']} {case}", "answer": row["answer"], "response": text}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_recipe(folder: Path) -> Path:
    against = [{"source": str(DATA / "benchmarks" / name)} for name in ("math500.jsonl", "aime24.jsonl", "amc23.jsonl")]
    fields = {"problem": "prompt", "answer": "answer", "text": "response"}
    recipe = {
        "name": "million",
        "traces": [{"source": str(folder / "source.jsonl"), "fields": fields}],
        "filters": {name: {} for name in ALL} | {"decontamination": {"against": against}},
        "selection": {"per_problem": 1, "choose": "random", "validation_fraction": 0.01},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def stage(name: str, folder: Path, count: int) -> None:
    """One stage in this process."""
    from distill import filtering
    from distill.foreign import importing
    from distill.recipe_load import load_recipe
    from distill.runfolder import RunFolder

    recipe = load_recipe(folder / "recipe.yaml")
    with RunFolder.open(folder / "run", recipe) as run, Clock() as clock:
        if name == "import":
            facts = importing.run(recipe, run)
            done = f"{facts['problems']} problems"
        else:
            facts = filtering.run(recipe, run, workers=2)
            done = f"{facts['judged']} verdicts, {facts['accepted']} accepted"
    print(
        f"{name}: {count} traces in {clock.wall:,.0f} s, {clock.says(count, 'traces')}; {done}; {peaks()}", flush=True
    )


def on_disk(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory at a million traces; see the module's text.")
    parser.add_argument("--traces", type=int, default=1_000_000)
    parser.add_argument("--chars", type=int, default=1000, help="least length of a reasoning")
    parser.add_argument(
        "--folder", default=None, help="where there is room; the system's temporary folder if not given"
    )
    parser.add_argument("--stage")
    chosen = parser.parse_args()
    if chosen.stage:
        return stage(chosen.stage, Path(chosen.folder), chosen.traces)
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        with Clock() as clock:
            write_source(folder / "source.jsonl", chosen.traces, chosen.chars)
        write_recipe(folder)
        size = (folder / "source.jsonl").stat().st_size
        print(f"source: {size / 1e9:.2f} GB, {size / chosen.traces / 1000:.1f} kB a trace, in {clock.wall:,.0f} s")
        for stage_name in ("import", "filter"):
            command = [sys.executable, "-m", "tests.bench.filters_million", "--stage", stage_name]
            subprocess.run([*command, "--folder", name, "--traces", str(chosen.traces)], check=True, env=os.environ)
        run = folder / "run"
        parts = {path.name: path.stat().st_size if path.is_file() else on_disk(path) for path in sorted(run.iterdir())}
        told = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in parts.items() if size > 1e6)
        print(f"disk, GB: source {size / 1e9:.2f}, run folder {on_disk(run) / 1e9:.2f} ({told})")


if __name__ == "__main__":
    main()
