"""`--quantization distill_fp8` in vLLM's CPU build for real, with the plain definitions: against our own model."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from teacher import load_model
from teacher.fp8_training import fp8_products
from tests.tiny import deepseek_config

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[3]
# The entry point is found by the metadata of an installed package; here of a folder that says no more than that.
ENTRY_POINT = "[vllm.general_plugins]\ndistill_fp8 = teacher.vllm_plugin:register\n"
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
folder, quantization, prompts = json.loads(sys.argv[1])
llm = LLM(folder, quantization=quantization, dtype="float32", skip_tokenizer_init=True, enforce_eager=True,
          gpu_memory_utilization=0.3, max_model_len=256, enable_prefix_caching=False)
settings = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False, ignore_eos=True)
done = llm.generate([{"prompt_token_ids": ids} for ids in prompts], settings)
print("RESULT", json.dumps([[next(iter(at.values())).logprob for at in one.prompt_logprobs[1:]] for one in done]))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model, in block FP8 and with the same weights dequantised. Sizes are such as vLLM can join and split."""
    folder = tmp_path_factory.mktemp("models")
    config = deepseek_config(
        vocab_size=512, hidden_size=256, intermediate_size=384, moe_intermediate_size=128, q_lora_rank=128,
        kv_lora_rank=128, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, num_attention_heads=2,
        num_key_value_heads=2, num_nextn_predict_layers=0, initializer_range=0.06,
    )  # fmt: skip
    torch.manual_seed(0)
    load_model(config).save_pretrained(folder / "fp8", fp8=True)
    load_model(folder / "fp8", dtype=torch.float32).save_pretrained(folder / "plain", dtype=torch.float32)
    return folder


def in_vllm(python, folder, quantization, prompts, tmp_path):
    """Log-probabilities of each prompt's own tokens."""
    metadata = tmp_path / "distill_plugin-0.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: distill-plugin\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINT)
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{tmp_path}", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_MLA_DISABLE": "1",
    }  # fmt: skip
    environment.pop("TRITON_INTERPRET", None)
    arguments = json.dumps([str(folder), quantization, prompts])
    done = subprocess.run(
        [python, "-c", SCRIPT, arguments], env=environment, capture_output=True, text=True, timeout=170
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert found, done.stdout[-3000:] + done.stderr[-3000:]
    return [torch.tensor(one) for one in json.loads(found[0].removeprefix("RESULT "))], done.stdout + done.stderr


@torch.no_grad()
def ours(model, prompts):
    logits = [model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for ids in prompts]
    return [one.gather(1, torch.tensor(ids[1:])[:, None])[:, 0] for one, ids in zip(logits, prompts, strict=True)]


def test_the_plugin_computes_what_our_model_computes_in_fp8(folders, vllm_python, tmp_path):
    prompts = torch.randint(0, 500, (6, 40), generator=torch.Generator().manual_seed(1)).tolist()
    with_plugin, log = in_vllm(vllm_python, folders / "fp8", "distill_fp8", prompts, tmp_path)
    without, _ = in_vllm(vllm_python, folders / "plain", None, prompts, tmp_path)
    assert "distill_fp8: plain definitions" in log
    model = load_model(folders / "fp8", dtype=torch.float32)
    in_full = torch.stack(ours(model, prompts))
    with fp8_products(model):
        in_fp8 = torch.stack(ours(model, prompts))
    plugin, plain = torch.stack(with_plugin), torch.stack(without)
    torch.testing.assert_close(plain, in_full, rtol=0, atol=1e-4)
    # Equal to the last bits until somewhere a value falls on the other side of a rounding, or a token to another
    # expert; from there a prompt goes its own way, by no more than what FP8 costs.
    assert float((plugin - in_fp8).abs().median()) < 1e-4
    cost = (plugin - plain).abs()
    assert float(cost.mean()) > 0.01
    assert float((plugin - in_fp8).abs().mean()) < 0.5 * float(cost.mean())
    assert float((in_fp8 - in_full).abs().mean()) == pytest.approx(float(cost.mean()), rel=0.2)


def test_fp8_of_another_form_is_refused_by_name(folders, vllm_python, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for file in (folders / "fp8").iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folders / "fp8" / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [1, 128]
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(AssertionError, match=r"weight_block_size \[1, 128\].*taken: \[128, 128\] and 'dynamic'"):
        in_vllm(vllm_python, folder, "distill_fp8", [[1, 2, 3]], tmp_path)
