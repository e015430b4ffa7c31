"""One decoder layer: latent attention, then a dense or a mixture-of-experts feed-forward, each behind an RMSNorm."""

from __future__ import annotations

from torch import Tensor, nn

from teacher.attention import MultiHeadLatentAttention, View
from teacher.config import DeepseekV3Config
from teacher.experts import MLP, MoE
from teacher.norm import RMSNorm
from teacher.routing import Routing
from teacher.segments import Packing


class DecoderLayer(nn.Module):
    """Layer `layer` of the model; the first `first_k_dense_replace` layers are dense (DeepSeek-V3 section 4.2)."""

    def __init__(self, config: DeepseekV3Config, layer: int) -> None:
        super().__init__()
        self.self_attn = MultiHeadLatentAttention(config)
        self.mlp: nn.Module
        if config.is_moe_layer(layer):
            self.mlp = MoE(config)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, x_BTH: Tensor, cos_BTD: Tensor, sin_BTD: Tensor, packing: Packing
    ) -> tuple[Tensor, Tensor, Routing | None]:
        """The layer's output, the latents to cache, and the routing (None in a dense layer)."""
        attended, latent_BTC = self.self_attn(self.input_layernorm(x_BTH), cos_BTD, sin_BTD, packing)
        x_BTH = x_BTH + attended
        fed, routing = self.feed_forward(x_BTH)
        return x_BTH + fed, latent_BTC, routing

    def extend(self, x_BTH: Tensor, cos_BTD: Tensor, sin_BTD: Tensor, view: View, absorbed: bool) -> Tensor:
        """The layer's output for new tokens of cached sequences."""
        x_BTH = x_BTH + self.self_attn.extend(self.input_layernorm(x_BTH), cos_BTD, sin_BTD, view, absorbed)
        fed_BTH, _ = self.feed_forward(x_BTH)
        return x_BTH + fed_BTH

    def feed_forward(self, x_BTH: Tensor) -> tuple[Tensor, Routing | None]:
        """The feed-forward half without its residual."""
        normed = self.post_attention_layernorm(x_BTH)
        if isinstance(self.mlp, MoE):
            return self.mlp(normed)
        return self.mlp(normed), None
