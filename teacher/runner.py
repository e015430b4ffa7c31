"""One step of the model over cached sequences, in torch: any device, any dtype. `teacher.native` is its CPU twin.

Shapes: N new tokens (of all sequences, one after another), B sequences, T new tokens of the longest, M tokens whose
logits are wanted, S slots, P pages a slot, H hidden, V vocabulary, C latent, L positions of context.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from teacher.attention import CacheView
from teacher.cache import LatentCache
from teacher.config import DeepseekV3Config
from teacher.model import DeepseekV3
from teacher.sampling import Settings, sample
from teacher.slots import Slots


class Batch(NamedTuple):
    """New tokens of some sequences, arrays on the host."""

    tokens_N: np.ndarray  # int32
    position_N: np.ndarray  # int64; consecutive within a sequence
    slot_B: np.ndarray  # int64: the table row of each sequence
    count_B: np.ndarray  # int64: its number of new tokens, at least 1
    table_SP: np.ndarray  # int32: pages by slot

    @property
    def last_B(self) -> np.ndarray:
        """Where each sequence's last new token stands."""
        return self.count_B.cumsum() - 1


class TorchRunner:
    """Runs `model` over the sequences of `cache`."""

    def __init__(self, model: DeepseekV3, cache: LatentCache) -> None:
        self.model, self.cache = model, cache
        self.device = model.lm_head.weight.device

    @torch.inference_mode()
    def forward(self, batch: Batch, wanted_M: np.ndarray) -> tuple[Tensor, Tensor]:
        """Logits (M, V) of the tokens `wanted_M` (indices into N), and the hidden states (N, H) of all."""
        layout = _Layout(batch, self.cache.page_size, self.device)
        absorbed = absorbed_is_cheaper(self.model.config, layout.longest, layout.context)
        pages = self.cache.latents_LPGC[: self.model.config.num_hidden_layers]
        views = [layout.view(layer_PGC, None) for layer_PGC in pages]
        hidden_BTH = self.model.extend(layout.pad(batch.tokens_N), layout.position_BT, views, absorbed)
        hidden_NH = layout.flat(hidden_BTH)
        return self.model.lm_head(hidden_NH[_index(wanted_M, self.device)]), hidden_NH

    @torch.inference_mode()
    def draft(
        self, hidden_NH: Tensor, batch: Batch, first_B: np.ndarray, wanted_M: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Logits (M, V) of the draft module and its output (N, H), from hidden states and the tokens after them.

        `batch.tokens_N` are these next tokens, `batch.position_N` the positions of the hidden states; a sequence looks
        no further back than its `first_B`.
        """
        layout = _Layout(batch, self.cache.page_size, self.device)
        absorbed = absorbed_is_cheaper(self.model.config, layout.longest, layout.context)
        view = layout.view(self.cache.latents_LPGC[self.model.config.num_hidden_layers], first_B)
        out_BTH = self.model.draft(
            layout.pad_tensor(hidden_NH), layout.pad(batch.tokens_N), layout.position_BT, view, absorbed
        )
        out_NH = layout.flat(out_BTH)
        wanted_MH = out_NH[_index(wanted_M, self.device)]
        return self.model.lm_head(self.model.mtp_layers[0].shared_head.norm(wanted_MH)), out_NH

    @torch.inference_mode()
    def draw(self, logits_MV: Tensor, slots: Slots, slot_M: np.ndarray, counter_M: np.ndarray) -> np.ndarray:
        """The token of each row of logits: the `counter_M`-th of the request in slot `slot_M`."""
        settings = Settings(
            *(
                _index(x[slot_M], self.device)
                for x in (slots.temperature_S, slots.top_p_S, slots.top_k_S, slots.min_p_S, slots.seed_S)
            )
        )
        return sample(logits_MV, settings, _index(counter_M, self.device)).cpu().numpy()

    def round(self, slots: Slots, rows_B: np.ndarray, drafts: int) -> np.ndarray | None:
        """A whole round of `teacher.decoding.decode` in one go, and how many tokens it brought each sequence, where a
        runner has a way to do that; None where, as here, it is done step by step."""
        return None

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        """Copy pages of the cache, (from, to)."""
        for source, target in pairs:
            self.cache.copy_page(source, target)


def absorbed_is_cheaper(config: DeepseekV3Config, new: int, context: int) -> bool:
    """Whether `new` tokens over `context` take fewer products in the latent space than with keys and values rebuilt."""
    rank, key, value = config.kv_lora_rank, config.qk_nope_head_dim, config.v_head_dim
    absorbed = new * rank * (key + value) + new * context * (config.latent_dim + rank)
    expanded = context * rank * (key + value) + new * context * (config.qk_head_dim + value)
    return absorbed <= expanded


class _Layout:
    """The sequences of a batch as rows padded on the right, and where their tokens lie in the cache."""

    def __init__(self, batch: Batch, page_size: int, device: torch.device) -> None:
        rows, self.longest = len(batch.count_B), int(batch.count_B.max())
        self.context = int(batch.position_N.max()) + 1
        self.device = device
        self.full = bool((batch.count_B == self.longest).all())
        column_T = np.arange(self.longest)
        real_BT = column_T < batch.count_B[:, None]
        self._row_N, self._column_N = np.nonzero(real_BT)
        self._shape = (rows, self.longest)
        position_BT = np.zeros(self._shape, dtype=np.int64)
        position_BT[real_BT] = batch.position_N
        pages_BT = np.take_along_axis(batch.table_SP[batch.slot_B], position_BT // page_size, axis=1)
        # Page 0 belongs to nobody: padding is written there.
        write_BT = np.where(real_BT, pages_BT.astype(np.int64) * page_size + position_BT % page_size, 0)
        used = -(-self.context // page_size)
        start_BP = batch.table_SP[batch.slot_B, :used].astype(np.int64) * page_size
        read_BL = (start_BP[:, :, None] + np.arange(page_size)).reshape(rows, -1)[:, : self.context]
        self.position_BT, self.write_BT, self.read_BL = (
            torch.from_numpy(x).to(device) for x in (position_BT, write_BT, np.ascontiguousarray(read_BL))
        )

    def pad(self, values_N: np.ndarray) -> Tensor:
        """Integers of the new tokens as (B, T)."""
        padded_BT = np.zeros(self._shape, dtype=np.int64)
        padded_BT[self._row_N, self._column_N] = values_N
        return torch.from_numpy(padded_BT).to(self.device)

    def pad_tensor(self, values_NH: Tensor) -> Tensor:
        """Values of the new tokens as (B, T, H)."""
        if self.full:
            return values_NH.view(*self._shape, -1)
        padded_BTH = values_NH.new_zeros(*self._shape, values_NH.shape[-1])
        padded_BTH[_index(self._row_N, self.device), _index(self._column_N, self.device)] = values_NH
        return padded_BTH

    def flat(self, values_BTH: Tensor) -> Tensor:
        """The new tokens' rows of (B, T, H), as (N, H)."""
        if self.full:
            return values_BTH.flatten(0, 1)
        return values_BTH[_index(self._row_N, self.device), _index(self._column_N, self.device)]

    def view(self, layer_PGC: Tensor, first_B: np.ndarray | None) -> CacheView:
        """What attention is told of one layer's cache; positions before `first_B` are not looked at."""
        seen_L = torch.arange(self.context, device=self.device)
        unseen_BTL = seen_L > self.position_BT.unsqueeze(-1)
        if first_B is not None:
            unseen_BTL |= seen_L < _index(first_B, self.device)[:, None, None]
            # A row of padding must see something, or its softmax is NaN.
            unseen_BTL &= seen_L != self.position_BT.unsqueeze(-1)
        bias_BTL = torch.zeros(unseen_BTL.shape, dtype=layer_PGC.dtype, device=self.device)
        bias_BTL.masked_fill_(unseen_BTL, float("-inf"))
        return CacheView(layer_PGC.view(-1, layer_PGC.shape[-1]), self.write_BT, self.read_BL, bias_BTL)


def _index(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)
