"""What a round keeps of its draws: the kernel against its definition, and that against a loop."""

import pytest
import torch

pytest.importorskip("triton")

from teacher.kernels.accept import Accepted, accept, accept_reference


def cases(rows, new, seed):
    """Few token ids, so that drafts are often right, and stop ids and unsure draws among them."""
    torch.manual_seed(seed)
    tokens_RT = torch.randint(0, 3, (rows, new))
    count_R = torch.randint(0, new + 1, (rows,))
    at_R = torch.randint(0, 60, (rows,))
    numbers_T = torch.arange(new)
    position_RT = torch.where(numbers_T < count_R.unsqueeze(1), at_R.unsqueeze(1) + numbers_T, -1)
    drawn_M = tokens_RT.roll(-1, 1).flatten().clone()
    wrong_M = torch.rand(rows * new) < 0.2
    drawn_M[wrong_M] = torch.randint(0, 3, (int(wrong_M.sum()),))
    sure_M = (torch.rand(rows * new) > 0.1).long()
    stops_RN = torch.where(torch.rand(rows, 4) < 0.1, torch.randint(0, 3, (rows, 4)), -1)
    return tokens_RT, position_RT, torch.stack((drawn_M, sure_M)), stops_RN, torch.randint(0, 99, (rows,))


def by_loop(tokens_RT, position_RT, drawn_2M, stops_RN):
    kept_R = []
    for row, (tokens, positions, stops) in enumerate(
        zip(tokens_RT.tolist(), position_RT.tolist(), stops_RN.tolist(), strict=True)
    ):
        new = len(tokens)
        drawn, sure = (each[row * new : (row + 1) * new].tolist() for each in drawn_2M)
        kept = 0
        while kept < new and positions[kept] >= 0 and sure[kept]:
            if kept and (drawn[kept - 1] != tokens[kept] or drawn[kept - 1] in stops):
                break
            kept += 1
        kept_R.append(kept)
    return kept_R


@pytest.mark.parametrize(("rows", "new"), [(1, 5), (64, 5), (64, 2), (32, 8), (4, 1)])
def test_a_round_keeps_what_a_loop_keeps(rows, new, device):
    seen = set()
    for seed in range(4):
        given = cases(rows, new, seed)
        expected = accept_reference(*given, 50)
        assert expected.kept_R.tolist() == by_loop(*given[:4])
        on_device = [each.to(device) for each in given]
        room = Accepted(*(torch.full_like(each, -7).to(device) for each in expected))
        room.later_KR[-1] = expected.later_KR[-1].to(device)
        assert accept(*on_device, 50, room) is room
        for name, found, wanted in zip(Accepted._fields, room, expected, strict=True):
            if name == "later_KR":
                found, wanted = found[: new - 1], wanted[: new - 1]
            assert torch.equal(found.cpu(), wanted), name
        seen |= set(expected.kept_R.tolist())
    if rows == 64:
        assert seen == set(range(new + 1))


def test_where_the_draft_module_goes_on(device):
    tokens_RT = torch.tensor([[1, 2, 3], [1, 2, 3], [0, 0, 0]], device=device)
    position_RT = torch.tensor([[7, 8, 9], [47, 48, -1], [-1, -1, -1]], device=device)
    drawn_2M = torch.tensor([[2, 5, 6, 2, 9, 9, 0, 0, 0], [1] * 9], device=device)
    stops_RN = torch.full((3, 1), -1, device=device)
    found = accept(tokens_RT, position_RT, drawn_2M, stops_RN, torch.tensor([4, 5, 0], device=device), 49)
    assert found.kept_R.tolist() == [2, 2, 0]
    assert found.place_RT.tolist() == [[7, 8, -1], [47, 48, -1], [-1, -1, -1]]
    assert found.last_R.tolist() == [1, 4, 6] and found.counter_R.tolist() == [6, 7, 0]
    assert found.later_KR[:1].tolist() == [[9, 49, -1]]


def test_what_it_cannot_take_is_said(device):
    given = [each.to(device) for each in cases(4, 3, 0)]
    with pytest.raises(ValueError, match="taken: those of 4 x 3 tokens"):
        accept(*given[:2], given[2][:, :5].contiguous(), *given[3:], 50)
    with pytest.raises(ValueError, match="tokens_RT is int32; taken: int64"):
        accept(given[0].int(), *given[1:], 50)
