"""The worker itself, on a package `vllm` that has no more than the worker uses: replies, errors, deaths, orphans."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from distill.serving.engine_process import EngineProcess

FAKE = {
    "__init__.py": """
        class SamplingParams:
            def __init__(self, **settings):
                if settings["max_tokens"] < 1:
                    raise ValueError("max_tokens must be at least 1")
                self.__dict__.update(settings)
    """,
    "sampling_params.py": "class RequestOutputKind: FINAL_ONLY = 2",
    "platforms.py": "class current_platform: is_cpu = staticmethod(lambda: False)",
    "engine/arg_utils.py": """
        from dataclasses import dataclass
        @dataclass
        class AsyncEngineArgs:
            model: str
            max_model_len: int = 64
    """,
    "v1/engine/exceptions.py": "class EngineDeadError(Exception): pass",
    "v1/engine/async_llm.py": """
        import asyncio, subprocess, sys
        from types import SimpleNamespace as Made
        from vllm.v1.engine.exceptions import EngineDeadError
        class AsyncLLM:
            @classmethod
            def from_engine_args(cls, arguments):
                self = cls()
                self.model_config = arguments
                print("printed by vLLM, and no reply")
                self.core = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
                return self
            async def generate(self, prompt, settings, request):
                await asyncio.sleep(0.05)
                if settings.seed == 13:
                    raise EngineDeadError("EngineCore encountered an issue.")
                flat = Made(start_indices=[0], end_indices=[2], token_ids=[5, 6], logprobs=[-1.5, -0.5])
                done = Made(token_ids=prompt["prompt_token_ids"], finish_reason="stop", logprobs=flat)
                yield Made(outputs=[done])
    """,
}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    for name, text in FAKE.items():
        path = tmp_path / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def ask(name, **changed):
    settings = {"temperature": 0, "top_p": 1, "seed": 0, "max_tokens": 9, "stop": [1], "logprobs": 0}
    return {"id": name, "request": name, "prompt": [7, 8], **settings, **changed}


def until(engine, enough):
    come, end = [], time.monotonic() + 30
    while not enough(come):
        assert time.monotonic() < end and not engine.ended, (come, engine.last_words())
        come += engine.receive(0.1)
    return come


def gone(group, seconds=5):
    """Every process of the group, but for those that nobody has reaped yet."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        states = subprocess.run(["ps", "-o", "state=", "-g", str(group)], capture_output=True, text=True).stdout.split()
        if all(state.startswith("Z") for state in states):
            return True
        time.sleep(0.05)
    return False


def test_replies_and_refusals(fake):
    engine = EngineProcess(sys.executable, {"model": "m", "max_model_len": 32})
    try:
        engine.send([ask("a"), ask("b", logprobs=1), ask("c", max_tokens=0)])
        messages = until(engine, lambda come: len(come) == 4)
        assert messages[0] == {"ready": {"max_model_len": 32}}
        by_id = {message["id"]: message for message in messages[1:]}
        assert by_id["a"]["tokens"] == [7, 8] and by_id["a"]["finish"] == "stop" and by_id["a"]["seconds"] > 0.04
        assert "logprobs" not in by_id["a"]
        assert by_id["b"]["logprobs"] == {"tokens": [[6]], "logprobs": [[-0.5]]}
        assert by_id["c"] == {"id": "c", "error": "ValueError: max_tokens must be at least 1"}
    finally:
        engine.kill()
    assert gone(engine.pid)


@pytest.mark.parametrize(
    ("arguments", "asks", "says"),
    [
        (
            {"model": "m", "tensor_paralel_size": 2},
            [],
            "TypeError: .*unexpected keyword argument 'tensor_paralel_size'",
        ),
        ({"model": "m"}, [ask("x", seed=13)], "EngineDeadError: EngineCore encountered an issue"),
    ],
)
def test_a_death_is_told_and_takes_all_processes_along(fake, arguments, asks, says):
    engine = EngineProcess(sys.executable, arguments)
    engine.send(asks)
    end = time.monotonic() + 30
    while not engine.ended:
        engine.receive(0.1)
        assert time.monotonic() < end
    assert re.search(says, engine.last_words())
    assert gone(engine.pid)


def test_whoever_asked_is_killed_and_nothing_outlives_it(fake):
    program = (
        "import sys, time; from distill.serving.engine_process import EngineProcess\n"
        "engine = EngineProcess(sys.executable, {'model': 'm'})\n"
        "while not engine.receive(0.1): pass\n"
        "print(engine.pid, flush=True); time.sleep(600)"
    )
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[3]}{os.pathsep}{os.environ['PYTHONPATH']}"}
    asker = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    group = int(asker.stdout.readline())
    assert not gone(group, 0.2)
    asker.send_signal(signal.SIGKILL)
    asker.wait()
    assert gone(group)
