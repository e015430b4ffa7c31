"""Checkpoints: round trips, and one clear sentence for each way in which a folder can be wrong."""

import json

import pytest
import torch
from safetensors import safe_open
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


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        '{"weight_map": 3}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 7}}',
        '{"weight_map": {"a": "model.safetensors", "b": 7}}',
        '{"weight_map": {"a": "gone.safetensors"}}',
        '{"weight_map": {"a": "../elsewhere.safetensors"}}',
    ],
)
def test_wrong_index(folder, index):
    (folder / INDEX).write_text(index)
    refused(folder, INDEX)


def set_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_unknown_model_type(folder):
    set_config(folder, model_type="deepseek_v2")
    refused(folder, "config.json: model_type is 'deepseek_v2'; expected 'deepseek_v3'")


def test_config_that_contradicts_itself(folder):
    set_config(folder, torch_dtype="bfloat16")
    refused(folder, "config.json: dtype is 'float32'; expected torch_dtype ('bfloat16')")


def test_config_that_contradicts_the_tensors(folder):
    set_config(folder, num_hidden_layers=2)
    refused(folder, "tensor(s) missing, the first is model.layers.2.eh_proj.weight")
    set_config(folder, num_hidden_layers=4, num_nextn_predict_layers=0)
    refused(folder, WEIGHTS, "not of this model, the first is model.layers.3.eh_proj.weight")
    set_config(folder, num_hidden_layers=3, num_nextn_predict_layers=1, n_routed_experts=4, n_group=2)
    refused(folder, WEIGHTS, "not of this model, the first is model.layers.1.mlp.experts.4.down_proj.weight")
    set_config(folder, n_routed_experts=8, n_group=4, q_lora_rank=None)
    refused(folder, "missing, the first is model.layers.0.self_attn.q_proj.weight")


def test_mtp_weights_that_the_config_does_not_know_or_that_are_not_all_there(folder):
    set_config(folder, num_nextn_predict_layers=0)
    refused(folder, WEIGHTS, "the first is model.layers.3.", "config.json states 3 layers and 0 for MTP")
    set_config(folder, num_nextn_predict_layers=2)
    refused(folder, "tensor(s) missing, the first is model.layers.4.")


def test_missing_mtp_weights_are_said_and_done_without(model, folder):
    def drop(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            del tensors[name]

    change(folder, drop)
    with pytest.warns(UserWarning, match="no MTP weights although num_nextn_predict_layers is set") as caught:
        loaded = load_model(folder)
    assert caught[0].filename == __file__
    assert loaded.config.num_nextn_predict_layers == 0 and not loaded.mtp_layers
    ids_BT = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(ids_BT).logits, model(ids_BT).logits)


def test_mtp_copies_may_be_left_out(model, folder):
    change(folder, lambda tensors: tensors.pop("model.layers.3.shared_head.head.weight"))
    change(folder, lambda tensors: tensors.pop("model.layers.3.embed_tokens.weight"))
    assert_same(model, load_model(folder))


@pytest.mark.parametrize("name", ["model.layers.3.embed_tokens.weight", "model.norm.weight"])
def test_wrong_dtype_on_disk(folder, name):
    change(folder, lambda tensors: tensors.update({name: tensors[name].long()}))
    refused(folder, WEIGHTS, f"tensor {name} is I64; expected floating point")


def test_misshaped_mtp_copy(folder):
    change(folder, lambda tensors: tensors.update({"model.layers.3.embed_tokens.weight": torch.ones(262, 32)}))
    refused(folder, WEIGHTS, "model.layers.3.embed_tokens.weight has shape [262, 32]; config.json asks for [263, 32]")


def test_tensor_in_two_shards(model, folder):
    save_checkpoint(model, folder, shard_bytes=30_000)
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    save_file(load_file(second) | {"lm_head.weight": torch.ones(3)}, second)
    save_file(load_file(first) | {"lm_head.weight": torch.ones(3)}, first)
    refused(folder, f"tensor lm_head.weight is also in {first.name}")


def test_a_shard_that_is_gone_or_cut(model, folder):
    save_checkpoint(model, folder, shard_bytes=30_000)
    shard = sorted(folder.glob("model-*.safetensors"))[2]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    refused(folder, shard.name, "not a whole safetensors file")
    shard.unlink()
    refused(folder, INDEX, f"names '{shard.name}', which is not a file of that folder")


def test_meta_device_reads_no_weights(model, folder):
    loaded = load_model(folder, "bfloat16", "meta")
    assert {parameter.device.type for parameter in loaded.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    fresh = load_model(deepseek_config(hidden_size=7168, intermediate_size=10**7), device="meta")
    assert sum(parameter.numel() for parameter in fresh.parameters()) > 2e11


@pytest.mark.parametrize("window", [1, 20_000, 10**9])
def test_mapping_a_file_in_parts_changes_nothing(model, folder, window, monkeypatch):
    monkeypatch.setattr("teacher.checkpoint_read._WINDOW", window)
    assert_same(model, load_model(folder))
    save_checkpoint(model, folder, shard_bytes=30_000)
    assert_same(model, load_model(folder))


@pytest.mark.parametrize("fp8", [False, True])
def test_every_tensor_is_read_once_and_copied_into_its_place(model, tmp_path, fp8, monkeypatch):
    save_checkpoint(model, tmp_path, torch.bfloat16, shard_bytes=30_000, fp8=fp8)
    read, held = [], []

    class Watched:
        def __init__(self, path, framework):
            self.file = safe_open(path, framework)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            self.file.__exit__(*error)

        def get_tensor(self, name):
            tensor = self.file.get_tensor(name)
            read.append(name)
            held.append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, tensor))
            return tensor

    monkeypatch.setattr("teacher.checkpoint_read.safe_open", Watched)
    loaded = load_model(tmp_path)
    assert sorted(read) == sorted(json.loads((tmp_path / INDEX).read_text())["weight_map"])
    for tensor in loaded.state_dict().values():  # nothing of the model lies in a mapped file
        assert not any(start <= tensor.data_ptr() < stop for start, stop, _ in held)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fp8", [False, True])
def test_loading_to_a_gpu_gives_the_same_values(model, tmp_path, fp8):
    model.save_pretrained(tmp_path, "bfloat16", fp8=fp8)
    expected = load_model(tmp_path).state_dict()
    for name, tensor in load_model(tmp_path, device="cuda").state_dict().items():
        assert tensor.is_cuda and torch.equal(tensor.cpu(), expected[name]), name


@pytest.mark.parametrize("dtype", ["float33", "int8", "float8_e4m3fn", torch.int64, "Tensor", "bool"])
def test_senseless_dtype(model, folder, dtype):
    with pytest.raises(ValueError, match=r"dtype is .*; expected one of 'float64', 'float32', 'float16', 'bfloat16'"):
        load_model(folder, dtype=dtype)
    with pytest.raises(ValueError, match=r"dtype is .*; expected a floating-point dtype"):
        model.save_pretrained(folder, dtype=dtype)
