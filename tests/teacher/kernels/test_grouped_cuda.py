"""The grouped product in CUDA: the source compiles for Hopper without spills; on a GPU tiles by the hundred are right,
captured in a graph too; where there is no compiler Gluon is taken, and said."""

import logging
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from teacher.kernels import grouped_gemm as products
from teacher.kernels import grouped_gemm_cuda
from teacher.kernels.cuda import build
from teacher.kernels.grouped_gemm import grouped_gemm, grouped_gemm_reference, grouped_swiglu
from teacher.kernels.grouped_gemm_cuda import SHARED
from teacher.kernels.tuning import Tile
from tests.teacher.kernels.grouped import member_rows, operands, quantized, relative

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA has no interpreter")
# Rows of each expert, where each begins, N, K: more tiles than blocks, one row tile of two, more experts than a warp
# looks at in one go, columns that TMA cannot address, a single step of K.
MANY = [
    ([4096, 1000], None, 4096, 256),
    ([130, 0, 1, 127, 128, 129, 257, 70] * 9, None, 1320, 272),
    ([300, 0, 3, 200], [0, 320, 640, 960], 577, 128),
    ([640, 4000], None, 7168, 2048),
]


@pytest.mark.skipif(build.nvcc() is None, reason="no nvcc")
def test_compiles_for_hopper_without_spills(tmp_path):
    source = Path(build.__file__).parent / "grouped_gemm.cu"
    done = subprocess.run(
        [build.nvcc(), *build._FLAGS, "-Xptxas", "-v", "-o", tmp_path / "made.so", source],
        capture_output=True,
        text=True,
        check=True,
    )
    said = done.stderr + done.stdout
    functions = said.count("bytes spill stores")
    assert functions >= 6 and said.count(" 0 bytes spill stores, 0 bytes spill loads") == functions, said
    assert "C75" not in said  # products made one after the other, setmaxnreg not taken


def case(counts, starts, n, k):
    rows = None if starts is None else starts[-1] + counts[-1] + 20
    x, w, groups = operands(counts, n, k, "cuda", starts, rows)
    return *quantized(x, w), groups


@GPU
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("many", MANY, ids=("rows", "experts", "ragged", "long"))
def test_many_tiles(many, dtype, shared):
    x8, w8, groups = case(*many)
    expected, members = grouped_gemm_reference(x8, w8, groups), member_rows(groups)
    out = torch.full_like(expected, float("nan"), dtype=dtype)
    tile = Tile(128, 128, 2, cuda=shared)
    found = grouped_gemm(x8, w8, groups, out, tile)
    assert relative(found[members], expected[members]) < (5e-4 if dtype == torch.float32 else 3e-3)
    assert torch.equal(found.isnan(), expected.isnan())
    for _ in range(3):  # the same again and again: nothing is written over while it is still on its way out
        again = grouped_gemm(x8, w8, groups, torch.full_like(out, float("nan")), tile)
        assert torch.equal(again[members], found[members])


@GPU
def test_is_the_same_from_a_graph():
    x8, w8, groups = case([300, 0, 77], None, 512, 640)
    tile = Tile(128, 128, 2, cuda="rows")
    expected = grouped_gemm(x8, w8, groups, tile=tile)
    found = torch.full_like(expected, float("nan"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grouped_gemm(x8, w8, groups, found, tile)
    graph.replay()
    assert torch.equal(found, expected)


def test_without_a_compiler_gluon_is_taken_and_said(monkeypatch, caplog):
    chosen = Tile(128, 128, 2, group=16, stages=4, specialize=True, cuda="matrix")
    monkeypatch.setattr(products, "tile_for", lambda *_: chosen)
    monkeypatch.setattr(grouped_gemm_cuda, "missing", lambda: "no nvcc")
    products._cuda.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            tile = products._tile("gemm", 256, 256, 4096, 4, torch.device("cpu"))
    products._cuda.cache_clear()
    assert tile == Tile(128, 128, 2, group=16, stages=4, specialize=True)
    assert [each.getMessage() for each in caplog.records if "no nvcc" in each.getMessage()] != [] and len(
        [each for each in caplog.records if "Gluon" in each.getMessage()]
    ) == 1


def test_a_tile_that_asks_for_it_is_refused_without_it(monkeypatch, device):
    monkeypatch.setattr(grouped_gemm_cuda, "missing", lambda: "no nvcc")
    x, w, groups = operands([4, 4], 256, 256, device)
    tile = Tile(128, 128, 2, cuda="matrix")
    with pytest.raises(ValueError, match="there is no kernel in CUDA here: no nvcc"):
        grouped_gemm(*quantized(x, w), groups, tile=tile)
    with pytest.raises(ValueError, match=r"for SwiGLU taken: .* no cuda"):
        grouped_swiglu(*quantized(x, w, halves=2), groups, tile=tile)
