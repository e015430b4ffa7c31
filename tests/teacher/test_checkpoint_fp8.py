"""Block-FP8 checkpoints as DeepSeek ships them: written, read, compared with transformers, and each way to be wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from teacher import load_model
from teacher.checkpoint import INDEX
from teacher.checkpoint_write import save_checkpoint
from tests.tiny import deepseek_config

WEIGHTS = "model.safetensors"
SETTINGS = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
Q_A = "model.layers.0.self_attn.q_a_proj.weight"


def build(**changes):
    """A model whose matrices have ragged blocks in both directions, with two MTP modules."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 160, "intermediate_size": 272, "moe_intermediate_size": 144, "q_lora_rank": 130,
        "kv_lora_rank": 136, "qk_nope_head_dim": 40, "v_head_dim": 72, "num_nextn_predict_layers": 2,
        "attention_bias": True, "initializer_range": 0.1,
    }  # fmt: skip
    return load_model(deepseek_config(**(sizes | changes)))


@pytest.fixture
def folder(tmp_path):
    build().save_pretrained(tmp_path, "bfloat16", fp8=True)
    return tmp_path


def dequantized(stored, dtype):
    """What a checkpoint's tensors mean, by the definition: block times its scale, block by block."""
    result = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        result[name] = tensor.to(dtype)
        if tensor.dtype == torch.float8_e4m3fn:
            scale = stored[name + "_scale_inv"].float()
            for i in range(0, tensor.shape[0], 128):
                for j in range(0, tensor.shape[1], 128):
                    block = tensor[i : i + 128, j : j + 128].float() * scale[i // 128, j // 128]
                    result[name][i : i + 128, j : j + 128] = block.to(dtype)
    return result


def set_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def change(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_what_is_quantised_is_what_deepseek_quantises(folder):
    stored = load_file(folder / WEIGHTS)
    assert json.loads((folder / "config.json").read_text())["quantization_config"] == SETTINGS
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    quantised = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    assert {name + "_scale_inv" for name in quantised} == {name for name in stored if name.endswith("_scale_inv")}
    leaves = {name.split(".", 3)[3] for name in quantised if name.startswith(("model.layers.0.", "model.layers.4."))}
    attention = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    feed_forward = {"gate_proj", "up_proj", "down_proj"}
    owners = ["mlp", "mlp.shared_experts", *(f"mlp.experts.{expert}" for expert in range(8))]
    assert leaves == {f"self_attn.{leaf}.weight" for leaf in attention} | {
        f"{owner}.{leaf}.weight" for owner in owners for leaf in feed_forward
    }
    rest = {name: tensor.dtype for name, tensor in stored.items() if name not in quantised}
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.1.mlp.gate.weight",
                 "model.layers.3.eh_proj.weight", "model.layers.0.self_attn.q_a_proj.bias"):  # fmt: skip
        assert rest.pop(name) == torch.bfloat16
    assert rest["model.layers.1.mlp.gate.e_score_correction_bias"] == torch.float32
    assert {stored[name + "_scale_inv"].dtype for name in quantised} == {torch.float32}
    assert stored["model.layers.0.self_attn.q_b_proj.weight_scale_inv"].shape == (1, 2)  # 96 x 130
    assert stored["model.layers.0.mlp.down_proj.weight_scale_inv"].shape == (2, 3)  # 160 x 272


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_loading_dequantises_every_block(folder, dtype):
    model = load_model(folder, dtype)
    wanted = torch.float32 if dtype == "float32" else torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert model.config.quantization_config is None
    expected = dequantized(load_file(folder / WEIGHTS), wanted)
    model.save_pretrained(folder / "plain")
    found = load_file(folder / "plain" / WEIGHTS)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name].to(wanted), tensor), name
    assert "quantization_config" not in json.loads((folder / "plain/config.json").read_text())
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_quantisation_costs_what_three_mantissa_bits_cost(folder):
    exact, found = build(), load_model(folder, "float32")
    for (name, a), (_, b) in zip(exact.named_parameters(), found.named_parameters(), strict=True):
        if "proj" in name and "eh_proj" not in name and a.dim() > 1:
            error = float((a - b).detach().norm() / a.detach().norm())
            assert 0.01 < error < 0.04, name  # uniform in a step of 2^-3 at the worst, 2^-4 at the best


def test_shards_with_scales_in_other_files(folder):
    """DeepSeek's shards end between a matrix and its scale; the scale then opens the next file."""
    expected = load_model(folder).state_dict()
    stored = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    parts = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in stored.items():
        parts["b.safetensors" if name.endswith("_scale_inv") or len(name) % 3 == 0 else "a.safetensors"][name] = tensor
    for file, tensors in parts.items():
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in parts.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, tensor in load_model(folder).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_our_own_shards(folder, tmp_path):
    expected = load_model(folder).state_dict()
    save_checkpoint(build(), tmp_path / "shards", torch.bfloat16, shard_bytes=200_000, fp8=True)
    files = list((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(files) > 5
    index = json.loads((tmp_path / "shards" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files for t in load_file(file).values())
    assert all(index["weight_map"][name] == file.name for file in files for name in load_file(file))
    for name, tensor in load_model(tmp_path / "shards").state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("stored_as", ["float32", "bfloat16", "float8_e8m0fnu"])
def test_as_transformers_and_v31_write_it(folder, stored_as):
    """Power-of-two scales in fp32 (V3.1), in ue8m0 (transformers), scales in bf16, and transformers' extra keys."""
    from teacher.fp8 import quantize

    plain = dequantized(load_file(folder / WEIGHTS), torch.float32)

    def requantise(tensors):
        for name in [name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn]:
            tensors[name], scale = quantize(plain[name], power_of_two=True)
            tensors[name + "_scale_inv"] = scale.to(getattr(torch, stored_as))

    change(folder, requantise)
    more = {"modules_to_not_convert": ["lm_head"], "scale_fmt": "ue8m0", "dequantize": False}
    set_config(folder, quantization_config=SETTINGS | more)
    expected = dequantized(load_file(folder / WEIGHTS), torch.float32)
    load_model(folder, "float32").save_pretrained(folder / "plain")
    for name, tensor in load_file(folder / "plain" / WEIGHTS).items():
        assert torch.equal(tensor, expected[name]), name


def test_transformers_reads_the_same_values(tmp_path):
    """Dimensions of whole blocks (or one block): what transformers' dequantisation can do."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    sizes = {
        "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "q_lora_rank": 128,
        "kv_lora_rank": 96, "qk_nope_head_dim": 32, "v_head_dim": 32, "num_nextn_predict_layers": 0,
        "qk_rope_head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 4,
    }  # fmt: skip
    build(**sizes, attention_bias=False, initializer_range=0.05).save_pretrained(tmp_path, fp8=True)
    settings = transformers.FineGrainedFP8Config(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=settings
    )
    ours = load_model(tmp_path, "float32")
    ids_BT = torch.randint(0, 263, (2, 40))
    with torch.no_grad():
        expected = theirs(ids_BT).logits
        error = (ours(ids_BT).logits - expected).abs().max() / expected.abs().max()
    assert error < 1e-4
    names = dict(theirs.named_parameters())
    compared = 0
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, names[name]), name
        compared += 1
    assert compared == len(names)


def test_transformers_takes_a_ragged_block_for_a_smaller_one():
    """It divides the rows by the number of scales: 576 rows in 5 blocks, as V3's kv_a_proj_with_mqa has, fail, and
    240 in 2 are read as blocks of 120. Here, as in DeepSeek's own kernel, the last block is what is left."""
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    from teacher.fp8 import dequantize, quantize

    theirs = module.Fp8Dequantize(None)
    torch.manual_seed(0)
    x = torch.randn(576, 128)
    values, scale = quantize(x)
    assert (dequantize(values, scale, torch.float32) - x).abs().max() < 0.25
    with pytest.raises(ValueError, match="not divisible"):
        theirs.convert({"weight$": [values], "weight_scale_inv": [scale]})
    x = torch.randn(240, 128)
    x[128:] *= 100
    values, scale = quantize(x)
    found = theirs.convert({"weight$": [values], "weight_scale_inv": [scale]})["weight"]
    assert (dequantize(values, scale, torch.float32) - x).abs().max() < 25
    assert (found - x).abs().max() > 100


def refused(folder, *parts):
    with pytest.raises(ValueError) as error:
        load_model(folder)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "gptq"}, "quantization_config.quant_method is 'gptq'; expected 'fp8'"),
        ({"quant_method": None}, "quantization_config.quant_method is None"),
        ({"fmt": "e5m2"}, "quantization_config.fmt is 'e5m2'; expected 'e4m3'"),
        ({"activation_scheme": "static"}, "quantization_config.activation_scheme is 'static'; expected 'dynamic'"),
        ({"scale_fmt": "e3m4"}, "quantization_config.scale_fmt is 'e3m4'; expected 'float' or 'ue8m0'"),
        ({"weight_block_size": None}, "quantization_config.weight_block_size is None; expected [128, 128]"),
        ({"weight_block_size": [128]}, "quantization_config.weight_block_size is [128]"),
        ({"weight_block_size": [0, 128]}, "quantization_config.weight_block_size is [0, 128]"),
        ({"weight_block_size": [64, 64]}, "blocks of [64, 64] asks for"),
    ],
)
def test_wrong_quantization_config(folder, changes, message):
    set_config(folder, quantization_config=SETTINGS | changes)
    refused(folder, message)


def test_config_and_tensors_that_contradict_each_other(folder, tmp_path):
    set_config(folder, quantization_config=None)
    refused(folder, WEIGHTS, "is of FP8, but config.json has no quantization_config")
    build().save_pretrained(tmp_path / "plain")
    set_config(tmp_path / "plain", quantization_config=SETTINGS)
    refused(tmp_path / "plain", "config.json: quantization_config is set, but no stored matrix is in FP8")


def test_missing_scale(folder):
    change(folder, lambda tensors: tensors.pop(Q_A + "_scale_inv"))
    refused(folder, WEIGHTS, f"{Q_A} is in FP8, but {Q_A}_scale_inv is missing")


def test_scale_of_nothing(folder):
    change(folder, lambda tensors: tensors.update({"lm_head.weight_scale_inv": torch.ones(3, 2)}))
    refused(folder, WEIGHTS, "lm_head.weight_scale_inv belongs to no FP8 matrix")


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (4,), ()])
def test_misshaped_scale(folder, shape):
    change(folder, lambda tensors: tensors.update({Q_A + "_scale_inv": torch.ones(shape)}))
    refused(folder, f"{Q_A}_scale_inv has shape {list(shape)}; a matrix of [130, 160] in blocks of [128, 128] asks for")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_senseless_scale(folder, value):
    change(folder, lambda tensors: tensors[Q_A + "_scale_inv"][0, 1].fill_(value))
    refused(folder, WEIGHTS, f"{Q_A}_scale_inv holds a scale that is negative or not finite")


def test_wrong_dtypes(folder):
    original = load_file(folder / WEIGHTS)
    for name, dtype, message in (
        (Q_A + "_scale_inv", torch.int32, "_scale_inv is I32; expected one of F32"),
        (Q_A, torch.float8_e5m2, f"{Q_A} is F8_E5M2; expected floating point"),
        (Q_A, torch.int8, f"{Q_A} is I8"),
        ("model.norm.weight", torch.float8_e4m3fn, "model.norm.weight is F8_E4M3"),
    ):
        save_file(original | {name: original[name].float().to(dtype)}, folder / WEIGHTS)
        refused(folder, WEIGHTS, message)


def test_values_that_fp8_cannot_store(tmp_path):
    model = build()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts\.3\.down_proj\.weight holds values"):
        model.save_pretrained(tmp_path, fp8=True)
    assert not list(tmp_path.glob("*.safetensors")) and not (tmp_path / "config.json").exists()
