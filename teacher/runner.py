"""One step of the model over cached sequences, in torch: any device, any dtype. `teacher.native` is its CPU twin.

Shapes: N new tokens (of all sequences, one after another), B sequences, T new tokens of the longest, M tokens whose
logits are wanted, S slots (in a view: positions of context), P pages a slot, G tokens a page, H hidden, V vocabulary,
L layers, C latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from teacher.attention import CacheView, FreshView, PagedView, View
from teacher.cache import LatentCache
from teacher.config import DeepseekV3Config
from teacher.fused import FusedModel, fused_obstacle
from teacher.model import DeepseekV3
from teacher.sampling import Settings, sample
from teacher.slots import Slots

# Tokens of a step, those of padding included, that are run by the fused kernels in any case: short prompts too.
_FEW = 64


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
    """Runs `model` over the sequences of `cache`; with `kernels`, absorbed attention by the MLA decoding kernel, and
    the rest of such a step by fused ones (`teacher.fused`) where they can."""

    name = "torch"

    def __init__(self, model: DeepseekV3, cache: LatentCache, kernels: bool = False) -> None:
        self.model, self.cache, self._kernels = model, cache, kernels
        self.device = model.lm_head.weight.device
        self._fused: FusedModel | None = None
        if kernels:
            self.name += ", MLA decode in Triton"
            if fused_obstacle(model) is None:
                self._fused = FusedModel(model)
                self.name += ", fused steps"

    @torch.inference_mode()
    def forward(self, batch: Batch, wanted_M: np.ndarray) -> tuple[Tensor, Tensor]:
        """Logits (M, V) of the tokens `wanted_M` (indices into N), and the hidden states (N, H) of all."""
        rows = _Rows(batch, self.cache.page_size, self.device)
        hidden_NH = rows.flat(self.extend(rows.tokens_BT, rows.position_BT, rows.table_BP, rows.fresh))
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
        fresh = rows.fresh and not first_B.any()
        given = rows.tokens_BT, rows.position_BT, rows.table_BP, hidden_BTH, first_B1
        out_NH = rows.flat(self.extend_draft(*given, fresh=fresh))
        wanted_MH = out_NH[_index(wanted_M, self.device)]
        return self.model.lm_head(self.model.mtp_layers[0].shared_head.norm(wanted_MH)), out_NH

    def extend(self, tokens_BT: Tensor, position_BT: Tensor, table_BP: Tensor, fresh: bool = False) -> Tensor:
        """Hidden states (B, T, H) of new tokens; positions of padding are -1. `fresh`: nothing is before them."""
        layers = slice(self.model.config.num_hidden_layers)
        views, absorbed = self._views(layers, position_BT, table_BP, None, fresh)
        if self._fused is not None and isinstance(views[0], PagedView):
            return self._fused.extend(tokens_BT, position_BT, cast(Sequence[PagedView], views))
        return self.model.extend(tokens_BT, position_BT.clamp_min(0), views, absorbed)

    def extend_draft(
        self, tokens_BT: Tensor, position_BT: Tensor, table_BP: Tensor, hidden_BTH: Tensor, first_B1: Tensor,
        fresh: bool = False,
    ) -> Tensor:  # fmt: skip
        """The draft module's output (B, T, H)."""
        last = self.model.config.num_hidden_layers
        (view,), absorbed = self._views(slice(last, last + 1), position_BT, table_BP, first_B1, fresh)
        if self._fused is not None and isinstance(view, PagedView):
            return self._fused.draft(hidden_BTH, tokens_BT, position_BT, view)
        return self.model.draft(hidden_BTH, tokens_BT, position_BT.clamp_min(0), view, absorbed)

    def _views(
        self, layers: slice, position_BT: Tensor, table_BP: Tensor, first_B1: Tensor | None, fresh: bool = False
    ) -> tuple[Sequence[View], bool]:
        """What attention is told of these layers' caches, and whether it is to run in the absorbed form."""
        layers_LPGW = self.cache.latents_LPGC[layers]
        new, page_size = position_BT.shape[1], layers_LPGW.shape[2]
        cheaper = absorbed_is_cheaper(self.model.config, new, table_BP.shape[1] * page_size)
        absorbed = cheaper or self._few(position_BT.numel())
        if self._kernels and absorbed:
            from teacher.kernels.places import places

            write_BT = places(position_BT, table_BP, page_size)
            first_B = None if first_B1 is None else first_B1.squeeze(1)
            return [PagedView(layer, write_BT, table_BP, position_BT, first_B) for layer in layers_LPGW], True
        write_BT = _places(position_BT, table_BP, page_size)
        if fresh and not absorbed and self.device.type == "cuda":
            return [FreshView(layer.flatten(0, 1), write_BT) for layer in layers_LPGW], False
        read_BS, bias_BTS = _context(position_BT, table_BP, first_B1, page_size, self.model.lm_head.weight.dtype)
        return [CacheView(layer.flatten(0, 1), write_BT, read_BS, bias_BTS) for layer in layers_LPGW], absorbed

    def _few(self, tokens: int) -> bool:
        """Whether launches cost more than products: then a step takes the fewest, by the fused kernels, whichever form
        of attention would be cheaper."""
        return self._fused is not None and tokens <= _FEW

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

    def drafts(self, hidden_BH: Tensor, slots: Slots, rows_B: np.ndarray, drafts: int) -> np.ndarray | None:
        """So many tokens (B, G) drafted behind the newest one of each sequence, from the hidden state of its last
        cached one, in one go; None where that is done step by step."""
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
        self.fresh = not batch.position_N[batch.last_B + 1 - batch.count_B].any()  # all begin at position 0
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


def _places(position_BT: Tensor, table_BP: Tensor, page_size: int) -> Tensor:
    """Where new tokens are written. Page 0 belongs to nobody: padding goes there."""
    inside_BT = position_BT.clamp_min(0)
    place_BT = table_BP.long().gather(1, inside_BT // page_size) * page_size + inside_BT % page_size
    return torch.where(position_BT < 0, 0, place_BT)


def _context(
    position_BT: Tensor, table_BP: Tensor, first_B1: Tensor | None, page_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Where every position lies, and what each token sees. Made on the device: a long context has many indices."""
    inside_BT = position_BT.clamp_min(0)
    offset_G = torch.arange(page_size, device=position_BT.device)
    read_BS = (table_BP.long().unsqueeze(-1) * page_size + offset_G).flatten(1)
    seen_S = torch.arange(read_BS.shape[1], device=position_BT.device)
    unseen_BTS = seen_S > inside_BT.unsqueeze(-1)
    if first_B1 is not None:
        # Padding must see something too, or its softmax is NaN: itself.
        unseen_BTS |= (seen_S < first_B1.unsqueeze(-1)) & (seen_S != inside_BT.unsqueeze(-1))
    bias_BTS = torch.zeros(unseen_BTS.shape, dtype=dtype, device=position_BT.device)
    return read_BS, bias_BTS.masked_fill_(unseen_BTS, float("-inf"))


def _index(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)
