"""Packing, decoding and the MTP modules, against the plain forward."""

import pytest
import torch

from teacher import load_model
from teacher.cache import LatentCache
from teacher.model import segment_positions
from tests.teacher.random_configs import randomize
from tests.tiny import deepseek_config


def fresh(seed=0, **changes):
    torch.manual_seed(seed)
    model = load_model(deepseek_config(**changes))
    randomize(model, seed)
    return model


def test_cache_holds_the_latents_and_no_more():
    config = deepseek_config()
    cache = LatentCache(config, config.num_hidden_layers, 7, 5, torch.bfloat16, "cpu")
    assert cache.bytes_per_token == config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * 2
    assert cache.latents_LPGC.nbytes == cache.bytes_per_token * 5 * (7 + 1)


def test_packed_rows_equal_separate_rows():
    model = fresh()
    parts = [torch.randint(0, 263, (1, length)) for length in (13, 1, 26)]
    segments_BT = torch.cat([torch.full((1, part.shape[1]), number) for number, part in enumerate(parts)], dim=1)
    packed_BTV = model(torch.cat(parts, dim=1), segment_ids_BT=segments_BT).logits
    alone_BTV = torch.cat([model(part).logits for part in parts], dim=1)
    torch.testing.assert_close(packed_BTV, alone_BTV, rtol=1e-4, atol=1e-4)


def test_packed_gradients_equal_separate_gradients():
    model = fresh()
    parts = [torch.randint(0, 263, (1, length)) for length in (9, 22)]
    segments_BT = torch.cat([torch.full((1, part.shape[1]), number) for number, part in enumerate(parts)], dim=1)
    model(torch.cat(parts, dim=1), segment_ids_BT=segments_BT).logits.square().sum().backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if "layers.3" not in name}
    model.zero_grad()
    sum(model(part).logits.square().sum() for part in parts).backward()
    for name, parameter in model.named_parameters():
        if name in packed:
            assert (parameter.grad - packed[name]).norm() < 1e-4 * packed[name].norm() + 1e-6, name


def test_right_padding_changes_nothing():
    model = fresh()
    ids_BT = torch.randint(0, 263, (2, 20))
    padded_BT = torch.nn.functional.pad(ids_BT, (0, 9), value=258)
    torch.testing.assert_close(model(padded_BT).logits[:, :20], model(ids_BT).logits, rtol=1e-4, atol=1e-4)


def test_segment_positions_restart():
    ids = torch.tensor([[4, 4, 4, 7, 7, 4, 0, 0], [1, 2, 2, 2, 2, 3, 3, 3]])
    assert segment_positions(ids).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 0, 1, 2]]


def test_autocast_is_near_fp32():
    # Without routed layers: there a rounding may send a token to another expert, and no bound holds.
    model = fresh(first_k_dense_replace=3, num_nextn_predict_layers=0)
    ids_BT = torch.randint(0, 263, (2, 50))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low_BTV = model(ids_BT).logits
    high_BTV = model(ids_BT).logits
    assert low_BTV.dtype == torch.bfloat16
    assert (low_BTV.float() - high_BTV).norm() < 0.03 * high_BTV.norm()
    low_BTV.float().square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_too_long_an_input_is_refused():
    with pytest.raises(ValueError, match="input of 513 tokens is longer than max_position_embeddings \\(512\\)"):
        fresh()(torch.zeros(1, 513, dtype=torch.long))


@pytest.mark.parametrize("depths", [1, 2])
def test_mtp_sees_the_tokens_it_should(depths):
    model = fresh(num_nextn_predict_layers=depths)
    ids_BT = torch.randint(0, 263, (1, 20))
    changed_BT = ids_BT.clone()
    changed_BT[0, 12] += 1
    before, after = (model(ids, mtp=True) for ids in (ids_BT, changed_BT))
    torch.testing.assert_close(before.logits, model(ids_BT).logits)
    for depth in range(1, depths + 1):
        difference_T = (before.mtp_logits[depth - 1] - after.mtp_logits[depth - 1]).abs().amax(-1)[0]
        assert len(difference_T) == 20 - depth
        # Position i reads tokens up to i + depth, so token 12 is first seen at position 12 - depth.
        assert difference_T[: 12 - depth].max() < 1e-5
        assert difference_T[12 - depth] > 1e-4


def test_mtp_trains_the_shared_embedding_and_head():
    model = fresh()
    output = model(torch.randint(0, 263, (1, 20)), mtp=True)
    assert len(output.routing) == 3  # two MoE layers and the MTP module's
    output.mtp_logits[0].logsumexp(-1).sum().backward()
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.3.eh_proj.weight"):
        assert model.get_parameter(name).grad.abs().sum() > 0


def test_mtp_equals_transformers():
    layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(layers, "MtpLayer"):
        pytest.skip("this transformers has no MTP")
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    model = fresh()
    module = model.mtp_layers[0]
    config = theirs.DeepseekV3Config(**{k: v for k, v in model.config.to_dict().items() if k != "model_type"})
    config._attn_implementation = "eager"
    layer = layers.MtpLayer(config, theirs.DeepseekV3DecoderLayer, theirs.DeepseekV3RMSNorm, 3)
    weights = {f"mtp_block.{name}": tensor for name, tensor in module.state_dict().items()}
    for name in ("enorm.weight", "hnorm.weight", "eh_proj.weight"):
        weights[name] = weights.pop(f"mtp_block.{name}")
    weights["post_norm.weight"] = weights.pop("mtp_block.shared_head.norm.weight")
    layer.load_state_dict(weights)
    ids_BT = torch.randint(0, 263, (1, 20))
    with torch.no_grad():
        output = model(ids_BT, mtp=True)
        rotary = theirs.DeepseekV3RotaryEmbedding(config)
        positions = torch.arange(19).unsqueeze(0)
        mask = torch.full((19, 19), float("-inf")).triu(1)[None, None]
        hidden_BTH = layer(
            model.model.embed_tokens(ids_BT[:, 1:]),
            output.hidden[:, :-1],
            position_embeddings=rotary(output.hidden, positions),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=None,
        )
        torch.testing.assert_close(output.mtp_logits[0], model.lm_head(hidden_BTH), rtol=1e-4, atol=1e-4)
