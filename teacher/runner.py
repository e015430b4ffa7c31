"""One step of the model over cached sequences, in torch: any device, any dtype. `teacher.native` is its CPU twin.

Shapes: N new tokens (of all sequences, one after another), B sequences, T new tokens of the longest, M tokens whose
logits are wanted, S slots (in a view: positions of context), P pages a slot, G tokens a page, H hidden, V vocabulary,
L layers, C latent.
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

    name = "torch"

    def __init__(self, model: DeepseekV3, cache: LatentCache) -> None:
        self.model, self.cache = model, cache
        self.device = model.lm_head.weight.device

    @torch.inference_mode()
    def forward(self, batch: Batch, wanted_M: np.ndarray) -> tuple[Tensor, Tensor]:
        """Logits (M, V) of the tokens `wanted_M` (indices into N), and the hidden states (N, H) of all."""
        rows = _Rows(batch, self.cache.page_size, self.device)
        hidden_NH = rows.flat(self.extend(rows.tokens_BT, rows.position_BT, rows.table_BP))
        return self.model.lm_head(hidden_NH[_index(wanted_M, self.device)]), hidden_NH

    @torch.inference_mode()
    def draft(
        self, hidden_NH: Tensor, batch: Batch, first_B: np.ndarray, wanted_M: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Logits (M, V) of the draft module and its output (N, H), from hidden states and the tokens after them.

        `batch.tokens_N` are these next tokens, `batch.position_N` the positions of the hidden states; a sequence looks
        no further back than its `first_B`.
        """
        rows = _Rows(batch, self.cache.page_size, self.device)
        hidden_BTH, first_B1 = rows.pad(hidden_NH), _index(first_B, self.device).unsqueeze(1)
        out_NH = rows.flat(self.extend_draft(rows.tokens_BT, rows.position_BT, rows.table_BP, hidden_BTH, first_B1))
        wanted_MH = out_NH[_index(wanted_M, self.device)]
        return self.model.lm_head(self.model.mtp_layers[0].shared_head.norm(wanted_MH)), out_NH

    def extend(self, tokens_BT: Tensor, position_BT: Tensor, table_BP: Tensor) -> Tensor:
        """Hidden states (B, T, H) of new tokens; positions of padding are -1."""
        layers = self.cache.latents_LPGC[: self.model.config.num_hidden_layers]
        views = _views(layers, position_BT, table_BP, None)
        absorbed = absorbed_is_cheaper(self.model.config, tokens_BT.shape[1], views[0].read_BS.shape[1])
        return self.model.extend(tokens_BT, position_BT.clamp_min(0), views, absorbed)

    def extend_draft(
        self, tokens_BT: Tensor, position_BT: Tensor, table_BP: Tensor, hidden_BTH: Tensor, first_B1: Tensor
    ) -> Tensor:
        """The draft module's output (B, T, H)."""
        last = self.model.config.num_hidden_layers
        (view,) = _views(self.cache.latents_LPGC[last : last + 1], position_BT, table_BP, first_B1)
        absorbed = absorbed_is_cheaper(self.model.config, tokens_BT.shape[1], view.read_BS.shape[1])
        return self.model.draft(hidden_BTH, tokens_BT, position_BT.clamp_min(0), view, absorbed)

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


class _Rows:
    """The sequences of a batch as rows padded on the right, on the device."""

    def __init__(self, batch: Batch, page_size: int, device: torch.device) -> None:
        longest, self._device = int(batch.count_B.max()), device
        real_BT = np.arange(longest) < batch.count_B[:, None]
        self._full = bool(real_BT.all())
        self._row_N, self._column_N = np.nonzero(real_BT)
        tokens_BT = np.zeros(real_BT.shape, dtype=np.int64)
        position_BT = np.full(real_BT.shape, -1, dtype=np.int64)
        tokens_BT[real_BT], position_BT[real_BT] = batch.tokens_N, batch.position_N
        pages = int(batch.position_N.max()) // page_size + 1
        table_BP = np.ascontiguousarray(batch.table_SP[batch.slot_B, :pages])
        self.tokens_BT, self.position_BT, self.table_BP = (
            _index(values, device) for values in (tokens_BT, position_BT, table_BP)
        )

    def pad(self, values_NH: Tensor) -> Tensor:
        """Values of the new tokens as (B, T, H)."""
        if self._full:
            return values_NH.view(*self.tokens_BT.shape, -1)
        padded_BTH = values_NH.new_zeros(*self.tokens_BT.shape, values_NH.shape[-1])
        padded_BTH[_index(self._row_N, self._device), _index(self._column_N, self._device)] = values_NH
        return padded_BTH

    def flat(self, values_BTH: Tensor) -> Tensor:
        """The new tokens' rows of (B, T, H), as (N, H)."""
        if self._full:
            return values_BTH.flatten(0, 1)
        return values_BTH[_index(self._row_N, self._device), _index(self._column_N, self._device)]


def _views(layers_LPGC: Tensor, position_BT: Tensor, table_BP: Tensor, first_B1: Tensor | None) -> list[CacheView]:
    """What attention is told of each layer's cache. Computed on the device: the indices of a long context are many."""
    page_size, pages_BP = layers_LPGC.shape[2], table_BP.long()
    inside_BT = position_BT.clamp_min(0)
    place_BT = pages_BP.gather(1, inside_BT // page_size) * page_size + inside_BT % page_size
    # Page 0 belongs to nobody: padding is written there.
    write_BT = torch.where(position_BT < 0, 0, place_BT)
    offset_G = torch.arange(page_size, device=position_BT.device)
    read_BS = (pages_BP.unsqueeze(-1) * page_size + offset_G).flatten(1)
    seen_S = torch.arange(read_BS.shape[1], device=position_BT.device)
    unseen_BTS = seen_S > inside_BT.unsqueeze(-1)
    if first_B1 is not None:
        # Padding must see something too, or its softmax is NaN: itself.
        unseen_BTS |= (seen_S < first_B1.unsqueeze(-1)) & (seen_S != inside_BT.unsqueeze(-1))
    bias_BTS = torch.zeros(unseen_BTS.shape, dtype=layers_LPGC.dtype, device=position_BT.device)
    bias_BTS.masked_fill_(unseen_BTS, float("-inf"))
    return [CacheView(layer_PGC.flatten(0, 1), write_BT, read_BS, bias_BTS) for layer_PGC in layers_LPGC]


def _index(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)
