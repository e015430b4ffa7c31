"""All of a model in FP8 as DeepSeek ships it: a checkpoint's own bytes, and the outputs that they stand for."""

import pytest
import torch
from safetensors.torch import load_file

from teacher import load_model
from teacher.checkpoint import is_fp8_matrix
from teacher.engine import Engine
from teacher.experts import MoE
from teacher.fp8 import FP8
from teacher.quantized_experts import quantize_experts
from teacher.quantized_linear import QuantizedLinear, linear_reference
from teacher.requests import Request
from tests.tiny import deepseek_config

SIZES = {"hidden_size": 160, "moe_intermediate_size": 144, "intermediate_size": 176, "q_lora_rank": 32}


@pytest.fixture(autouse=True)
def _in_torch(monkeypatch):
    for module in ("teacher.quantized_experts", "teacher.quantized_linear"):
        monkeypatch.setattr(f"{module}.chosen_path", lambda device: "reference")


def checkpoint(folder, **fields):
    torch.manual_seed(0)
    load_model(deepseek_config(**(SIZES | {"initializer_range": 0.1} | fields))).save_pretrained(
        folder, "bfloat16", fp8=True
    )
    return folder


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_a_checkpoints_bytes_are_kept(tmp_path, shared):
    stored = load_file(checkpoint(tmp_path, n_shared_experts=shared) / "model.safetensors")
    model = load_model(tmp_path, weights="fp8")
    layer = model.model.layers[1]
    for name, linear in layer.self_attn.named_children():
        if name.endswith(("_proj", "mqa")):
            weight = stored[f"model.layers.1.self_attn.{name}.weight"]
            if name == "kv_b_proj":
                assert linear.weight.dtype == torch.bfloat16
                continue
            assert isinstance(linear, QuantizedLinear), name
            assert torch.equal(linear.weight.view(torch.uint8), weight.view(torch.uint8))
            scale = stored[f"model.layers.1.self_attn.{name}.weight_scale_inv"]
            assert torch.equal(linear.weight_scale, scale)
    if shared == 1:  # it is the last of the stack
        assert layer.mlp.shared_experts is None and len(layer.mlp.experts.down_proj) == 9
        down = stored["model.layers.1.mlp.shared_experts.down_proj.weight"]
        assert torch.equal(layer.mlp.experts.down_proj[8].view(torch.uint8), down.view(torch.uint8))
        gate = stored["model.layers.1.mlp.shared_experts.up_proj.weight_scale_inv"]
        assert torch.equal(layer.mlp.experts.gate_up_scale[8, 2:], gate)
    assert sum(tensor.dtype == FP8 for tensor in model.state_dict().values()) > 20
    assert all(is_fp8_matrix(name) for name, each in stored.items() if each.dtype == FP8)


@pytest.mark.parametrize("shared", [0, 1, 2])
@torch.no_grad()
def test_outputs_are_near_the_dequantised_models(tmp_path, shared):
    ids = torch.randint(10, 250, (2, 9))
    checkpoint(tmp_path, n_shared_experts=shared)
    own, kept = (load_model(tmp_path, "float32", weights=each)(ids).logits for each in (None, "fp8"))
    # Activations are rounded to FP8 too, and with that some choices of experts turn.
    assert 0 < (own - kept).abs().mean() / own.abs().mean() < 0.4


@pytest.mark.parametrize("shared", [1, 3])
@torch.no_grad()
def test_a_wide_shared_expert_is_several_of_the_stack(shared):
    """SwiGLU is element-wise: cut along its hidden values it is the sum of the pieces."""
    torch.manual_seed(0)
    moe, x = MoE(deepseek_config(**(SIZES | {"n_shared_experts": shared}))), torch.randn(1, 7, 160)
    for parameter in moe.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
    expected, _ = moe(x)
    quantize_experts(torch.nn.Sequential(moe), shared=True)
    assert moe.shared_experts is None and moe.experts.shared == shared and len(moe.experts.down_proj) == 8 + shared
    found, _ = moe(x)
    assert 0 < (found - expected).abs().mean() / expected.abs().mean() < 0.08


def test_the_layer_is_its_definition():
    torch.manual_seed(0)
    linear = torch.nn.Linear(272, 40, bias=True)
    quantised, x = QuantizedLinear.of(linear), torch.randn(3, 5, 272)
    with torch.no_grad():
        found = quantised(x)
        expected = linear_reference(x.flatten(0, 1), quantised.weight, quantised.weight_scale) + linear.bias
        assert torch.equal(found.flatten(0, 1), expected)
        assert (found - linear(x)).abs().mean() < 0.05 * linear(x).abs().mean()


def test_the_engine_does_not_read_fp8_as_if_it_were_float32(tmp_path):
    """The step in C knows no scales: such a model runs in torch."""
    for name in ("experts", "weights"):
        engine = Engine(load_model(deepseek_config(**SIZES), **{name: "fp8"}), 257, 2, 64)
        assert engine.runs_in == "torch"
        (done,) = engine.generate([Request("a", [1, 2, 3], max_tokens=2, temperature=0.0)])
        assert done.token_ids


def test_what_cannot_be_is_refused(tmp_path):
    folder = checkpoint(tmp_path)
    with pytest.raises(ValueError, match="weights is 'int8'; expected 'fp8' or None"):
        load_model(folder, weights="int8")
    with pytest.raises(ValueError, match="a linear layer of 24 inputs; taken in FP8: a multiple of 16"):
        load_model(deepseek_config(**(SIZES | {"q_lora_rank": 24})), weights="fp8")
    model = load_model(folder, "float32", weights="fp8")
    with pytest.raises(ValueError, match="in FP8 is for inference; save one loaded without"):
        model.save_pretrained(folder / "again")
    with pytest.raises(ValueError, match="no backward"):
        model(torch.randint(10, 250, (1, 5)))
