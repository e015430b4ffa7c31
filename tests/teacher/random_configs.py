"""Random small DeepSeek-V3 configs, drawn over everything that changes the computation."""

import random
from typing import Any

import torch

from teacher.config import DeepseekV3Config
from tests.tiny import deepseek_config


def random_config(draw: random.Random | int) -> DeepseekV3Config:
    """A config from a seed, or from a generator of hypothesis's `st.randoms`, which can shrink it."""
    rng = random.Random(draw) if isinstance(draw, int) else draw
    groups = rng.choice([1, 2, 4])
    topk_group = rng.randint(1, groups)
    per_group = rng.choice([2, 3, 4])
    heads = rng.choice([1, 2, 4])
    layers = rng.randint(1, 4)
    return deepseek_config(
        vocab_size=rng.choice([50, 97]),
        hidden_size=rng.choice([16, 24, 40]),
        intermediate_size=rng.choice([20, 48]),
        moe_intermediate_size=rng.choice([8, 12]),
        num_hidden_layers=layers,
        first_k_dense_replace=rng.randint(0, layers),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        n_shared_experts=rng.randint(1, 2),
        n_routed_experts=groups * per_group,
        n_group=groups,
        topk_group=topk_group,
        num_experts_per_tok=rng.randint(1, topk_group * 2),
        norm_topk_prob=rng.random() < 0.7,
        routed_scaling_factor=rng.choice([1.0, 2.5]),
        num_nextn_predict_layers=rng.randint(0, 2),
        q_lora_rank=rng.choice([None, 12, 20]),
        kv_lora_rank=rng.choice([8, 16]),
        qk_nope_head_dim=rng.choice([4, 8, 12]),
        qk_rope_head_dim=rng.choice([4, 8]),
        v_head_dim=rng.choice([4, 8, 24]),
        attention_bias=rng.random() < 0.2,
        rope_theta=rng.choice([1e4, 1e6]),
        rope_scaling=_random_yarn(rng) if rng.random() < 0.6 else None,
        rope_interleave=rng.random() < 0.6,
        max_position_embeddings=256,
        rms_norm_eps=rng.choice([1e-6, 1e-5]),
        bos_token_id=None,
        eos_token_id=3,
        pad_token_id=None,
    )


def _random_yarn(rng: random.Random) -> dict[str, Any]:
    """YaRN's settings. mscale and mscale_all_dim come together or not at all: with one alone transformers differs."""
    rope: dict[str, Any] = {"type": "yarn", "factor": rng.choice([1.0, 4.0, 40.0])}
    rope["original_max_position_embeddings"] = rng.choice([16, 64])
    rope |= rng.choice([{}, {"beta_fast": 32, "beta_slow": 1}, {"beta_fast": 8, "beta_slow": 2}])
    return rope | rng.choice([{}, {"mscale": 1.0, "mscale_all_dim": 1.0}, {"mscale": 0.7, "mscale_all_dim": 1.2}])


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Norm weights, biases and the selection bias away from their initial ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 1:
                scale = 1.0 if name.endswith("e_score_correction_bias") else 0.3
                tensor += scale * torch.randn(tensor.shape, generator=generator)
