"""`distill teacher serve` as a process: what it says, what tiny-r1 answers, and how it ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx2
import openai
import pytest

from teacher.native.build import obstacle
from tests import tiny

KEY = "open sesame"
ASK = [{"role": "user", "content": "State the final answer to the following arithmetic problem: 12 + 30 ="}]


class Server:
    def __init__(self, *arguments, key=KEY):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DISTILL_API_KEY": key}
        command = [sys.executable, "-m", "distill", "teacher", "serve", *arguments, "--port", "0"]
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        self.lines = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)
        self._reader.start()
        end = time.monotonic() + 120
        while len(self.lines) < 2:
            assert self.process.poll() is None and time.monotonic() < end, self.lines
            time.sleep(0.02)
        self.url = re.search(r"listens on (\S+)/v1 ", self.lines[0])[1]
        self.client = openai.OpenAI(base_url=self.url + "/v1", api_key=key or "none", max_retries=0)

    def end(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        self.process.wait(30)
        self._reader.join(10)
        return self.process.returncode


@contextmanager
def serving(*arguments, **options):
    server = Server(*arguments, **options)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def tiny_r1():
    with serving("tiny-r1") as server:
        yield server
        assert server.end(signal.SIGINT) == 0  # Ctrl-C is no failure
        assert server.lines[-1] == "stopped\n"


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory):
    return str(tiny.write_teacher(tmp_path_factory.mktemp("random"), max_position_embeddings=65536, rope_scaling=None))


def test_it_says_where_it_listens_and_how_to_ask(tiny_r1):
    assert re.match(
        r"tiny-r1 listens on http://127\.0\.0\.1:\d+/v1 \(2048 tokens a sequence, 256 seq", tiny_r1.lines[0]
    )
    # The checkpoint is in bfloat16; unless told otherwise, it runs in what is fastest here.
    assert tiny_r1.lines[0].rstrip().endswith(", in C)" if obstacle() is None else ", in torch)")
    example = tiny_r1.lines[1].removeprefix("try: ")
    asked = subprocess.run(
        example, shell=True, env=os.environ | {"DISTILL_API_KEY": KEY}, capture_output=True, text=True
    )
    assert '"chat.completion"' in asked.stdout, asked
    assert not any(KEY in line for line in tiny_r1.lines)


def test_reasoning_apart_from_the_answer_whole_and_streamed(tiny_r1):
    call = {"model": "tiny-r1", "messages": ASK, "temperature": 0}
    reply = tiny_r1.client.chat.completions.create(**call)
    message, usage = reply.choices[0].message, reply.usage
    assert (message.content, reply.choices[0].finish_reason) == ("The answer is \\boxed{42}", "stop")
    assert message.reasoning_content == message.reasoning != ""
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens

    sides = {"reasoning_content": "", "content": ""}
    chunks = list(tiny_r1.client.chat.completions.create(**call, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks:
        for choice in chunk.choices:
            for side in sides:
                sides[side] += getattr(choice.delta, side, None) or ""
    assert sides == {"reasoning_content": message.reasoning_content, "content": message.content}
    assert chunks[-1].usage.completion_tokens_details == usage.completion_tokens_details
    # The answer alone, as text after the tag, is as many tokens as the usage leaves: with the two newlines and the end.
    raw = tiny_r1.client.completions.create(
        model="tiny-r1", prompt=f"<｜begin▁of▁sentence｜><｜User｜>{ASK[0]['content']}<｜Assistant｜><think>\n",
        temperature=0, max_tokens=1000, extra_body={"add_special_tokens": False}, logprobs=0,
    )  # fmt: skip
    assert raw.choices[0].text == f"{message.reasoning_content}\n</think>\n\n{message.content}"
    tag = raw.choices[0].logprobs.tokens.index("</think>")
    assert tag + 1 == usage.completion_tokens_details.reasoning_tokens
    assert raw.usage.completion_tokens == usage.completion_tokens


def test_a_reply_cut_off_while_thinking_has_no_content(tiny_r1):
    reply = tiny_r1.client.chat.completions.create(model="tiny-r1", messages=ASK, max_tokens=5)
    message = reply.choices[0].message
    assert (message.content, reply.choices[0].finish_reason) == ("", "length")
    assert message.reasoning_content
    assert reply.usage.completion_tokens_details.reasoning_tokens == reply.usage.completion_tokens == 5


def test_without_settings_it_samples_as_generation_config_says(tiny_r1):
    """tiny-r1's: temperature 0.6, top-p 0.95."""
    call = {"model": "tiny-r1", "messages": ASK, "seed": 5, "n": 4}
    default, same, other = (
        [choice.message.reasoning for choice in tiny_r1.client.chat.completions.create(**call, **settings).choices]
        for settings in ({}, {"temperature": 0.6, "top_p": 0.95}, {"temperature": 2.0, "top_p": 1.0, "max_tokens": 200})
    )
    assert default == same != other


def test_sigterm_lets_short_calls_end_and_cuts_long_ones_off(random_folder):
    with serving(random_folder, "--grace", "3", "--served-model-name", "it", key="") as server:
        body = {"messages": [{"role": "user", "content": "x"}], "ignore_eos": True, "stream": True}
        texts = {}

        def read(name, max_tokens):
            with httpx2.stream("POST", f"{server.url}/v1/chat/completions", json=body | {"max_tokens": max_tokens},
                               timeout=30) as reply:  # fmt: skip
                texts[name] = ""
                for piece in reply.iter_text():
                    texts[name] += piece

        threads = [threading.Thread(target=read, args=call) for call in (("short", 100), ("long", 60_000))]
        for thread in threads:
            thread.start()
        while len(texts) < 2:
            time.sleep(0.01)
        start = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - start < 15
        for thread in threads:
            thread.join(10)
        assert texts["short"].endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in texts["short"]
        assert '"code":"shutting_down"' in texts["long"]
        assert server.lines[-1] == "stopped\n"
        assert not any("Traceback" in line for line in server.lines)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["no-such-model"], 2, "MODEL: 'no-such-model' is neither a folder nor a shipped model"),
        (["tiny-r1", "--host", "192.0.2.1"], 1, "cannot listen on 192.0.2.1 port 0"),
        (["tiny-r1", "--reasoning-parser", "qwen"], 2, "reasoning-parser"),
    ],
)
def test_what_cannot_be_served_is_one_line(arguments, code, says):
    command = [sys.executable, "-m", "distill", "teacher", "serve", "--port", "0", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == code
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_port_that_is_taken_is_told_before_anything_loads():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "distill", "teacher", "serve", "tiny-r1", "--port", port]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in ended.stderr
