"""teacher.kind 'vllm' against a worker without vLLM in it; the real one is in test_vllm.py."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from distill.errors import UserError
from distill.recipe import Sampling, Teacher
from distill.records import Ask
from distill.rendering import ChatTokenizer
from distill.serving.engine_process import EngineProcess
from distill.serving.worker import likeliest, on_cpu
from distill.shipped import resolve_model
from distill.vllm_identity import pinned
from distill.vllm_teacher import EngineDied, VllmTeacher, identity, open_vllm

STUB = Path(__file__).with_name("stub_worker.py")
ASK = [{"role": "user", "content": "12 + 30 ="}]


class Listed:
    """A fixed list of asks, as distill.records.Asks."""

    def __init__(self, asks):
        self.asks, self.most = list(asks), 0

    def take(self, most):
        taken, self.asks = self.asks[:most], self.asks[most:]
        return taken

    @property
    def closed(self):
        return not self.asks


def asks(count, seed=0, **changed):
    settings = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 100, "seed": seed, **changed}
    return [Ask(f"{seed}-{number}", ASK, **settings) for number in range(count)]


@pytest.fixture(scope="module")
def chat():
    return ChatTokenizer("tiny-r1")


@pytest.fixture
def make(tmp_path, chat):
    """A teacher on the stub; `pids` collects the processes that it started."""
    marker = tmp_path / "once"
    marker.touch()

    def build(length=64, attempts=3, **arguments):
        teacher = Teacher(kind="vllm", model="tiny-r1", batch_size=8, attempts=attempts)
        build.pids = []

        def start():
            engine = EngineProcess(
                sys.executable, {"max_model_len": length, "marker": str(marker), **arguments}, worker=STUB
            )
            build.pids.append(engine.pid)
            return engine

        return VllmTeacher("stub@0", chat, (399,), length, start, teacher)

    yield build
    for pid in getattr(build, "pids", []):
        with pytest.raises(ProcessLookupError):
            os.killpg(pid, 0)


def test_every_ask_gets_one_reply_as_the_engine_has_room(make, chat):
    source = Listed(asks(50))
    teacher = make()
    batches = list(teacher.generate(source))
    replies = [reply for batch in batches for reply in batch]
    assert sorted(reply.id for reply in replies) == sorted(ask.id for ask in asks(50))
    assert len([batch for batch in batches if batch]) > 1  # 50 asks do not fit into a room of 10
    text = chat.text(ASK)
    for reply in replies:
        assert (reply.text, reply.finish_reason, reply.attempts, reply.seconds) == (text, "stop", 1, 0.5)
        assert reply.prompt_tokens == reply.reasoning_tokens == len(chat.ids(ASK)) and reply.answer_tokens == 0


def test_an_engine_that_dies_costs_only_what_was_in_flight(make):
    teacher = make()
    wanted = asks(20) + asks(1, seed=13) + asks(20, seed=1)
    replies = [reply for batch in teacher.generate(Listed(wanted)) for reply in batch]
    assert sorted(reply.id for reply in replies) == sorted(ask.id for ask in wanted)
    assert {reply.finish_reason for reply in replies} == {"stop"}
    assert next(reply for reply in replies if reply.id == "13-0").attempts == 2
    assert teacher.states()["vllm"].errors == {"engine_died": 1} and len(make.pids) == 2


def test_an_ask_that_kills_the_engine_each_time_is_left_and_named(make):
    teacher = make(always=True)
    wanted = asks(6) + asks(1, seed=13)
    replies = {reply.id: reply for batch in teacher.generate(Listed(wanted)) for reply in batch}
    assert {name for name, reply in replies.items() if reply.finish_reason == "failed"} == {"13-0"}
    assert replies["13-0"].error == "engine_died: OutOfMemoryError: CUDA out of memory"
    assert replies["13-0"].attempts == 3 and len(make.pids) == 3


def test_an_engine_that_never_replies_is_given_up(make):
    wanted = [Ask(f"{number}", ASK, 0.6, 0.95, 100, seed=13) for number in range(24)]  # more than its room
    with pytest.raises(EngineDied, match=r"died 2 times without a reply.*CUDA out of memory"):
        list(make(always=True, attempts=1).generate(Listed(wanted)))


def test_an_engine_that_does_not_start_says_why(make):
    with pytest.raises(UserError, match=r"did not start: ValueError: not enough memory"):
        list(make(fail=True).generate(Listed(asks(3))))
    assert len(make.pids) == 1


@pytest.mark.parametrize(("seed", "says"), [(14, "engine: ValueError: no"), (15, "engine: abort")])
def test_an_ask_that_the_engine_refuses_fails_alone(make, seed, says):
    wanted = asks(2) + asks(1, seed=seed)
    replies = {reply.id: reply for batch in make().generate(Listed(wanted)) for reply in batch}
    refused = replies.pop(f"{seed}-0")
    assert (refused.finish_reason, refused.error, refused.attempts) == ("failed", says, 3)
    assert {reply.finish_reason for reply in replies.values()} == {"stop"} and len(replies) == 2


def test_closing_ends_the_engine_and_all_of_its_group(make):
    running = make().generate(Listed(asks(100)))
    while not next(running):
        pass
    running.close()  # the fixture looks for what is left


def test_prompts_that_fill_the_context_are_not_sent(make, chat):
    length = len(chat.ids(ASK))
    teacher = make(length=length)
    [reply] = [reply for batch in teacher.generate(Listed(asks(1))) for reply in batch]
    assert (reply.finish_reason, reply.prompt_tokens, reply.text) == ("prompt_too_long", length, "")
    assert make.pids == []
    [reply] = [reply for batch in make(length=length + 1).generate(Listed(asks(1))) for reply in batch]
    assert (reply.finish_reason, reply.answer_tokens + reply.reasoning_tokens) == ("empty", 0)


def test_logprobs_stand_beside_the_text_without_the_end(make):
    [reply] = [reply for batch in make().generate(Listed(asks(1, logprobs=1))) for reply in batch]
    assert len(reply.logprobs.tokens) == len(reply.logprobs.chosen) == reply.reasoning_tokens
    assert [token for [token] in reply.logprobs.tokens] == list(reply.logprobs.chosen)


def test_likeliest_come_first_and_the_drawn_one_only_if_it_is_one():
    class Flat:
        start_indices, end_indices = [0, 3], [3, 5]
        token_ids, logprobs = [9, 4, 5, 4, 5], [-7.0, -0.1, -2.5, -0.2, -1.9]

    assert likeliest(Flat, 2) == {"tokens": [[4, 5], [4, 5]], "logprobs": [[-0.1, -2.5], [-0.2, -1.9]]}


def test_a_cpu_gets_what_keeps_it_right():
    """The rotary op that eager DeepSeek must not use there, and ordinary attention for unpublished latent sizes."""
    arguments, environment = on_cpu({"enforce_eager": True}, (32, 16))
    assert arguments["compilation_config"]["custom_ops"] == ["all", "-rotary_embedding"]
    assert environment == {"VLLM_MLA_DISABLE": "1"} and arguments["kv_cache_memory_bytes"] > 0
    said = {"enforce_eager": True, "compilation_config": {"custom_ops": ["none"]}, "gpu_memory_utilization": 0.5}
    assert on_cpu(said, (512, 64)) == (said, {}) and on_cpu(said, None) == (said, {})
    assert "compilation_config" not in on_cpu({}, None)[0]


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(resolve_model("tiny-r1"), tmp_path / "model"))


def identified(folder, **vllm):
    return identity(Teacher(kind="vllm", model=str(folder), vllm=vllm))["id"]


def test_the_id_is_the_models_and_changes_with_it(folder):
    first = identified(folder)
    assert first == identified(folder) and first.startswith("model@")
    (folder / "README.md").write_text("another card")
    assert identified(folder) == first
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # equal header, equal size
    weights.write_bytes(data)
    other = identified(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert len({first, other, identified(folder), identified(folder, quantization="fp8")}) == 4


def test_the_id_names_what_makes_the_same_model_write_something_else(folder):
    def of(**settings):
        return identity(Teacher.model_validate({"kind": "vllm", "model": str(folder), **settings}))["id"]

    usual = of()
    assert usual == of(think="force") == of(tokenizer=str(folder)) == of(vllm={"tensor_parallel": 2})
    assert of(think="leave", dtype="float32") == f"{usual}+think=leave+dtype=float32"
    assert of(vllm={"kv_cache_dtype": "fp8"}, tokenizer="o/t") == f"{usual}+kv_cache_dtype=fp8+tokenizer=o/t"


def test_the_id_of_a_hub_model_is_the_commit(monkeypatch):
    seen = []

    def download(name, file, revision):
        seen.append((name, file, revision))
        return f"/cache/models--o--m/snapshots/{'ab' * 20}/{file}"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    teacher = Teacher(kind="vllm", model="o/m", revision="v1")
    assert identity(teacher)["id"] == "o/m@abababababab" and seen == [("o/m", "config.json", "v1")]
    assert pinned(teacher).revision == "ab" * 20  # what is loaded is that commit, should v1 move meanwhile
    assert pinned(Teacher(kind="vllm", model="tiny-r1")).revision is None


def test_without_vllm_the_cure_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distill.serving.interpreter._BUILT", Path("none/bin/python"))
    sampling = Sampling(samples=1, max_tokens=64)
    with pytest.raises(UserError, match=r"make vllm.*teacher\.vllm\.python=PYTHON"):
        open_vllm(Teacher(kind="vllm", model="tiny-r1"), sampling)
    with pytest.raises(UserError, match=r"'.*' has no vLLM; `make vllm`"):
        open_vllm(Teacher(kind="vllm", model="tiny-r1", vllm={"python": sys.executable}), sampling)
    with pytest.raises(UserError, match=r"'/no/python' does not run"):
        open_vllm(Teacher(kind="vllm", model="tiny-r1", vllm={"python": "/no/python"}), sampling)
