"""The CUDA kernels of MLA decode: that they compile without spills, when they are taken, and what is theirs alone.

Their numbers are held to the reference in test_mla_decode.py, beside Triton's.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from teacher.kernels.cuda import build
from teacher.kernels.mla_decode import Config, mla_decode
from tests.teacher.kernels.mla_cases import DEVICE, Case, error, needs
from tests.teacher.kernels.test_mla_decode import BOUND

on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="no GPU")


@pytest.mark.skipif(build.nvcc() is None, reason="no nvcc")
def test_no_kernel_spills(tmp_path):
    source = Path(build.__file__).parent / "mla_decode.cu"
    command = [build.nvcc(), *build._FLAGS, "-Xptxas", "-v", "-o", tmp_path / "library.so", source]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stderr
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(spilled) == 4  # of bf16 and FP8 with 64 queries, of FP8 with 16, the merge
    assert set(spilled) == {("0", "0")}
    assert "serialized" not in said  # ptxas waits for each product where it does not see through the code


def test_a_path_that_cannot_be_taken_is_named():
    case = Case([5], 4, rank=32, rope=16)
    with pytest.raises(ValueError, match="the CUDA kernel of MLA decode cannot take this: "):
        case.run(path="cuda")
    with pytest.raises(ValueError, match="path is 'rocm'; expected 'triton', 'cuda' or None"):
        case.run(path="rocm")


@on_gpu
def test_the_faster_path_is_taken_by_itself():
    needs("cuda")
    for heads, fp8, expected in ((128, False, "cuda"), (16, False, "triton"), (16, True, "cuda"), (64, True, "cuda")):
        case = Case([70, 300], heads, fp8=fp8)
        assert torch.equal(case.run(splits=2), case.run(path="triton", splits=2))  # too few keys
        case.table_BP = torch.nn.functional.pad(case.table_BP, (0, 300))
        assert torch.equal(case.run(splits=2), case.run(path=expected, splits=2))
    case = Case([70, 300], 64)
    assert torch.equal(case.run(config=Config(32, 8, 2, 1)), case.run(config=Config(32, 8, 2, 1), path="triton"))


@on_gpu
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("heads", "page_size"), [(4, 64), (16, 128), (20, 64), (64, 256), (100, 64)])
def test_any_number_of_heads_and_pages_of_several_tiles(heads, page_size, fp8):
    needs("cuda")
    case = Case([1, 17, 130, 600], heads, 2, page_size=page_size, fp8=fp8)
    assert case.position_BT[0].tolist() == [-1, 0]
    for splits in (1, 3):
        found = case.run(path="cuda", splits=splits)
        assert not found[0, 0].any()
        assert error(found, case.reference()) < BOUND


@on_gpu
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize("first", [0, 1, 64, 100])
def test_nothing_before_first_is_read(first, heads, fp8):
    needs("cuda")
    case = Case([130, 200], heads, 2, fp8=fp8)
    for row in range(2):
        for position in range(first):
            cell = case.cache_PGW[case.table_BP[row, position // 64], position % 64]
            cell.fill_(0xFF if fp8 else float("nan"))
    first_B = torch.full((2,), first, device=DEVICE)
    for splits in (1, 3):
        assert error(case.run(first_B=first_B, splits=splits, path="cuda"), case.reference(first_B)) < BOUND


@on_gpu
@pytest.mark.parametrize(("heads", "fp8"), [(16, True), (64, False), (64, True)])
def test_strided_queries_64_bit_tables_and_rows_at_odd_addresses(heads, fp8):
    needs("cuda")
    case = Case([70, 65], heads, 2, fp8=fp8)
    expected = case.run(path="cuda")
    case.q_latent = case.q_latent.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    case.q_rope = torch.cat((case.q_rope[..., :1], case.q_rope, case.q_rope * float("nan")), -1)[..., 1:65]
    case.table_BP, case.position_BT = case.table_BP.long(), case.position_BT.int()
    assert torch.equal(case.run(path="cuda"), expected)


@on_gpu
@pytest.mark.parametrize(("heads", "fp8"), [(16, True), (64, False), (64, True)])
def test_a_graph_follows_lengths_on_the_device(heads, fp8):
    needs("cuda")
    case = Case([500, 700], heads, fp8=fp8)
    out = torch.full(case.q_latent.shape, float("nan"), dtype=torch.bfloat16, device=DEVICE)
    arguments = case.q_latent, case.q_rope, case.cache_PGW, case.table_BP, case.position_BT, case.scale
    mla_decode(*arguments, out=out, path="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mla_decode(*arguments, out=out, path="cuda")
    for lengths in ([3, 700], [500, 64]):
        case.position_BT.copy_(torch.tensor(lengths).unsqueeze(1) - 1)
        out.fill_(float("nan"))
        graph.replay()
        assert error(out, case.reference()) < BOUND


@on_gpu
@pytest.mark.parametrize(("heads", "fp8"), [(16, True), (64, False), (64, True)])
def test_a_late_key_that_outweighs_all_before_it(heads, fp8):
    """The reference that weights are relative to has to move in the middle, by more than fp32's range."""
    needs("cuda")
    case = Case([900], heads, fp8=fp8)
    case.scale *= 8.0
    assert error(case.run(path="cuda", splits=1), case.reference()) < 2 * BOUND
