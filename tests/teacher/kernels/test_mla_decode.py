"""MLA decode against fp32 truth. What the kernel must not read is NaN: other pages, the rest of last pages, page 0."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from teacher.kernels.mla_cache import pack, unpack
from teacher.kernels.mla_decode import CONFIGS, Config, choose_splits, mla_decode
from tests.teacher.kernels.mla_cases import DEVICE, PATHS, Case, error, needs

# bf16: weights rounded to 2^-9 and the output to 2^-9 (the interpreter cuts off instead of rounding: 2^-8).
BOUND = 6e-3


LENGTHS = [1, 63, 64, 65, 577, 1088]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("heads", "splits"), [(16, 1), (16, 5), (128, 5)])
def test_deepseeks_sizes_at_any_length(heads, splits, fp8, path):
    needs(path)
    # The interpreter takes a minute for all lengths at 128 heads: two blocks of them, one tile and three.
    case = Case(LENGTHS if DEVICE == "cuda" or heads == 16 else [1, 130], heads, fp8=fp8)
    assert error(case.run(splits=splits, path=path), case.reference()) < BOUND


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("tokens", [2, 3, 5])
def test_new_tokens_are_causal_among_themselves(tokens, fp8, path):
    needs(path)
    case = Case([5, 64, 66, 200], 16, tokens, fp8=fp8)
    found = case.run(path=path)
    assert error(found, case.reference()) < BOUND
    for row in range(4):  # alone, each token must see the same
        for token in range(tokens):
            assert error(found[row, token], case.reference()[row, token]) < 2 * BOUND


@pytest.mark.parametrize(
    ("rank", "rope", "heads", "page_size"),
    [(512, 64, 4, 16), (512, 64, 4, 128), (384, 64, 16, 64), (128, 16, 20, 64), (32, 16, 4, 16), (16, 8, 2, 128)],
)
@pytest.mark.parametrize("fp8", [False, True])
def test_other_ranks_and_page_sizes(rank, rope, heads, page_size, fp8):
    case = Case([1, 17, 130, 90], heads, 2, rank, rope, page_size, fp8=fp8)
    # Row 0 has one token for two queries: the first is padding.
    assert case.position_BT[0].tolist() == [-1, 0]
    found = case.run()
    assert not found[0, 0].any()
    assert error(found, case.reference()) < BOUND


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("heads", "block_n"), [(16, 16), (16, 32), (16, 64), (32, 32), (32, 64), (64, 32), (64, 64)])
def test_tiles_of_any_size_compute_the_same(heads, block_n, fp8):
    # Interpreted, two tiles of 64 in the first split and a part of one in the second are enough.
    case = Case([1, 65, 333] if DEVICE == "cuda" else [1, 65, 150], heads, fp8=fp8)
    config = Config(block_n, 8 if heads == 64 else 4, 2, 1)
    assert error(case.run(config=config, splits=2), case.reference()) < BOUND


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("heads", [16, 64] if DEVICE == "cuda" else [16])
@pytest.mark.parametrize("spread", [1e-4, 1.0, 200.0])
def test_fp8_costs_what_quantisation_costs(spread, heads, path):
    """Against the unrounded truth at most 1.2 times the error of exact attention over the rounded cache."""
    needs(path)
    case = Case([700, 900], heads, fp8=True, spread=spread)
    case.scale /= spread
    truth = case.truth()
    floor = error(case.reference(), truth)
    assert 1e-3 < floor < 0.1
    found = case.run(dtype=torch.float32, path=path)
    assert error(found, truth) < 1.2 * floor
    assert error(found, case.reference()) < BOUND


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("heads", [16, 64] if DEVICE == "cuda" else [16])
def test_scales_far_apart_between_tokens_and_tiles(heads, path):
    """An outlier in one token's one tile must not cost the others their digits, nor overflow."""
    needs(path)
    case = Case([300], heads, fp8=True)
    latent_SC = case.latent_BSC[0, :300].float()
    latent_SC[:, :128] *= torch.exp2(torch.linspace(-20, 12, 300)).unsqueeze(1)
    latent_SC[7, 256:384] *= 2.0**16
    case.q_latent *= 2.0**-13
    rows = pack(latent_SC.bfloat16(), 512)
    for number, page in enumerate(case.table_BP[0].tolist()):
        part = rows[number * 64 : number * 64 + 64]
        case.cache_PGW[page, : len(part)] = part.to(DEVICE)
    assert unpack(rows, 512, 64).float().abs().max() > 65504  # fp16 could not hold it
    assert error(case.run(path=path), case.reference()) < BOUND


@pytest.mark.parametrize("first", [0, 1, 64, 100])
def test_nothing_before_first_is_read(first):
    case = Case([130, 200], 4, 2, rank=32, rope=16, page_size=16)
    for row in range(2):
        for position in range(first):
            case.cache_PGW[case.table_BP[row, position // 16], position % 16] = float("nan")
    first_B = torch.full((2,), first, device=DEVICE)
    for splits in (1, 3):
        assert error(case.run(first_B=first_B, splits=splits), case.reference(first_B)) < BOUND


def test_strided_queries_and_64_bit_tables():
    case = Case([70, 65], 8, 2, rank=32, rope=16)
    expected = case.run()
    case.q_latent = case.q_latent.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    case.q_rope = torch.cat((case.q_rope, case.q_rope * float("nan")), -1)[..., :16]
    case.table_BP = case.table_BP.long()
    assert torch.equal(case.run(), expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("heads", "fp8"), [(16, False), (16, True), (64, False), (64, True)])
def test_more_splits_than_tiles(heads, fp8, path):
    needs(path)
    case = Case([3, 64, 129], heads, fp8=fp8)
    assert error(case.run(splits=16, path=path), case.reference()) < BOUND


def test_nothing_to_do():
    case = Case([5], 4, rank=32, rope=16)
    empty = mla_decode(case.q_latent[:0], case.q_rope[:0], case.cache_PGW, case.table_BP[:0], case.position_BT[:0], 1.0)
    assert empty.shape == (0, 1, 4, 32)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"q_latent": torch.float16}, "q_latent is .* of torch.float16; expected .* bfloat16"),
        ({"q_rope": torch.float32}, "q_rope is .* of torch.float32"),
        ({"cache_PGW": torch.float16}, "it reads caches of bfloat16 or FP8 rows"),
        ({"table_BP": torch.float32}, "table is .* of torch.float32; expected .* int32 or int64"),
    ],
)
def test_wrong_dtypes_are_named(change, match):
    case = Case([5], 4, rank=32, rope=16)
    for name, dtype in change.items():
        setattr(case, name, getattr(case, name).to(dtype))
    with pytest.raises(ValueError, match=match):
        case.run()


def test_wrong_shapes_are_named():
    case = Case([5], 4, rank=32, rope=16)
    case.cache_PGW = case.cache_PGW[..., :40]
    with pytest.raises(ValueError, match=r"cache is .* expected contiguous rows of 48"):
        case.run()
    case = Case([5, 6], 4, rank=32, rope=16, page_size=48)
    with pytest.raises(ValueError, match="pages of a power of two of tokens, not 48"):
        case.run()
    case = Case([5, 6], 4, rank=32, rope=16)
    case.position_BT = case.position_BT.repeat(1, 2)[:, :1]
    with pytest.raises(ValueError, match=r"position is \(2, 1\) of torch.int64; expected .* dense"):
        case.run()
    case = Case([5, 6], 4, rank=32, rope=16)
    with pytest.raises(ValueError, match="splits is 129; expected 1 to 128"):
        case.run(splits=129)
    case = Case([5, 6], 4, rank=32, rope=16)
    case.table_BP = case.table_BP[:1]
    with pytest.raises(ValueError, match=r"table is \(1, 1\)"):
        case.run()


def test_splits_fill_the_device():
    assert choose_splits(128, 64, 132) == 1  # a wave that is nearly full is not worth a merge
    assert choose_splits(64, 128, 132) == 2
    assert choose_splits(1, 1, 132) == 1
    for programs in (1, 3, 16, 100, 300):
        for tiles in (1, 7, 64, 512):
            assert 1 <= choose_splits(programs, tiles, 132) <= tiles


def test_configs_cover_every_launch():
    assert {(fp8, size) for fp8 in (False, True) for size in (16, 32, 64)} == set(CONFIGS)
