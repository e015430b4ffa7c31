"""Experts kept in FP8: a checkpoint's own bytes in memory, and the outputs that they stand for."""

import pytest
import torch

from teacher import load_model
from teacher.fp8 import FP8
from teacher.quantized_experts import QuantizedExperts
from tests.tiny import deepseek_config

SIZES = {"hidden_size": 160, "moe_intermediate_size": 144, "initializer_range": 0.1}


@pytest.fixture(autouse=True)
def _in_torch(monkeypatch):
    monkeypatch.setattr("teacher.quantized_experts.chosen_path", lambda device: "reference")


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    load_model(deepseek_config(**SIZES)).save_pretrained(tmp_path, "bfloat16", fp8=True)
    return tmp_path


def layers(model):
    return [module for module in model.modules() if isinstance(module, QuantizedExperts)]


def test_a_checkpoints_values_and_scales_are_kept(folder):
    from safetensors.torch import load_file

    stored, model = load_file(folder / "model.safetensors"), load_model(folder, experts="fp8")
    experts = model.model.layers[1].mlp.experts
    assert len(layers(model)) == 3 and experts.gate_up_proj.dtype == FP8
    for e in (0, 7):
        name = f"model.layers.1.mlp.experts.{e}"
        for part, values, scale in (
            ("gate_proj", experts.gate_up_proj[e, :144], experts.gate_up_scale[e, :2]),
            ("up_proj", experts.gate_up_proj[e, 144:], experts.gate_up_scale[e, 2:]),
            ("down_proj", experts.down_proj[e], experts.down_scale[e]),
        ):
            assert torch.equal(values.view(torch.uint8), stored[f"{name}.{part}.weight"].view(torch.uint8))
            assert torch.equal(scale, stored[f"{name}.{part}.weight_scale_inv"])


@torch.no_grad()
def test_outputs_are_near_the_dequantised_models(folder):
    ids = torch.randint(10, 250, (2, 9))
    own, kept = load_model(folder, "float32")(ids).logits, load_model(folder, "float32", experts="fp8")(ids).logits
    # Activations are rounded to FP8 too, and with that some choices of experts turn.
    assert 0 < (own - kept).abs().mean() / own.abs().mean() < 0.25


def test_a_checkpoint_in_bf16_is_quantised_as_it_is_read(tmp_path):
    torch.manual_seed(0)
    load_model(deepseek_config(**SIZES)).save_pretrained(tmp_path / "plain", "bfloat16")
    load_model(tmp_path / "plain").save_pretrained(tmp_path / "fp8", "bfloat16", fp8=True)
    plain, fp8 = (load_model(tmp_path / name, experts="fp8").state_dict() for name in ("plain", "fp8"))
    names = [name for name in plain if ".experts." in name and "shared" not in name]
    assert names
    for name in names:
        assert torch.equal(plain[name].float(), fp8[name].float()), name


def test_what_cannot_be_is_refused(folder):
    with pytest.raises(ValueError, match="experts is 'fp4'; expected 'fp8' or None"):
        load_model(folder, experts="fp4")
    with pytest.raises(ValueError, match="hidden size 40 and intermediate size 24; taken: multiples of 16"):
        load_model(deepseek_config(hidden_size=40, moe_intermediate_size=24), experts="fp8")
    with pytest.raises(ValueError, match="experts in FP8"):
        load_model(folder, experts="fp8").save_pretrained(folder / "again")
    model = load_model(folder, "float32", experts="fp8")
    with pytest.raises(ValueError, match="no backward"):
        model(torch.randint(10, 250, (1, 5)))
