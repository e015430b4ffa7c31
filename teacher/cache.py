"""The latent cache: for each token and layer the compressed key-value latent and the shared rotary key, nothing else.

DeepSeek-V2 section 2.1.4: kv_lora_rank + qk_rope_head_dim values a token a layer (576 for V3), against
2 * heads * head_dim for ordinary attention (32,768 for V3's sizes).

Shapes: L layers, S slots (one sequence each), M tokens a slot has room for, C = latent_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teacher.config import DeepseekV3Config


class LatentCache:
    """A fixed number of slots, each with room for `max_len` tokens. The engine keeps those in use at the front."""

    def __init__(
        self, config: DeepseekV3Config, slots: int, max_len: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        # Zeros, not empty: positions past a sequence's end are read and multiplied by 0, which NaN would survive.
        self.latents_LSMC = torch.zeros(
            config.num_hidden_layers, slots, max_len, config.latent_dim, dtype=dtype, device=device
        )

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one cached token takes, over all layers."""
        layers, _, _, values = self.latents_LSMC.shape
        return layers * values * self.latents_LSMC.element_size()

    def write_prompts(self, latents: list[Tensor], rows_B: Tensor, first_slot: int) -> None:
        """Store the prefilled latents, per layer (P, T, C), of prompt `rows_B[i]` in slot `first_slot + i`."""
        slots, length = rows_B.shape[0], latents[0].shape[1]
        for layer, latent_PTC in enumerate(latents):
            self.latents_LSMC[layer, first_slot : first_slot + slots, :length] = latent_PTC[rows_B]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of slot `source` into slot `target`."""
        self.latents_LSMC[:, target, :length] = self.latents_LSMC[:, source, :length]
