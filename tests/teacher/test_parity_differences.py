"""Where transformers computes something else than DeepSeek's own code: what each does, and that we follow DeepSeek."""

import math

import pytest
import torch

from teacher import load_model
from teacher.rope import rotate, rotation_scale, rotation_table, softmax_scale
from teacher.routing import Router
from tests.tiny import deepseek_config

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
theirs = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")


def their_config(config):
    fields = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    return transformers.DeepseekV3Config(**fields)


def deepseek_mscale(factor, mscale):
    """`yarn_get_mscale` of DeepSeek's modeling_deepseek.py."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@pytest.mark.parametrize(
    ("keys", "same"),
    [
        ({}, True),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, True),
        ({"mscale": 0.7, "mscale_all_dim": 1.2}, True),
        ({"mscale": 0.7}, False),
        ({"mscale_all_dim": 1.0}, False),
    ],
)
def test_yarn_with_one_mscale_alone(keys, same):
    rope = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64} | keys
    config = deepseek_config(rope_scaling=rope)
    # `DeepseekV3YarnRotaryEmbedding(mscale=1, mscale_all_dim=0)` scales cos and sin so:
    mscale, all_dim = keys.get("mscale", 1.0), keys.get("mscale_all_dim", 0.0)
    deepseeks = deepseek_mscale(40.0, mscale) / deepseek_mscale(40.0, all_dim)
    assert rotation_scale(config) == pytest.approx(deepseeks)
    found = theirs.DeepseekV3RotaryEmbedding(their_config(config)).attention_scaling
    assert (found == pytest.approx(deepseeks)) == same
    # On the scale of the scores the two agree.
    attention = theirs.DeepseekV3Attention(their_config(config), 0)
    assert softmax_scale(config) == pytest.approx(attention.scaling)


def test_groups_not_selected_are_masked_with_minus_infinity():
    """Negative biased scores everywhere: a mask of 0 would choose exactly the experts that are not allowed."""
    torch.manual_seed(0)
    config = deepseek_config(n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4)
    router, other = Router(config), theirs.DeepseekV3TopkRouter(their_config(config))
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias += 0.3 * torch.randn(16) - 3
    other.load_state_dict(router.state_dict())
    x_NH = torch.randn(100, config.hidden_size)
    found = router(x_NH)
    biased_NGE = (found.scores_NE + router.e_score_correction_bias).unflatten(1, (4, 4))
    assert (biased_NGE < 0).all()
    best_NG = biased_NGE.topk(2, dim=-1).values.sum(-1).topk(2).indices
    assert (found.indices_NK.unsqueeze(2) // 4 == best_NG.unsqueeze(1)).any(2).all()
    _, _, indices_NK = other(x_NH)
    assert torch.equal(indices_NK.sort().values, found.indices_NK.sort().values)


def test_rotation_of_bf16_is_computed_in_fp32():
    """DeepSeek multiplies complex fp32 numbers and rounds once; transformers rounds cos and sin to bf16 before."""
    torch.manual_seed(0)
    config = deepseek_config(max_position_embeddings=512, qk_rope_head_dim=16)
    cos_TD, sin_TD = rotation_table(config, 512)
    x_1HTD = torch.randn(1, 4, 512, 16).bfloat16()
    pairs = torch.view_as_complex(x_1HTD.float().unflatten(-1, (-1, 2)))
    exact = torch.view_as_real(pairs * torch.complex(cos_TD, sin_TD))
    exact = torch.cat((exact[..., 0], exact[..., 1]), dim=-1)  # our order, and theirs: first halves, second halves
    ours = rotate(x_1HTD, cos_TD, sin_TD, interleave=True)
    assert (ours == exact.bfloat16()).float().mean() > 0.999
    cos, sin = (torch.cat((table, table), -1).bfloat16().unsqueeze(0) for table in (cos_TD, sin_TD))
    other, _ = theirs.apply_rotary_pos_emb_interleave(x_1HTD, x_1HTD, cos, sin)
    assert (other - exact).abs().mean() > 1.5 * (ours - exact).abs().mean()
    assert (other.float() - exact).abs().max() < 0.1


def test_transformers_finds_our_mtp_weights(tmp_path):
    """It looks for MTP modules under `model.layers.61` alone, so the model has 61 layers."""
    layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(layers, "MtpModel"):
        pytest.skip("this transformers has no MTP")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_attention_heads": 1}
    config = deepseek_config(num_hidden_layers=61, first_k_dense_replace=60, num_key_value_heads=1, **sizes)
    ours = load_model(config)
    ours.save_pretrained(tmp_path)
    main = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    found = layers.MtpModel.from_pretrained(main).layers[0].state_dict()
    assert found
    expected = ours.mtp_layers[0].state_dict()
    expected["post_norm.weight"] = expected.pop("shared_head.norm.weight")
    assert {name.removeprefix("mtp_block.") for name in found} == set(expected)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name.removeprefix("mtp_block.")]), name
