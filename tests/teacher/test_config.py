"""config.json: what is read, what is written, what is refused."""

import json

import pytest

from teacher.config import DeepseekV3Config
from tests.tiny import deepseek_config

# The published config.json of DeepSeek-R1, without its quantization_config.
R1 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0, "eos_token_id": 1,
    "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.46.3",
    "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip


def test_published_config_is_read():
    config = DeepseekV3Config.from_dict(R1)
    assert (config.q_lora_rank, config.n_routed_experts, config.dtype) == (1536, 256, "bfloat16")
    assert config.rope_scaling is not None and config.rope_scaling["factor"] == 40
    assert config.latent_dim == 576
    written = config.to_dict()
    assert {name for name in R1 if name in written and written[name] != R1[name]} == set()


@pytest.mark.parametrize("rope_scaling", [None, deepseek_config().rope_scaling])
def test_round_trip_through_transformers(tmp_path, rope_scaling):
    transformers = pytest.importorskip("transformers")
    config = deepseek_config(rope_scaling=rope_scaling, rope_theta=5000.0, q_lora_rank=None, routed_scaling_factor=1.5)
    config.to_json(tmp_path / "config.json")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_theta"] == 5000.0
    assert theirs.rope_parameters["rope_type"] == ("yarn" if rope_scaling else "default")
    assert theirs.num_mtp_layers == 1 and theirs.q_lora_rank is None
    theirs.save_pretrained(tmp_path / "theirs")  # now with rope_parameters, theta inside
    assert "rope_parameters" in json.loads((tmp_path / "theirs/config.json").read_text())
    back = DeepseekV3Config.from_json(tmp_path / "theirs")
    assert back == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; expected 'deepseek_v3'"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'; expected 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"hidden_size": 0}, "hidden_size is 0; expected a positive integer"),
        ({"vocab_size": "many"}, "vocab_size is 'many'; expected a positive integer"),
        ({"q_lora_rank": -1}, "q_lora_rank is -1"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7; expected an even number"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1"),
        ({"n_group": 3}, "n_group is 3"),
        ({"topk_group": 9}, "topk_group is 9"),
        ({"num_experts_per_tok": 200}, "num_experts_per_tok is 200; expected at most the 128 experts"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type is 'linear'"),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 64}}, "rope_scaling.factor is None"),
        ({"rope_scaling": 4}, "rope_scaling is 4"),
        ({"torch_dtype": "float33"}, "dtype is 'float33'; expected one of float32"),
        ({"torch_dtype": 16}, "dtype is 16"),
        ({"torch_dtype": "bfloat16", "dtype": "float16"}, "dtype is 'float16'; expected torch_dtype ('bfloat16')"),
        ({"num_mtp_layers": 2}, "num_nextn_predict_layers is 1; expected num_mtp_layers (2)"),
        ({"qk_head_dim": 128}, "qk_head_dim is 128; expected 192"),
        ({"head_dim": 192}, "head_dim is 192; expected 64"),
        ({"rope_parameters": R1["rope_scaling"] | {"rope_theta": 1e6}}, "rope_parameters.rope_theta is 1000000.0"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "rope_parameters.factor is 4; expected what is"),
        ({"rope_theta": "big"}, "rope_theta is 'big'; expected a positive number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; expected a positive number"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'; expected true or false"),
        ({"quantization_config": "fp8"}, "quantization_config is 'fp8'; expected an object or null"),
    ],
)
def test_wrong_field_is_named(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(R1 | changes))
    with pytest.raises(ValueError) as error:
        DeepseekV3Config.from_json(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path / "config.json") in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        DeepseekV3Config.from_json(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        DeepseekV3Config.from_json(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object, found list"):
        DeepseekV3Config.from_json(tmp_path)
