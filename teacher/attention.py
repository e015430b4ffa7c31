"""Multi-head latent attention: keys and values are rebuilt from one small latent a token, which is all that is cached.

DeepSeek-V2 arXiv 2405.04434 section 2.1; DeepSeek-V3 section 2.1.1 (eq. 1-11).

Shapes: B batch, T query tokens, S cached tokens, H heads, N = qk_nope_head_dim, D = qk_rope_head_dim, V = v_head_dim,
R = kv_lora_rank, C = R + D the cached latent.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teacher.config import DeepseekV3Config
from teacher.norm import RMSNorm
from teacher.rope import rotate, softmax_scale


class MultiHeadLatentAttention(nn.Module):
    """One layer of MLA. `forward` expands keys and values (training, prefill); `decode` stays in the latent space."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config = config
        heads, hidden, bias = config.num_attention_heads, config.hidden_size, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            # The two latent norms keep 1e-6 whatever rms_norm_eps says, as in DeepSeek's modelling code.
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=1e-6)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.latent_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, eps=1e-6)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=bias)
        self.scale = softmax_scale(config)

    def queries(self, x_BTH: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Query parts without and with position: (B, T, H, N) and (B, T, H, D)."""
        config = self.config
        if config.q_lora_rank is None:
            q = self.q_proj(x_BTH)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTH)))
        q_nope, q_rope = q.unflatten(-1, (config.num_attention_heads, -1)).split(
            (config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1
        )
        return q_nope, rotate(q_rope, cos_BTD.unsqueeze(2), sin_BTD.unsqueeze(2), config.rope_interleave)

    def latents(self, x_BTH: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
        """What is cached for these tokens: normalised key-value latent and rotated shared key, (B, T, C)."""
        config = self.config
        kv_BTR, k_rope_BTD = self.kv_a_proj_with_mqa(x_BTH).split((config.kv_lora_rank, config.qk_rope_head_dim), -1)
        k_rope_BTD = rotate(k_rope_BTD, cos_BTD, sin_BTD, config.rope_interleave)
        kv_BTR = self.kv_a_layernorm(kv_BTR)
        return torch.cat((kv_BTR, k_rope_BTD.to(kv_BTR.dtype)), dim=-1)

    def forward(
        self, x_BTH: Tensor, cos_BTD: Tensor, sin_BTD: Tensor, mask_B1TT: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Causal attention of the tokens among themselves; `mask_B1TT` (added to scores) replaces the causal mask.

        Returns the output (B, T, hidden) and the latents (B, T, C) for a cache.
        """
        config = self.config
        q_nope_BTHN, q_rope_BTHD = self.queries(x_BTH, cos_BTD, sin_BTD)
        latent_BTC = self.latents(x_BTH, cos_BTD, sin_BTD)
        kv_BTR, k_rope_BTD = latent_BTC.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        k_nope_BTHN, v_BTHV = (
            self.kv_b_proj(kv_BTR)
            .unflatten(-1, (config.num_attention_heads, -1))
            .split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
        )
        k_rope_BTHD = k_rope_BTD.unsqueeze(2).expand(-1, -1, config.num_attention_heads, -1)
        q = torch.cat((q_nope_BTHN, q_rope_BTHD.to(q_nope_BTHN.dtype)), dim=-1).transpose(1, 2)
        k = torch.cat((k_nope_BTHN, k_rope_BTHD.to(k_nope_BTHN.dtype)), dim=-1).transpose(1, 2)
        # The CPU's flash kernel wants equal head sizes; without it attention takes three times as long.
        padding = max(config.qk_head_dim - config.v_head_dim, 0) if q.device.type == "cpu" else 0
        v = F.pad(v_BTHV, (0, padding)).transpose(1, 2) if padding else v_BTHV.transpose(1, 2)
        out_BHTV = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask_B1TT, is_causal=mask_B1TT is None, scale=self.scale
        )[..., : config.v_head_dim]
        return self.o_proj(out_BHTV.transpose(1, 2).flatten(2)), latent_BTC
