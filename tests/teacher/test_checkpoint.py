"""Checkpoints: round trips, and one clear sentence for each way in which a folder can be wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from teacher import load_model
from teacher.checkpoint import INDEX
from teacher.checkpoint_write import save_checkpoint
from tests.tiny import deepseek_config

WEIGHTS = "model.safetensors"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return load_model(deepseek_config())


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def change(folder, edit):
    """Rewrite the weights after `edit(tensors)`."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def assert_same(model, other):
    expected, found = model.state_dict(), other.state_dict()
    assert list(expected) == list(found)
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_round_trip(model, folder):
    assert_same(model, load_model(folder))
    assert not list(folder.glob("*.tmp"))


def test_names_on_disk_are_deepseeks(folder):
    names = set(load_file(folder / WEIGHTS))
    assert {
        "model.embed_tokens.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.1.mlp.experts.7.up_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.shared_experts.down_proj.weight",
        "model.layers.3.eh_proj.weight",
        "model.layers.3.enorm.weight",
        "model.layers.3.hnorm.weight",
        "model.layers.3.embed_tokens.weight",
        "model.layers.3.shared_head.head.weight",
        "model.layers.3.shared_head.norm.weight",
        "model.layers.3.mlp.experts.0.gate_proj.weight",
        "lm_head.weight",
    } <= names


def test_shards_round_trip_and_replace_one_another(model, folder):
    save_checkpoint(model, folder, shard_bytes=30_000)
    assert (folder / INDEX).is_file() and not (folder / WEIGHTS).exists()
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    assert_same(model, load_model(folder))
    model.save_pretrained(folder)
    assert [path.name for path in folder.glob("model*")] == [WEIGHTS]
    assert_same(model, load_model(folder))


def test_bf16_keeps_the_selection_bias_in_fp32(model, tmp_path):
    model.model.layers[1].mlp.gate.e_score_correction_bias += 0.1234567
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    stored = load_file(tmp_path / WEIGHTS)
    kinds = {tensor.dtype for name, tensor in stored.items() if not name.endswith("e_score_correction_bias")}
    assert kinds == {torch.bfloat16}
    loaded = load_model(tmp_path)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert loaded.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert float(loaded.model.layers[1].mlp.gate.e_score_correction_bias[0]) == pytest.approx(0.1234567, abs=1e-7)
    assert load_model(tmp_path, dtype="float32").lm_head.weight.dtype == torch.float32
    assert torch.isfinite(loaded(torch.tensor([[1, 2, 3]])).logits).all()


def test_fresh_model_from_a_config_file(folder):
    assert load_model(folder / "config.json").config == load_model(folder).config


def refused(folder, *parts):
    with pytest.raises(ValueError) as error:
        load_model(folder)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message
    for part in parts:
        assert part in message


def test_missing_tensor(folder):
    change(folder, lambda tensors: tensors.pop("model.layers.2.mlp.experts.3.up_proj.weight"))
    refused(folder, "1 tensor(s) missing, the first is model.layers.2.mlp.experts.3.up_proj.weight")


def test_extra_tensor(folder):
    change(folder, lambda tensors: tensors.update({"model.layers.9.norm.weight": torch.ones(3)}))
    refused(folder, WEIGHTS, "1 tensor(s) not of this model, the first is model.layers.9.norm.weight")


def test_misshaped_tensor(folder):
    change(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(2, 32)}))
    refused(folder, WEIGHTS, "lm_head.weight has shape [2, 32]; config.json asks for [263, 32]")


def test_mtp_head_that_is_not_shared(folder):
    change(folder, lambda tensors: tensors["model.layers.3.shared_head.head.weight"].add_(1))
    refused(folder, WEIGHTS, "model.layers.3.shared_head.head.weight differs from lm_head.weight")


@pytest.mark.parametrize("keep", [0, 5, 300, 100_000])
def test_truncated_file(folder, keep):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep])
    refused(folder, WEIGHTS, "not a whole safetensors file")


def test_pickle_is_never_opened(folder):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refused(folder, "found a pickle (pytorch_model.bin)")
    (folder / "pytorch_model.bin").rename(folder / WEIGHTS)
    refused(folder, WEIGHTS, "not a whole safetensors file")


def test_no_weights_and_no_folder(folder):
    (folder / WEIGHTS).unlink()
    refused(folder, "no model.safetensors")
    refused(folder / "nowhere", "no such folder")


@pytest.mark.parametrize("index", ["{", '{"weight_map": 3}', '{"weight_map": {"a": "gone.safetensors"}}',
                                   '{"weight_map": {"a": "../elsewhere.safetensors"}}'])  # fmt: skip
def test_wrong_index(folder, index):
    (folder / INDEX).write_text(index)
    refused(folder, INDEX)


def test_fp8_is_refused_for_now(folder):
    change(folder, lambda tensors: tensors.update({"lm_head.weight_scale_inv": torch.ones(1)}))
    refused(folder, "FP8")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    refused(folder, "quantization_config")


def test_unknown_dtype(folder):
    with pytest.raises(ValueError, match="dtype is 'float33'"):
        load_model(folder, dtype="float33")
