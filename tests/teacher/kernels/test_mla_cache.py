"""The FP8 rows of the latent cache: the kernel writes what the definition writes, byte for byte."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from teacher.kernels.mla_append import append
from teacher.kernels.mla_cache import pack, row_bytes, unpack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(512, 64), (384, 64), (128, 16), (32, 16), (16, 8)]


def latents(count, rank, rope, seed=0):
    """Rows whose tiles differ in size by powers of two, with subnormals, a tile of zeros and an outlier among them."""
    generator = torch.Generator().manual_seed(seed)
    x_NC = torch.randn(count, rank + rope, generator=generator)
    x_NC *= torch.exp2(torch.randint(-8, 5, (count, 1), generator=generator).float())
    x_NC[:, ::3] *= 2.0**-9
    x_NC[0, :rank] = 0.0
    x_NC[-1, 1] = 300.0
    return x_NC.bfloat16().to(DEVICE)


@pytest.mark.parametrize(("rank", "rope"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_append_writes_the_definitions_bytes_and_nothing_else(rank, rope, dtype):
    x_NC = latents(77, rank, rope).to(dtype)
    cache_PGW = torch.full((5, 32, row_bytes(rank, rope)), 0xA5, dtype=torch.uint8, device=DEVICE)
    place_N = (torch.randperm(4 * 32 - 1, generator=torch.Generator().manual_seed(1))[:77] + 32).to(DEVICE)
    expected_PGW = cache_PGW.clone()
    expected_PGW.flatten(0, 1)[place_N] = pack(x_NC, rank)
    append(cache_PGW, place_N, x_NC, rank)
    assert torch.equal(cache_PGW, expected_PGW)


def test_rows_of_a_strided_tensor():
    x_NC = latents(5, 32, 16)
    wide = torch.full((5, 100), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    wide[:, :48] = x_NC
    cache = torch.zeros(2, 16, row_bytes(32, 16), dtype=torch.uint8, device=DEVICE)
    append(cache, torch.arange(16, 21, device=DEVICE), wide[:, :48], 32)
    assert torch.equal(cache[1, :5], pack(x_NC, 32))


@pytest.mark.parametrize(("rank", "rope"), SHAPES)
def test_a_row_gives_its_latent_back_to_e4m3s_step(rank, rope):
    x_NC = latents(50, rank, rope, seed=2)
    back_NC = unpack(pack(x_NC, rank), rank, rope, torch.float32)
    tiles = x_NC[:, :rank].float().split(128, dim=1)
    step_NR = torch.cat([(t.abs().amax(1, keepdim=True) / 448 * 2.0**-10).expand_as(t) for t in tiles], dim=1)
    bound_NR = torch.maximum(x_NC[:, :rank].float().abs() * 2.0**-4, step_NR) * 1.001
    assert ((back_NC[:, :rank] - x_NC[:, :rank].float()).abs() <= bound_NR).all()
    assert torch.equal(back_NC[:, rank:], x_NC[:, rank:].float())


def test_deepseeks_row_is_656_bytes():
    assert row_bytes(512, 64) == 656
    assert pack(torch.randn(3, 576), 512).shape == (3, 656)


def test_what_append_cannot_take_is_named():
    cache = torch.zeros(2, 16, 656, dtype=torch.uint8, device=DEVICE)
    place = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"bfloat16 cache of shape \(2, 16, 656\)"):
        append(cache.bfloat16(), place, torch.randn(3, 576, device=DEVICE), 512)
    with pytest.raises(ValueError, match="68 a row"):
        append(cache, place, torch.randn(3, 48, device=DEVICE), 32)
    with pytest.raises(ValueError, match=r"latents are \[4, 576\], places \[3\]"):
        append(cache, place, torch.randn(4, 576, device=DEVICE), 512)
    with pytest.raises(ValueError, match="kv_lora_rank % 4"):
        row_bytes(30, 8)
