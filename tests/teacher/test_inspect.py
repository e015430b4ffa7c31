"""Counts from a config against published figures, the real model on the meta device, its files, and counted FLOPs."""

import dataclasses
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distill.shipped import configs_folder, resolve_model
from teacher import capacity, headers, inspect
from teacher.config import DeepseekV3Config
from teacher.model import DeepseekV3
from tests.teacher.random_configs import random_config
from tests.tiny import deepseek_config, write_teacher

V3 = DeepseekV3Config.from_json(configs_folder() / "teacher" / "deepseek-v3.json")
ON_DISK = ("main", "mtp", "copies")


def on_meta(config):
    with torch.device("meta"):
        return DeepseekV3(config)


def kind_of(name):
    for part, kind in {
        "embed_tokens": "embedding", "lm_head": "head", "norm": "norms", "self_attn": "attention",
        "shared_experts": "shared expert", "mlp.experts": "routed experts", "mlp.gate.": "router", "mlp.": "dense FFN",
    }.items():  # fmt: skip
        if part in name:
            return kind
    raise AssertionError(name)


def is_mtp(config, name):
    return name.startswith("model.layers.") and int(name.split(".")[2]) >= config.num_hidden_layers


# --- published figures -------------------------------------------------------------------------------------------


def test_deepseek_v3_has_671b_parameters_and_activates_37b():
    main = inspect.count(V3)
    assert main.total == 671_026_419_200
    assert round(main.activated / 1e9) == 37 and main.activated == 36_625_625_600
    # README_WEIGHTS.md of DeepSeek-V3; its figures for the MTP module leave out eh_proj.
    mtp, projection = inspect.count(V3, "mtp"), 2 * V3.hidden_size**2
    assert f"{(mtp.total - projection) / 1e9:.1f}" == "11.5"
    copies = inspect.count(V3, "copies").total
    assert f"{(mtp.activated - projection + copies) / 1e9:.1f}" == "2.4"
    assert f"{copies / 2 / 1e9:.1f}" == "0.9"
    assert 13.4e9 < mtp.total + copies < 14e9
    assert round(inspect.count(V3, *ON_DISK).total / 1e9) == 684


def test_deepseek_v3_s_files_hold_what_the_hub_says():
    values = Counter()
    for tensor in inspect.tensors(V3):
        rows, columns = (tensor.shape * 2)[:2]
        values["F32" if tensor.fp32 else "F8_E4M3" if tensor.fp8 else "BF16"] += tensor.parameters
        if tensor.fp8:
            values["F32"] += tensor.count * -(-rows // 128) * -(-columns // 128)
    # huggingface.co/api/models/deepseek-ai/DeepSeek-R1, "safetensors".
    assert values == {"BF16": 3_918_786_560, "F8_E4M3": 680_571_043_840, "F32": 41_555_600}
    assert inspect.weight_bytes(V3, "fp8", *ON_DISK) == 680_571_043_840 + 2 * 3_918_786_560 + 4 * 41_555_600


def test_moonlight_s_published_counts():
    # arXiv 2502.16982: 15.29B and 2.24B, without embedding and head; no q_lora_rank, two shared experts, no groups.
    config = DeepseekV3Config(
        vocab_size=163840, hidden_size=2048, intermediate_size=11264, moe_intermediate_size=1408, num_hidden_layers=27,
        num_attention_heads=16, num_key_value_heads=16, n_shared_experts=2, n_routed_experts=64, num_experts_per_tok=6,
        n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=None, num_nextn_predict_layers=0,
    )  # fmt: skip
    rows = [row for row in inspect.count_by_kind(config) if row.kind not in ("embedding", "head")]
    assert f"{sum(row.total for row in rows) / 1e9:.2f}" == "15.29"
    assert f"{sum(row.activated for row in rows) / 1e9:.2f}" == "2.24"


def test_deepseek_v3_s_cache_and_training_cost():
    # arXiv 2505.09343, tables 1 and 2 (4,096 tokens).
    assert inspect.cache_bytes(V3) == 70_272
    assert round(inspect.flops(V3, 4096).training / 1e9) == 250
    forms = {form.name: form for form in inspect.cache_forms(V3)}
    assert forms["MLA latent"].bytes_per_token == 70_272
    # As cache.py's docstring and V2's table 1: 2 n_h d_h and 2 n_g d_h values a layer.
    assert forms["MHA, 128 heads"].values == 2 * 128 * 128
    assert forms["GQA, 8 groups"].values == 2 * 8 * 128
    assert forms["MQA"].values == 2 * 128


@pytest.mark.parametrize(
    ("precision", "size", "gpus"),
    [
        ("fp8", 141, 8), ("fp8", 192, 8), ("fp8", 80, 16), ("fp8", 96, 16),
        ("bf16", 141, 16), ("bf16", 192, 16), ("bf16", 80, 32), ("bf16", 96, 32),
    ],
)  # fmt: skip
def test_gpus_for_deepseek_v3_are_those_that_sglang_recommends(precision, size, gpus):
    # docs.sglang.io, "DeepSeek V3/V3.1/R1 Usage": H200 and MI300X, H100 and H20.
    (fit,) = (fit for fit in capacity.fits(V3, precision, 131072) if fit.size_gb == size)
    assert fit.gpus == gpus


# --- against the model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_counts_are_the_model_s(seed):
    config = random_config(seed)
    main, mtp, modules = Counter(), 0, set()
    for name, tensor in on_meta(config).state_dict().items():
        if is_mtp(config, name):
            mtp += tensor.numel()
            modules.add(name.split(".")[2])
        else:
            main[kind_of(name)] += tensor.numel()
    assert {row.kind: row.total for row in inspect.count_by_kind(config)} == main
    assert inspect.count(config).total == main.total()
    assert inspect.count(config, "mtp").total == mtp
    assert inspect.count(config, "copies").total == len(modules) * 2 * config.vocab_size * config.hidden_size


def test_more_dense_layers_than_layers_and_no_shared_expert():
    config = deepseek_config(first_k_dense_replace=4, num_nextn_predict_layers=2, n_shared_experts=0)
    parameters = sum(tensor.numel() for tensor in on_meta(config).state_dict().values())
    assert inspect.count(config, "main", "mtp").total == parameters
    assert "routed experts" not in {row.kind for row in inspect.count_by_kind(config)}
    assert any("experts" in tensor.name for tensor in inspect.tensors(config) if tensor.part == "mtp")


def test_a_671b_model_on_the_meta_device_has_as_many():
    config = dataclasses.replace(V3, num_hidden_layers=5, max_position_embeddings=64, rope_scaling=None)
    parameters = sum(tensor.numel() for tensor in on_meta(config).state_dict().values())
    assert inspect.count(config, "main", "mtp").total == parameters
    each = [tensor for tensor in inspect.tensors(V3) if tensor.part == "main" and tensor.count in (58, 58 * 256)]
    rest = [tensor for tensor in inspect.tensors(V3) if tensor.part == "main" and tensor.count == 61]
    layer = sum(tensor.parameters for tensor in each) // 58 + sum(tensor.parameters for tensor in rest) // 61
    assert inspect.count(V3).total == inspect.count(config).total + 56 * layer


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_names_shapes_and_bytes_are_those_of_a_saved_model(precision, tmp_path):
    config = deepseek_config(attention_bias=True, num_nextn_predict_layers=2)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    torch.manual_seed(0)
    DeepseekV3(config).save_pretrained(tmp_path, dtype)
    header = headers._header(tmp_path / "model.safetensors")
    found = Counter()
    for name, entry in header.items():
        if name.startswith("model.layers."):
            name = name.split(".", 3)[3]
        parts = name.split(".")
        name = ".".join("*" if part.isdecimal() else part for part in parts)
        found[name, tuple(entry["shape"])] += 1
    expected = Counter()
    for tensor in inspect.tensors(config):
        expected[tensor.name, tensor.shape] += tensor.count
    assert found == expected
    stored = headers.read_headers(tmp_path)
    assert sum(stored.bytes.values()) == inspect.weight_bytes(config, precision, *ON_DISK)
    assert stored.parameters == inspect.count(config, *ON_DISK).total


def test_tiny_r1_s_files():
    folder = resolve_model("tiny-r1")
    config, stored = DeepseekV3Config.from_json(folder), headers.read_headers(folder)
    assert stored.parameters == inspect.count(config, *ON_DISK).total
    assert sum(stored.bytes.values()) == inspect.weight_bytes(config, "bf16", *ON_DISK)


def test_cache_sizes_are_what_the_models_keep(tmp_path):
    from transformers import AutoModelForCausalLM

    write_teacher(tmp_path, num_nextn_predict_layers=0, v_head_dim=24)
    config = DeepseekV3Config.from_json(tmp_path)
    forms = {form.name: form for form in inspect.cache_forms(config)}
    tokens = torch.arange(7).unsqueeze(0)
    latents = DeepseekV3(config)(tokens).latents
    assert sum(latent.numel() for latent in latents) * 2 == 7 * forms["MLA latent"].bytes_per_token
    # transformers caches the latents since 5.x, each head's keys and values before.
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens, use_cache=True).past_key_values
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in theirs.layers)
    assert kept * 2 in (7 * forms["MLA latent"].bytes_per_token, 7 * forms["MLA expanded"].bytes_per_token)


# --- FLOPs -------------------------------------------------------------------------------------------------------


def grouped_mm_flops(rows_shape, weight_shape, *_, **__):
    return 2 * rows_shape[0] * weight_shape[1] * weight_shape[2]


def counted(call):
    """FLOPs of the products in `call` by torch's counter: with weights, and between activations."""
    mapping = {torch.ops.aten._grouped_mm: grouped_mm_flops}
    # The CPU's fused attention is not counted; its plain form is products that are.
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        call()
    counts = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    batched = counts.pop("aten.bmm", 0)
    assert set(counts) <= {"aten.mm", "aten.addmm", "aten._grouped_mm"}
    return sum(counts.values()), batched


@pytest.mark.parametrize("seed", range(12))
def test_flops_are_those_that_torch_counts(seed):
    config, length = random_config(seed), 11
    torch.manual_seed(seed)
    model = DeepseekV3(config)
    matrices, _ = counted(lambda: model(torch.randint(0, config.vocab_size, (1, length))))
    work = inspect.flops(config, length)
    assert matrices == length * work.matrices
    # Keys and values of one size, because the CPU's attention fills up the smaller.
    config = dataclasses.replace(config, v_head_dim=config.qk_head_dim)
    model = DeepseekV3(config)
    x = torch.randn(1, length, config.hidden_size)
    table = (model.cos_TD[None, :length], model.sin_TD[None, :length])
    _, scores_and_values = counted(lambda: model.main_layers[0].self_attn(x, *table, None))
    # The plain form computes the whole square of scores, so every token as if it were the last.
    work = inspect.flops(config, length)
    assert scores_and_values * config.num_hidden_layers == length * work.attention_expanded


def test_prefill_is_the_mean_over_a_causal_prompt():
    each = [inspect.flops(V3, context) for context in range(1, 101)]
    mean = sum(work.matrices + work.attention_expanded for work in each) / 100
    assert each[-1].prefill == pytest.approx(mean, rel=1e-12)
    assert each[-1].training == 3 * each[-1].prefill


@pytest.mark.parametrize("seed", range(6))
def test_absorbed_attention_costs_what_is_said_and_gives_the_same(seed):
    config = random_config(seed)
    torch.manual_seed(seed)
    model = DeepseekV3(config)
    attention = model.main_layers[0].self_attn
    length, rank, heads = 9, config.kv_lora_rank, config.num_attention_heads
    x = torch.randn(1, length, config.hidden_size)
    cos, sin = model.cos_TD[None, :length], model.sin_TD[None, :length]
    expected, latents = attention(x, cos, sin, None)
    last = slice(length - 1, length)
    up = attention.kv_b_proj.weight.view(heads, -1, rank)
    up_k, up_v = up[:, : config.qk_nope_head_dim], up[:, config.qk_nope_head_dim :]
    result = []

    def absorbed():
        q_nope, q_rope = attention.queries(x[:, last], cos[:, last], sin[:, last])
        attention.kv_a_proj_with_mqa(x[:, last])  # what a new token adds to the cache
        q = torch.cat((torch.bmm(q_nope[0].transpose(0, 1), up_k), q_rope[0].transpose(0, 1)), -1).squeeze(1)
        weights = torch.softmax(q @ latents[0].T * attention.scale, -1)
        attended = weights @ latents[0, :, :rank]
        values = torch.bmm(attended.unsqueeze(1), up_v.transpose(1, 2))
        result.append(attention.o_proj(values.flatten()[None]))

    total = sum(counted(absorbed))
    torch.testing.assert_close(result[0], expected[:, -1], rtol=1e-4, atol=1e-5)
    matrices = 2 * sum(parameter.numel() for parameter in attention.parameters() if parameter.dim() == 2)
    work = inspect.flops(config, length)
    assert total == matrices + work.attention_absorbed // config.num_hidden_layers


# --- GPUs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [128, 96, 5])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_gpus_hold_what_they_are_said_to_hold_and_half_would_not(heads, precision):
    config = dataclasses.replace(V3, num_attention_heads=heads, num_key_value_heads=heads)
    total, layers = inspect.weight_bytes(config, precision), config.num_hidden_layers
    for fit in capacity.fits(config, precision, 50_000):
        usable = capacity.USABLE * fit.size_gb * 1e9
        if fit.gpus is None:
            # 32 stages are the most that 61 layers make; two layers are then too many.
            assert heads == 5 and total * 2 / layers > 0.9 * usable
            continue
        assert fit.gpus == fit.tensor_parallel * fit.pipeline_stages
        assert heads % fit.tensor_parallel == 0 and fit.tensor_parallel.bit_count() == 1
        assert fit.cache_tokens >= 50_000 and fit.gpus * fit.weight_bytes_each >= total
        stage = -(-layers // fit.pipeline_stages) / layers
        assert fit.weight_bytes_each + fit.cache_tokens * stage * inspect.cache_bytes(config) <= usable
        if fit.gpus.bit_count() == 1:
            assert total / (fit.gpus // 2) > 0.85 * usable


def test_more_cache_needs_more_gpus_until_none_holds_it():
    found = [capacity.fits(V3, "fp8", tokens)[3] for tokens in (1, 10**6, 10**7)]
    assert [(fit.tensor_parallel, fit.pipeline_stages) for fit in found[:2]] == [(16, 1), (4, 4)]
    assert found[2].gpus == 32
    assert {fit.gpus for fit in capacity.fits(V3, "fp8", 10**12)} == {None}


def test_one_gpu_holds_all_of_a_small_model():
    config = deepseek_config()
    for fit in capacity.fits(config, "bf16", 1000):
        assert fit.gpus == 1 and fit.weight_bytes_each == inspect.weight_bytes(config, "bf16")


# --- quantization ------------------------------------------------------------------------------------


def test_the_block_of_the_scales_is_the_config_s():
    block = {"quant_method": "fp8", "weight_block_size": [32, 64]}
    config = dataclasses.replace(V3, quantization_config=block)
    assert inspect.scale_block(config) == (32, 64)
    assert inspect.weight_bytes(config, "fp8") > inspect.weight_bytes(V3, "fp8")
    for wrong in ({"quant_method": "awq"}, block | {"weight_block_size": [0, 128]}, block | {"weight_block_size": 128}):
        with pytest.raises(ValueError, match="quantization_config"):
            inspect.scale_block(dataclasses.replace(V3, quantization_config=wrong))


def test_nothing_of_it_imports_torch():
    code = "import sys, teacher.inspect, teacher.capacity, teacher.headers; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
