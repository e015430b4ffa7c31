"""Multi-head latent attention: keys and values are rebuilt from one small latent a token, which is all that is cached.

DeepSeek-V2 arXiv 2405.04434 section 2.1; DeepSeek-V3 section 2.1.1 (eq. 1-11).

Shapes: B batch, T query tokens, S tokens of context, H heads, N = qk_nope_head_dim, D = qk_rope_head_dim,
V = v_head_dim, R = kv_lora_rank, C = R + D the cached latent, K = N + D, P places in the cache (in a
PagedView: pages of G tokens), W = C, or the bytes of a row in FP8.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teacher.config import DeepseekV3Config
from teacher.kernels.arguments import obstacle
from teacher.kernels.mla_cache import pack, unpack
from teacher.norm import RMSNorm
from teacher.rope import rotate, softmax_scale
from teacher.segments import Packing


class CacheView(NamedTuple):
    """Where the tokens of one call lie in one layer's cache."""

    cache_PW: Tensor  # a token a row
    write_BT: Tensor  # the place of each new token; padding is written to a place that nobody reads
    read_BS: Tensor  # the place of each position from 0 on
    bias_BTS: Tensor  # 0 where a new token sees a position, else -inf


class FreshView(NamedTuple):
    """The same for sequences of which nothing was cached before, on a GPU: causal among the new tokens, whose own
    latents are all the context. Padding is on the right, where causal attention does not see it."""

    cache_PW: Tensor
    write_BT: Tensor


class PagedView(NamedTuple):
    """The places for the decoding kernel, which finds pages and bounds by itself; for absorbed attention alone."""

    cache_PGW: Tensor
    write_BT: Tensor
    table_BP: Tensor
    position_BT: Tensor  # -1: padding
    first_B: Tensor | None  # the first position that a sequence sees, if not 0


View: TypeAlias = CacheView | FreshView | PagedView


class MultiHeadLatentAttention(nn.Module):
    """One layer of MLA: `forward` without a cache (training, scoring), `extend` with one."""

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
        expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, expanded, bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=bias)
        self.scale = softmax_scale(config)

    def queries(self, x_BTH: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Query parts without and with position: (B, T, H, N) and (B, T, H, D)."""
        q_nope, q_rope = self._projected(x_BTH)
        return q_nope, rotate(q_rope, cos_BTD.unsqueeze(2), sin_BTD.unsqueeze(2), self.config.rope_interleave)

    def _projected(self, x_BTH: Tensor) -> tuple[Tensor, Tensor]:
        """`queries` before the rotation."""
        config = self.config
        if config.q_lora_rank is None:
            q = self.q_proj(x_BTH)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTH)))
        q_nope, q_rope = q.unflatten(-1, (config.num_attention_heads, -1)).split(
            (config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1
        )
        return q_nope, q_rope

    def latents(self, x_BTH: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
        """What is cached for these tokens: normalised key-value latent and rotated shared key, (B, T, C)."""
        config = self.config
        kv_BTR, k_rope_BTD = self.kv_a_proj_with_mqa(x_BTH).split((config.kv_lora_rank, config.qk_rope_head_dim), -1)
        k_rope_BTD = rotate(k_rope_BTD, cos_BTD, sin_BTD, config.rope_interleave)
        kv_BTR = self.kv_a_layernorm(kv_BTR)
        return torch.cat((kv_BTR, k_rope_BTD), dim=-1)

    def forward(self, x_BTH: Tensor, cos_BTD: Tensor, sin_BTD: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        """Causal attention of the tokens among themselves, within the segments that `packing` says.

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
        q = torch.cat((q_nope_BTHN, q_rope_BTHD), dim=-1).transpose(1, 2)
        k = torch.cat((k_nope_BTHN, k_rope_BTHD), dim=-1).transpose(1, 2)
        out_BHTV = scaled_dot_product(q, k, v_BTHV.transpose(1, 2), packing, self.scale)
        return self.o_proj(out_BHTV.transpose(1, 2).flatten(2)), latent_BTC

    def extend(self, x_BTH: Tensor, cos_BTD: Tensor, sin_BTD: Tensor, view: View, absorbed: bool) -> Tensor:
        """New tokens of sequences whose earlier latents are cached; stores theirs. Returns (B, T, hidden).

        `absorbed` (V2 section 2.1.2): kv_b_proj's key half is applied to the query and its value half to the attended
        latent, so that keys and values are never rebuilt and all heads read one cache entry: right for decoding, where
        a token looks at many. Otherwise keys and values of the context are rebuilt once for all T tokens, which costs
        fewer products when T is large: right for prefill.
        """
        config = self.config
        heads, rank = config.num_attention_heads, config.kv_lora_rank
        latent_BTC = self.latents(x_BTH, cos_BTD, sin_BTD)
        if isinstance(view, PagedView):
            assert absorbed
            return self._decode(*self.queries(x_BTH, cos_BTD, sin_BTD), latent_BTC, view)
        fp8 = view.cache_PW.dtype == torch.uint8
        rows_BTW = pack(latent_BTC, rank) if fp8 else latent_BTC
        view.cache_PW[view.write_BT] = rows_BTW
        fresh = isinstance(view, FreshView)
        assert not (fresh and absorbed)
        context_BSC = rows_BTW if isinstance(view, FreshView) else view.cache_PW[view.read_BS]
        if fp8:
            context_BSC = unpack(context_BSC, rank, config.qk_rope_head_dim, x_BTH.dtype)
        if not absorbed:
            k_nope_BSHN, v_BSHV = (
                self.kv_b_proj(context_BSC[..., :rank])
                .unflatten(-1, (heads, -1))
                .split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
            )
            k_rope_BSHD = context_BSC[..., rank:].unsqueeze(2).expand(-1, -1, heads, -1)
            q_nope_BTHN, q_rope_BTHD = self._projected(x_BTH)
            turn = cos_BTD, sin_BTD
            q_BHTK = _joined(q_nope_BTHN, q_rope_BTHD, turn, config.rope_interleave).transpose(1, 2)
            k_BHSK = _joined(k_nope_BSHN, k_rope_BSHD, None, config.rope_interleave).transpose(1, 2)
            mask_B1TS = None if isinstance(view, FreshView) else view.bias_BTS.unsqueeze(1)
            out_BHTV = F.scaled_dot_product_attention(
                q_BHTK, k_BHSK, v_BSHV.transpose(1, 2), attn_mask=mask_B1TS, is_causal=fresh, scale=self.scale
            )
            return self.o_proj(out_BHTV.transpose(1, 2).flatten(2))
        assert isinstance(view, CacheView)
        up_k_HNR, up_v_HVR = self._up()
        q_nope_BTHN, q_rope_BTHD = self.queries(x_BTH, cos_BTD, sin_BTD)
        q_latent_BTHR = torch.einsum("bthn,hnr->bthr", q_nope_BTHN, up_k_HNR)
        q_BQC = torch.cat((q_latent_BTHR, q_rope_BTHD), dim=-1).flatten(1, 2)  # Q = T * H: one key head serves all
        # The entry serves as key, and whole as value too: the CPU's flash kernel wants equal sizes.
        latent_BQR = F.scaled_dot_product_attention(
            q_BQC.unsqueeze(1), context_BSC.unsqueeze(1), context_BSC.unsqueeze(1),
            attn_mask=view.bias_BTS.repeat_interleave(heads, dim=1).unsqueeze(1), scale=self.scale,
        ).squeeze(1)[..., :rank]  # fmt: skip
        value_BTHV = torch.einsum("bthr,hvr->bthv", latent_BQR.unflatten(1, (-1, heads)), up_v_HVR)
        return self.o_proj(value_BTHV.flatten(2))

    def _decode(self, q_nope_BTHN: Tensor, q_rope_BTHD: Tensor, latent_BTC: Tensor, view: PagedView) -> Tensor:
        """The absorbed form by kernels, without a copy of the context."""
        from teacher.kernels.mla_append import append
        from teacher.kernels.mla_decode import mla_decode

        if view.cache_PGW.dtype == torch.uint8:
            append(view.cache_PGW, view.write_BT.flatten(), latent_BTC.flatten(0, 1), self.config.kv_lora_rank)
        else:
            view.cache_PGW.flatten(0, 1)[view.write_BT] = latent_BTC
        up_k_HNR, up_v_HVR = self._up()
        q_latent_BTHR = torch.einsum("bthn,hnr->bthr", q_nope_BTHN, up_k_HNR)
        attended_BTHR = mla_decode(
            q_latent_BTHR, q_rope_BTHD, view.cache_PGW, view.table_BP, view.position_BT, self.scale, view.first_B
        )
        return self.o_proj(torch.einsum("bthr,hvr->bthv", attended_BTHR, up_v_HVR).flatten(2))

    def _up(self) -> tuple[Tensor, Tensor]:
        """kv_b_proj's key half (H, N, R) and value half (H, V, R)."""
        config = self.config
        weight_HXR = self.kv_b_proj.weight.view(config.num_attention_heads, -1, config.kv_lora_rank)
        up_k_HNR, up_v_HVR = weight_HXR.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
        return up_k_HNR, up_v_HVR


def _joined(nope_BTHN: Tensor, rope_BTHD: Tensor, turn: tuple[Tensor, Tensor] | None, interleave: bool) -> Tensor:
    """Heads (B, T, H, K) of both parts, the second rotated if `turn` (cos and sin, (B, T, D / 2)) is given."""
    bf16 = nope_BTHN.dtype == torch.bfloat16
    if nope_BTHN.is_cuda and bf16 and not torch.is_grad_enabled() and obstacle(nope_BTHN.device) is None:
        from teacher.kernels.heads import join
        from teacher.kernels.latents import Rotation

        rotation = None
        if turn is not None:
            cos_ND, sin_ND = (table.flatten(0, 1).contiguous() for table in turn)
            rotation = Rotation(cos_ND, sin_ND, interleave)
        return join(nope_BTHN.flatten(0, 1), rope_BTHD.flatten(0, 1), rotation).view(*nope_BTHN.shape[:3], -1)
    if turn is not None:
        rope_BTHD = rotate(rope_BTHD, turn[0].unsqueeze(2), turn[1].unsqueeze(2), interleave)
    return torch.cat((nope_BTHN, rope_BTHD), dim=-1)


def scaled_dot_product(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, packing: Packing, scale: float) -> Tensor:
    """Causal attention within segments, in the form that this device has a fast kernel for.

    The CPU's flash kernel wants equal head sizes (three times as slow without: values are padded with zeros), and its
    bf16 backward takes twice the time of its fp32 one on rows of a few hundred tokens (so training goes through fp32).
    """
    dtype, size = q_BHTK.dtype, v_BHTV.shape[-1]
    if q_BHTK.device.type != "cpu":
        assert not isinstance(packing, list)
        mask = None if packing is None else packing.to(dtype)
        return F.scaled_dot_product_attention(
            q_BHTK, k_BHTK, v_BHTV, attn_mask=mask, is_causal=mask is None, scale=scale
        )
    if torch.is_grad_enabled():
        q_BHTK, k_BHTK, v_BHTV = q_BHTK.float(), k_BHTK.float(), v_BHTV.float()
    if size < q_BHTK.shape[-1]:
        v_BHTV = F.pad(v_BHTV, (0, q_BHTK.shape[-1] - size))
    with torch.autocast("cpu", enabled=False):
        if isinstance(packing, list):
            out_BHTV = _by_segment(q_BHTK, k_BHTK, v_BHTV, packing, scale)
        else:
            mask = None if packing is None else packing.to(q_BHTK.dtype)
            out_BHTV = F.scaled_dot_product_attention(
                q_BHTK, k_BHTK, v_BHTV, attn_mask=mask, is_causal=mask is None, scale=scale
            )
    return out_BHTV[..., :size].to(dtype)


def _by_segment(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, lengths: list[int], scale: float) -> Tensor:
    """Causal attention of each segment alone; `split` keeps the backward pass at one concatenation."""
    q, k, v = (x.transpose(1, 2).flatten(0, 1).split(lengths) for x in (q_BHTK, k_BHTK, v_BHTK))
    outputs = []
    for q_THK, k_THK, v_THK in zip(q, k, v, strict=True):
        q_1HTK, k_1HTK, v_1HTK = (x.transpose(0, 1).unsqueeze(0) for x in (q_THK, k_THK, v_THK))
        out_1HTK = F.scaled_dot_product_attention(q_1HTK, k_1HTK, v_1HTK, is_causal=True, scale=scale)
        outputs.append(out_1HTK.squeeze(0).transpose(0, 1))
    return torch.cat(outputs).unflatten(0, (q_BHTK.shape[0], -1)).transpose(1, 2)
