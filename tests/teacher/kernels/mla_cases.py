"""Random MLA decode problems whose cache is NaN wherever the kernel must not read; for tests and the bench."""

from __future__ import annotations

import random

import pytest
import torch

from teacher.kernels.cuda.build import library
from teacher.kernels.mla_cache import pack, row_bytes
from teacher.kernels.mla_decode import mla_decode
from teacher.kernels.mla_reference import mla_decode_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Which kernels a test is about: both on a GPU.
PATHS = ["triton", "cuda"] if DEVICE == "cuda" else ["triton"]


def needs(path):
    if path == "cuda" and isinstance(reason := library("mla_decode"), str):
        pytest.skip(reason)


class Case:
    """Random queries over a paged cache of `lengths` tokens; the newest `tokens` of each sequence ask."""

    def __init__(self, lengths, heads, tokens=1, rank=512, rope=64, page_size=64, fp8=False, seed=0, spread=1.0):
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=draw)

        rows, self.rank, self.rope, self.scale = len(lengths), rank, rope, 1 / (rank + rope) ** 0.5
        most = -(-max(lengths) // page_size)
        numbers = list(range(1, 1 + rows * most + 3))
        random.Random(seed).shuffle(numbers)
        self.table_BP = torch.zeros(rows, most, dtype=torch.int32)
        # What the latents are before any cache rounds them; a few tokens weigh most, as in trained models.
        self.latent_BSC = (normal(rows, most * page_size, rank + rope) * spread).bfloat16()
        width = row_bytes(rank, rope) if fp8 else rank + rope
        cache = torch.full((len(numbers) + 1, page_size, width), float("nan"), dtype=torch.bfloat16)
        if fp8:
            cache = torch.full(cache.shape, 0xFF, dtype=torch.uint8)  # NaN in each of the three formats
        for row, length in enumerate(lengths):
            used = -(-length // page_size)
            pages = [numbers.pop() for _ in range(used)]
            self.table_BP[row, :used] = torch.tensor(pages)
            rows_SW = pack(self.latent_BSC[row, :length], rank) if fp8 else self.latent_BSC[row, :length]
            for start, page in zip(range(0, length, page_size), pages, strict=True):
                part = rows_SW[start : start + page_size]
                cache[page, : len(part)] = part
        self.cache_PGW = cache.to(DEVICE)
        self.table_BP = self.table_BP.to(DEVICE)
        self.position_BT = torch.stack([torch.arange(n - tokens, n).clamp_min(-1) for n in lengths]).to(DEVICE)
        self.q_latent = (normal(rows, tokens, heads, rank) * 3).bfloat16().to(DEVICE)
        self.q_rope = (normal(rows, tokens, heads, rope) * 3).bfloat16().to(DEVICE)

    def run(self, **options):
        out = torch.full(self.q_latent.shape, float("nan"), dtype=options.pop("dtype", torch.bfloat16), device=DEVICE)
        arguments = self.q_latent, self.q_rope, self.cache_PGW, self.table_BP, self.position_BT, self.scale
        return mla_decode(*arguments, out=out, **options)

    def reference(self, first_B=None):
        """What the kernel should compute from the bytes of the cache."""
        return mla_decode_reference(
            self.q_latent, self.q_rope, self.cache_PGW, self.table_BP, self.position_BT, self.scale, first_B
        )

    def truth(self):
        """What no cache had rounded."""
        latents = self.latent_BSC.to(DEVICE).float()
        seen_BTS = torch.arange(latents.shape[1], device=DEVICE) <= self.position_BT.unsqueeze(-1)
        query = torch.cat((self.q_latent, self.q_rope), -1).float()
        scores = torch.einsum("bthc,bsc->bths", query, latents) * self.scale
        weights = scores.masked_fill(~seen_BTS.unsqueeze(2), float("-inf")).softmax(-1)
        return torch.einsum("bths,bsr->bthr", weights, latents[..., : self.rank])


def error(found, expected):
    expected = expected.float()
    assert expected.abs().max() > 0
    return float((found.float() - expected).norm() / expected.norm())
