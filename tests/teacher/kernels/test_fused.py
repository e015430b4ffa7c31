"""A step by the fused kernels is the model's own: the same logits over the same cache, in bf16 and in FP8."""

import pytest
import torch

pytest.importorskip("triton")

from teacher import load_model
from teacher.cache import LatentCache
from teacher.fused import FusedModel, fused_obstacle
from teacher.kernels.expert_pairs import expert_pairs
from teacher.quantized_experts import quantize_experts
from teacher.quantized_linear import QuantizedLinear, quantize_linears
from teacher.runner import TorchRunner
from tests.teacher.random_configs import randomize
from tests.tiny import deepseek_config

SIZES = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 96, "q_lora_rank": 128, "v_head_dim": 128}
NO_QUERY_LATENT = {"q_lora_rank": None, "num_attention_heads": 8, "num_key_value_heads": 8, "v_head_dim": 16}


def model_of(device, weights, **fields):
    """Small, and its router always chooses the same experts: bf16's rounding flips no choice."""
    torch.manual_seed(0)
    model = load_model(deepseek_config(**(SIZES | fields)))
    randomize(model, 0)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias.copy_(10.0 * torch.randperm(len(module.e_score_correction_bias)))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return in_fp8(model.to(device).requires_grad_(False), weights)


def in_fp8(model, weights):
    if weights != "model":
        quantize_experts(model, shared=weights == "fp8")
    if weights == "fp8":
        quantize_linears(model)
    return model


@torch.inference_mode()
def steps(model, kernels, cache_dtype, device, rows=3):
    """Hidden states of the main model and of its draft over steps of one and two tokens of `rows` sequences."""
    cache = LatentCache(model.config, model.config.num_hidden_layers + 1, 1 + 4 * rows, 4, cache_dtype, device)
    runner, found = TorchRunner(model, cache, kernels), []
    generator = torch.Generator().manual_seed(1)
    table_BP = torch.arange(1, 1 + 4 * rows, dtype=torch.int32).view(rows, 4).to(device)
    at = torch.zeros(rows, dtype=torch.int64)
    for new in (2, 1, 2, 1) if device == "cuda" else (2, 1):  # interpreted, each takes seconds
        position_BT = at.unsqueeze(1) + torch.arange(new)
        at += new
        if new == 2 and rows > 1:
            position_BT[1, 1] = -1  # padding, which goes to the page of nobody
            at[1] -= 1
        tokens_BT = torch.randint(0, 250, position_BT.shape, generator=generator).to(device)
        hidden_BTH = runner.extend(tokens_BT, position_BT.to(device), table_BP)
        first_B1 = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        drafted_BTH = runner.extend_draft(tokens_BT, position_BT.to(device), table_BP, hidden_BTH, first_B1)
        real = (position_BT >= 0).to(device)
        found += [hidden_BTH[real].float(), drafted_BTH[real].float()]
    return runner, found


@pytest.fixture
def plainly(monkeypatch):
    """`steps` without the fused kernels."""

    def run(*arguments):
        with monkeypatch.context() as patched:
            patched.setattr("teacher.runner.fused_obstacle", lambda model: "switched off")
            runner, found = steps(*arguments)
        assert "fused" not in runner.name
        return found

    return run


@pytest.mark.parametrize("fields", [{}, NO_QUERY_LATENT])
def test_fused_steps_are_the_models(fields, device, plainly):
    model = model_of(device, "model", **fields)
    runner, fused = steps(model, True, torch.bfloat16, device)
    assert "fused steps" in runner.name
    for found, expected in zip(fused, plainly(model, True, torch.bfloat16, device), strict=True):
        assert (found - expected).norm() < 0.03 * expected.norm()


def test_one_sequences_experts_are_computed_pair_by_pair(device, plainly, monkeypatch):
    """One token and two; bf16's experts by pairs too."""
    model, counted = model_of(device, "model"), []
    pairs = "teacher.kernels.expert_pairs.expert_pairs"
    with monkeypatch.context() as patched:
        patched.setattr(pairs, lambda x, *rest: counted.append(len(x)) or expert_pairs(x, *rest))
        _, fused = steps(model, True, torch.bfloat16, device, 1)
    assert set(counted) == {1, 2}
    for found, expected in zip(fused, plainly(model, True, torch.bfloat16, device, 1), strict=True):
        assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(
    ("weights", "cache_dtype", "fields"),
    [
        ("fp8", torch.bfloat16, {}),
        ("fp8", torch.uint8, NO_QUERY_LATENT | {"n_shared_experts": 2}),
        ("experts", torch.bfloat16, NO_QUERY_LATENT),
    ],
)
def test_in_fp8_they_are_as_near_the_truth_as_the_models(weights, cache_dtype, fields, device, plainly):
    """So small a random model carries a difference of a last bit, by way of another code of e4m3, to a tenth of its
    result; so both are held against the model before it was rounded."""
    if device == "cuda" and cache_dtype == torch.uint8:  # there the MLA kernel is proved for V3's rows alone
        fields = fields | {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_attention_heads": 16}
        fields |= {"num_key_value_heads": 16}
    model = model_of(device, "model", **fields)
    truth = plainly(model, True, torch.bfloat16, device)
    in_fp8(model, weights)
    _, fused = steps(model, True, cache_dtype, device)
    plain = plainly(model, True, cache_dtype, device)

    def error(found):
        return sum(float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True))

    assert 0 < error(fused) < 1.3 * error(plain)


def test_joined_weights_stay_the_modules_own(device):
    model = model_of(device, "fp8")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused = FusedModel(model)
    assert fused.layers[0].joint.weight.data_ptr() == model.main_layers[0].self_attn.q_a_proj.weight.data_ptr()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.float(), before[name].float()), name
    assert isinstance(model.main_layers[0].self_attn.o_proj, QuantizedLinear)


def test_what_the_fused_kernels_cannot_run_is_said(device):
    assert "biases" in fused_obstacle(model_of(device, "model", attention_bias=True))
    assert "not 24 in 4" in fused_obstacle(model_of(device, "model", n_routed_experts=24))
    assert "not 144" in fused_obstacle(model_of(device, "fp8", q_lora_rank=144))
    assert "float32" in fused_obstacle(load_model(deepseek_config()))
    assert fused_obstacle(model_of(device, "fp8")) is None
