"""A run folder with a million finished samples, as a run that was stopped leaves it, to measure how fast it goes on."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from tests.bench.traces_ours import make_folder, make_recipe
from tests.bench.traces_sides import Child, Watch, tree_cpu

SAMPLES = 4
_REASONING = "Let me add these digit by digit, right to left, and carry where a sum passes nine. Wait, check again. "


def fill(folder: Path, url: str, finished: int) -> int:
    """`finished` traces of the recipe's own ids, 1 to 2 kB a line; returns the bytes of a line on average."""
    from distill.generation.plan import Planner
    from distill.problems import read_problems
    from distill.traces import identify_teacher

    recipe = make_recipe(url, False, 64, SAMPLES, verify=False)
    identity = identify_teacher(recipe.teacher)["id"]
    planner = Planner(recipe, identity)
    reasoning = (_REASONING * 5).strip()
    settings = planner.record(0)
    tail = json.dumps({"seconds": 0.5, "cost": 0.0, "teacher": identity, "sampling": settings})[1:]
    written = 0
    (folder / "traces").mkdir()
    with open(folder / "traces" / "traces.jsonl", "w", encoding="utf-8", buffering=1 << 22) as file:
        for problem in read_problems(folder / "problems.jsonl"):
            asked = json.dumps(planner.ask(problem, 0, 0).messages)
            response = f"The sum is \\\\boxed{{{problem['answer']}}}"
            for sample, number in enumerate(planner.ids(problem, 0, SAMPLES)):
                if written == finished:
                    break
                file.write(
                    f'{{"id": "{number:016x}", "problem_id": "{problem["id"]}", "sample": {sample}, '
                    f'"messages": {asked}, "reasoning": "{reasoning}", "response": "{response}", '
                    '"finish_reason": "stop", "prompt_tokens": 40, "reasoning_tokens": 120, "answer_tokens": 12, '
                    f'"text": "{reasoning}\\n</think>\\n\\n{response}", {tail}\n'
                )
                written += 1
        size = file.tell()
    assert written == finished, f"the folder has problems for {written} samples only"
    return size // finished


def measure_resume(command: list[str], folder: Path, limit: float) -> dict[str, Any]:
    """Seconds from the start of the stage until the first new trace is on the disk, and the most memory until then."""
    traces = folder / "traces" / "traces.jsonl"
    before = traces.stat().st_size
    with Child(command) as child, Watch(child.tree) as watch:
        child.line(120.0)
        start, cpu = time.perf_counter(), tree_cpu(child.tree)
        child.go()
        while traces.stat().st_size <= before:  # less: a torn tail was cut
            if child.process.poll() is not None or time.perf_counter() - start > limit:
                child.line(0.0)  # raises SideFailed with what it said
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "cpu": tree_cpu(child.tree) - cpu, "memory": watch.most}


def resume(command: list[str], folder: Path, url: str, finished: int, limit: float = 120.0) -> dict[str, Any]:
    """Make the folder, start on it twice (without and with the index that the first start leaves), remove it."""
    begun = time.perf_counter()
    make_folder(folder, finished // SAMPLES + 2000)
    line = fill(folder, url, finished)
    made = time.perf_counter() - begun
    try:
        first = measure_resume(command, folder, limit)
        return {"line_bytes": line, "made_in": made, "first": first, "again": measure_resume(command, folder, limit)}
    finally:
        shutil.rmtree(folder)
