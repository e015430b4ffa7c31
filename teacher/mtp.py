"""Multi-token prediction: a module that reads the main model's last hidden state and the next token, and predicts one
token further. DeepSeek-V3 section 2.2 (eq. 21-23). Embedding and output head are the main model's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from teacher.config import DeepseekV3Config
from teacher.layer import DecoderLayer
from teacher.norm import RMSNorm
from teacher.routing import Routing
from teacher.segments import Packing


class SharedHead(nn.Module):
    """The module's own norm before the shared output head (on disk `shared_head.norm`)."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class MTPLayer(DecoderLayer):
    """The k-th MTP module; on disk it is layer num_hidden_layers + k - 1, beside copies of embedding and head."""

    def __init__(self, config: DeepseekV3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.enorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config)

    def predict(
        self, previous_BTH: Tensor, embedded_BTH: Tensor, cos_BTD: Tensor, sin_BTD: Tensor, packing: Packing
    ) -> tuple[Tensor, Tensor, Routing | None]:
        """From hidden states at positions i and embeddings of tokens i + k: h_i^k before the head's norm (eq. 21-22).

        `previous_BTH` of the first module is the main model's hidden state after its final norm, and `eh_proj` reads
        the embedding first: this is how DeepSeek's weights are served by vLLM and transformers.
        """
        return self(self.join(previous_BTH, embedded_BTH), cos_BTD, sin_BTD, packing)

    def join(self, previous_BTH: Tensor, embedded_BTH: Tensor) -> Tensor:
        """The module's input from a hidden state and the embedding of a later token (eq. 21)."""
        return self.eh_proj(torch.cat((self.enorm(embedded_BTH), self.hnorm(previous_BTH)), dim=-1))
