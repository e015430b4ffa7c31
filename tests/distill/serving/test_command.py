"""From model, recipe and GPUs to vLLM's arguments. There is no GPU here: their number and memory are told."""

import json
import os
import stat
import subprocess
import sys

import pytest

from distill.errors import UserError
from distill.recipe import Sampling, Teacher
from distill.recipe_load import load_recipe
from distill.serving.arguments import as_flags
from distill.serving.command import Listening, plan
from distill.serving.gpus import gpu_memories
from distill.serving.model import read_facts
from distill.serving.placement import Placement, place

GB = 10**9
H100, H200 = [80 * GB] * 8, [141 * GB] * 8
R1 = "deepseek-ai/DeepSeek-R1"
SAMPLING = Sampling(samples=1)  # 32,768 tokens


def placed(model, gpus, length=36864, nodes=1, **vllm):
    return place(read_facts(str(model)), Teacher(kind="vllm", model="m", vllm=vllm).vllm, gpus, length, nodes)


def planned(gpus, nodes=1, sampling=SAMPLING, model=R1, **vllm):
    return plan(Teacher(kind="vllm", model=model, vllm=vllm), sampling, Listening(), gpus, nodes)


@pytest.fixture
def dense(tmp_path):
    """A 7B LLaMA as far as its config and the size of its (sparse) file go: 13.5 GB."""
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_hidden_layers": 32, "max_position_embeddings": 131072,
    }))  # fmt: skip
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(int(13.5 * GB))
    return tmp_path


def test_the_facts_of_r1_are_known_without_a_network():
    """Bytes as the files on the hub have them: 688,574,839,360 with the MTP layer; the cache as vLLM counts it."""
    facts = read_facts(R1)
    assert (facts.context, facts.heads, facts.experts, facts.mtp_layers) == (163840, 128, True, 1)
    assert 670 * GB < facts.weights < 688_574_839_360 and facts.expert_weights / facts.weights > 0.95
    assert facts.cache_per_token == 61 * 576 * 2 and facts.latent == (512, 64)


def test_layouts_that_vllm_advises_for_r1():
    """Data and expert parallel on 8 H200 (its guide to DeepSeek-V3, for high load); tensor parallel within a node and
    pipeline parallel across for 2 × 8 H100 (its guide to scaling)."""
    assert placed(R1, H200) == Placement(1, 1, 8, True)
    assert placed(R1, H100, nodes=2) == Placement(8, 2, 1, True)
    assert placed(R1, H200, tensor_parallel=8) == Placement(8, 1, 1, True)
    assert placed(R1, H100, nodes=2, data_parallel=16) == Placement(1, 1, 16, True)
    # Eight sequences of this length leave no room for copies of attention.
    assert placed(R1, H200, length=65_536) == Placement(8, 1, 1, True)


def test_a_dense_model_is_copied_before_it_is_split(dense):
    assert placed(dense, H100) == Placement(1, 1, 8, False)
    assert placed(dense, [24 * GB] * 8, length=4096) == Placement(1, 1, 8, False)
    assert placed(dense, [24 * GB] * 8, length=32768) == Placement(4, 1, 2, False)
    assert placed(dense, [16 * GB], length=4096) == Placement(1, 1, 1, False)
    assert placed(dense, [24 * GB] * 3, length=4096) == Placement(1, 1, 3, False)
    assert placed(dense, []) == Placement(1, 1, 1, False)


@pytest.mark.parametrize(
    ("gpus", "vllm", "says"),
    [
        (H100, {}, "8 GPUs would need .* GiB each .* have 67 GiB"),
        (H200, {"tensor_parallel": 16}, "is 16, and there are 8 GPUs"),
        (H200, {"data_parallel": 16}, "is 16, and there are 8 GPUs"),
    ],
)
def test_what_does_not_fit_is_said(gpus, vllm, says):
    with pytest.raises(UserError, match=says):
        placed(R1, gpus, **vllm)


def test_the_command_for_one_node():
    assert planned(H200, speculate=1, kv_cache_dtype="fp8").text().split(" \\\n    ") == [
        "vllm serve deepseek-ai/DeepSeek-R1",
        "--data-parallel-size 8",
        "--enable-expert-parallel",
        "--kv-cache-dtype fp8",
        "--max-model-len 36864",
        "--max-num-seqs 32",
        """--speculative-config '{"method":"mtp","num_speculative_tokens":1}'""",
        "--host 127.0.0.1",
        "--port 8000",
        "--served-model-name deepseek-ai/DeepSeek-R1",
        "--reasoning-parser deepseek_r1",
    ]


def test_commands_for_two_nodes_go_through_ray():
    text = planned(H100, nodes=2).text()
    assert "--tensor-parallel-size 8" in text and "--pipeline-parallel-size 2" in text
    assert "--distributed-executor-backend ray" in text
    text = planned(H100, nodes=2, data_parallel=16).text()
    assert "--data-parallel-size 16" in text and "--data-parallel-backend ray" in text
    assert "--data-parallel-size-local 8" in text and "--tensor-parallel-size" not in text


def test_the_context_is_what_the_recipe_needs_within_the_models(dense):
    assert "--max-model-len 6096" in planned(H200, sampling=Sampling(samples=1, max_tokens=2000)).text()
    assert (
        "--max-model-len 163840"
        in planned(H200, sampling=Sampling(samples=1, max_tokens=200_000), tensor_parallel=8).text()
    )
    assert "--max-model-len 9000" in planned(H200, max_model_len=9000).text()
    with pytest.raises(UserError, match="200000 is more than the model's context of 163840"):
        planned(H200, max_model_len=200_000)


@pytest.mark.parametrize(
    ("vllm", "model", "says"),
    [
        ({"speculate": 1, "tensor_parallel": 4, "pipeline_parallel": 2}, R1, "MTP under pipeline parallelism"),
        ({"speculate": 1}, "tiny-qwen", "no multi-token prediction layer"),
        ({"args": {"trust_remote_code": True}}, R1, "trust_remote_code"),
        ({"args": {"trust-remote-code": True}}, R1, "trust_remote_code"),
        ({"args": {"api_key": "secret"}}, R1, "VLLM_API_KEY"),
    ],
)
def test_what_is_refused(vllm, model, says):
    with pytest.raises(UserError, match=says):
        planned(H200, model=model, **vllm)


def test_flags_of_every_kind():
    arguments = {
        "model": "m",
        "a_b": 1,
        "yes": True,
        "no": False,
        "many": ["x", "y z"],
        "deep": {"a": [1]},
        "none": None,
    }
    assert as_flags(arguments) == ["m", "--a-b", "1", "--yes", "--no-no", "--many", "x", "y z", "--deep", '{"a":[1]}']


def test_further_arguments_go_before_ours():
    text = planned(H200, args={"max_num_seqs": 7, "enable_chunked_prefill": False}).text()
    assert "--max-num-seqs 7" in text and text.count("--max-num-seqs") == 1 and "--no-enable-chunked-prefill" in text


def test_gpus_are_those_that_a_program_here_would_see(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\nfor n in 0 1 2 3; do echo "$n, GPU-a$n, $((80000 + n))"; done\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_memories() == [(80000 + n) * 2**20 for n in range(4)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-a0")
    assert gpu_memories() == [80000 * 2**20, 80002 * 2**20]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_memories() == []
    program.write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(UserError, match="nvidia-smi does not answer"):
        gpu_memories()


def serve(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "distill", "teacher", "serve", *arguments], capture_output=True, text=True, timeout=120
    )


def test_the_engine_is_chosen_by_what_is_served(tmp_path, dense):
    """A hub name and another architecture go to vLLM; what our engine is for does not, unless asked."""
    for model in (R1, str(dense)):
        done = serve(model, "--print", "--gpus", "8", "--gpu-memory", "141")
        assert done.returncode == 0 and done.stdout.startswith(f"vllm serve {model} \\\n"), done.stderr
    done = serve("tiny-r1", "--print")
    assert done.returncode == 2 and "--engine vllm" in done.stderr
    done = serve("tiny-r1", "--print", "--engine", "vllm", "teacher.vllm.args.enforce_eager=true")
    assert done.stdout.startswith("VLLM_MLA_DISABLE=1 vllm serve ") and "-rotary_embedding" in done.stdout
    assert "--served-model-name tiny-r1" in done.stdout
    done = serve(R1, "--nodes", "2", "--gpus", "8", "--gpu-memory", "80")
    assert done.returncode == 2 and "--script" in done.stderr


def test_the_shipped_recipes_differ_in_the_teacher_and_what_it_may_cost():
    r1, api = load_recipe("r1-vllm"), load_recipe("deepseek-api")
    apart = {"name", "teacher", "budget"}
    assert r1.model_dump(exclude=apart) == api.model_dump(exclude=apart)
    assert (r1.sampling.temperature, r1.sampling.top_p, r1.sampling.max_tokens) == (0.6, 0.95, 32768)
    here = load_recipe("r1-vllm", ["teacher.kind=vllm", "teacher.endpoints=[]"]).teacher
    assert here.vllm == r1.teacher.vllm
    assert plan(r1.teacher, r1.sampling, Listening(), H200).at == Placement(1, 1, 8, True)
