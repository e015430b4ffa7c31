"""One recipe, one teacher, four ways to it: 500 real GSM8K problems through `distill traces`, compared text by text.

    python -m tests.bench.teachers --problems gsm8k_test.jsonl --vllm .vllm/bin/python [--out FOLDER] [--count 500]

The ways differ in the recipe's `teacher` alone: the embedded engine, our server, vLLM's server (both behind kind
`endpoint`, started by `distill teacher serve`), and kind `vllm`. Replies are greedy in float32. Prints samples,
how they ended, tokens, seconds of the whole command with its loading, and how many replies equal the embedded ones.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).with_name("gsm8k_teachers.yaml")
_EAGER = "teacher.vllm.args={enforce_eager: true}"  # compiling would take longer than these 500 replies
_DISTILL = [sys.executable, "-m", "distill"]


@contextmanager
def server(*arguments: str) -> Iterator[str]:
    """`distill teacher serve tiny-r1` while the body runs; yields its base URL."""
    command = [*_DISTILL, "teacher", "serve", "tiny-r1", "--port", "0", "--dtype", "float32", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    said: list[str] = []
    try:
        for line in process.stderr:
            said.append(line)
            found = re.search(r"(?:listens on|ready after .*:) (http://\S+/v1)", line)
            if found:
                threading.Thread(target=said.extend, args=(process.stderr,), daemon=True).start()
                yield found[1]
                return
        raise SystemExit(f"the server did not start: {''.join(said[-5:])}")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def traces(way: str, arguments: argparse.Namespace, *teacher: str) -> dict[str, Any]:
    command = [
        *_DISTILL, "traces", str(RECIPE), f"name={way}", f"problems.source={arguments.problems}",
        f"problems.count={arguments.count}", *teacher, "--runs-dir", str(arguments.out),
    ]  # fmt: skip
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr[-2000:]}")
    seconds = time.monotonic() - start
    lines = (arguments.out / way / "traces" / "traces.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    manifest = json.loads((arguments.out / way / "manifest.json").read_text(encoding="utf-8"))
    return {"seconds": seconds, "rows": rows, "facts": manifest["stages"]["traces"]}


def table(ways: dict[str, dict[str, Any]]) -> str:
    texts = {
        way: {row["problem_id"]: (row["reasoning"], row["response"]) for row in got["rows"]}
        for way, got in ways.items()
    }
    first = next(iter(texts.values()))
    lines = [
        "| teacher | samples | ended | prompt tokens | tokens | command, s | tokens/s | texts equal to embedded |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way, got in ways.items():
        rows = got["rows"]
        ended = ", ".join(f"{reason} {n}" for reason, n in Counter(row["finish_reason"] for row in rows).most_common())
        tokens = sum(row["reasoning_tokens"] + row["answer_tokens"] for row in rows)
        prompt = sum(row["prompt_tokens"] for row in rows)
        equal = sum(first.get(problem) == text for problem, text in texts[way].items())
        lines.append(
            f"| {way} | {len(rows)} | {ended} | {prompt:,} | {tokens:,} | {got['seconds']:.0f} |"
            f" {tokens / got['seconds']:,.0f} | {equal} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", required=True, type=Path)
    parser.add_argument("--vllm", required=True, help="Python of an environment that has vLLM")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--count", type=int, default=500)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on a busy machine are slower than one
    arguments.out = arguments.out or Path(tempfile.mkdtemp(prefix="teachers-"))
    ways = {"embedded": traces("embedded", arguments, "teacher.kind=embedded")}
    with server() as url:
        ways["endpoint-ours"] = traces(
            "endpoint-ours", arguments, "teacher.kind=endpoint", f"teacher.endpoints=[{{url: {url}}}]"
        )
    with server("--engine", "vllm", "--vllm-python", arguments.vllm, _EAGER) as url:
        ways["endpoint-vllm"] = traces(
            "endpoint-vllm", arguments, "teacher.kind=endpoint", f"teacher.endpoints=[{{url: {url}}}]"
        )
    ways["vllm"] = traces("vllm", arguments, "teacher.kind=vllm", f"teacher.vllm.python={arguments.vllm}", _EAGER)
    print(table(ways))


if __name__ == "__main__":
    main()
