"""The paged latent cache: for each token and layer the compressed key-value latent and the shared rotary key, no more.

DeepSeek-V2 section 2.1.4: kv_lora_rank + qk_rope_head_dim values a token a layer (576 for V3), against
2 * heads * head_dim for ordinary attention (32,768 for V3's sizes). Pages: PagedAttention, arXiv 2309.06180.

Shapes: L layers (MTP modules that draft are last), P pages, G tokens a page, C = latent_dim; in FP8, bytes of a row.
"""

from __future__ import annotations

import torch

from teacher.config import DeepseekV3Config
from teacher.kernels.mla_cache import row_bytes


class LatentCache:
    """`pages` pages of `page_size` tokens. Page 0 is never handed out: padding is written there and never looked at.

    dtype uint8: rows of FP8 (see teacher.kernels.mla_cache).
    """

    def __init__(
        self, config: DeepseekV3Config, layers: int, pages: int, page_size: int, dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:  # fmt: skip
        # Zeros, not empty: unused entries are read and multiplied by 0, which NaN would survive.
        self.latents_LPGC = torch.zeros(
            layers, pages + 1, page_size, row_size(config, dtype), dtype=dtype, device=device
        )

    @property
    def page_size(self) -> int:
        return self.latents_LPGC.shape[2]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one cached token takes, over all layers."""
        layers, _, _, values = self.latents_LPGC.shape
        return layers * values * self.latents_LPGC.element_size()

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page in all layers."""
        self.latents_LPGC[:, target] = self.latents_LPGC[:, source]


def row_size(config: DeepseekV3Config, dtype: torch.dtype) -> int:
    """Values of `dtype` that a token takes in a layer. Raises ValueError for a model whose rows FP8 does not fit."""
    return row_bytes(config.kv_lora_rank, config.qk_rope_head_dim) if dtype == torch.uint8 else config.latent_dim
