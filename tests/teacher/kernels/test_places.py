"""Places in the cache by the kernel are the runner's."""

import pytest
import torch

pytest.importorskip("triton")

from teacher.kernels.places import angles, places
from teacher.runner import _places


@pytest.mark.parametrize(("rows", "new", "page"), [(1, 1, 64), (3, 5, 16), (70, 4, 64), (5, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_runners_places(rows, new, page, dtype, device):
    torch.manual_seed(rows)
    table_BP = torch.randint(1, 1000, (rows, 12), dtype=dtype, device=device)[:, :9]
    position_BT = torch.randint(0, 9 * page, (rows, new), device=device)
    position_BT[torch.rand(rows, new, device=device) < 0.2] = -1
    found = places(position_BT, table_BP, page)
    assert torch.equal(found, _places(position_BT, table_BP, page)) and found.any()


@pytest.mark.parametrize(("tokens", "half"), [(1, 8), (13, 32), (200, 5)])
def test_rows_of_the_rotations_tables(tokens, half, device):
    torch.manual_seed(tokens)
    cos_TD, sin_TD = torch.randn(2, 300, half, device=device)
    position_N = torch.randint(0, 300, (tokens,), device=device)
    position_N[1::4] = -1
    cos_ND, sin_ND = angles(position_N, cos_TD, sin_TD)
    inside_N = position_N.clamp_min(0)
    assert torch.equal(cos_ND, cos_TD[inside_N]) and torch.equal(sin_ND, sin_TD[inside_N])
    with pytest.raises(ValueError, match="taken: the same shape"):
        angles(position_N, cos_TD, sin_TD[:9])


def test_what_it_cannot_take_is_said(device):
    position_BT = torch.zeros(3, 2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="tables of 2 sequences for 3"):
        places(position_BT, torch.zeros(2, 4, dtype=torch.int32, device=device), 16)
