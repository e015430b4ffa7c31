"""A whole round of decoding as one CUDA graph: verify drafts, draw, accept, and draft again, without asking the host.

The model runs on each sequence's newest token and its drafts; a token is drawn behind each, with the number that
belongs to it; drafts are kept as long as they are what was drawn (teacher.kernels.accept); and the draft module goes on
from what is kept, each of its tokens drawn before the next. One copy from the host says tokens, positions, pages and
settings, one back brings what was drawn; between them is one launch. Step by step (`teacher.decoding`) the same round
of four drafts is five forward passes and five draws with a copy there and back for each.

A round is void (and the caller does it step by step) if a sequence's first draw is not sure: then its likeliest tokens
do not reach as far as its limits do. Later draws that are not sure are not kept, and come again in the next round.

Shapes: R rows (sequences, some of them padding), B sequences of a call, T = K + 1 new tokens each, K drafts, M = R T,
P pages, N stop ids, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from teacher.kernels.arguments import obstacle
from teacher.runner import TorchRunner
from teacher.sampling import Settings, sample_likely
from teacher.slots import Slots

Record = Callable[[Callable[[], Any], Any], Any]


class Shape(NamedTuple):
    """What a recording is for."""

    rows: int
    new: int  # tokens of a sequence that are verified
    drafts: int
    pages: int
    stops: int
    most: int  # the last position there is


class _Words:
    """Arrays of eight-byte words by name, on the host and on the device, that travel in one copy."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device) -> None:
        counts = [int(np.prod(shape)) for shape in shapes.values()]
        sizes = [count + count % 2 for count in counts]  # each begins at 16 bytes, however many the others are
        self._host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self.host: dict[str, np.ndarray] = {}
        self.there: dict[str, Tensor] = {}
        parts = self._host.split(sizes), self._device.split(sizes)
        for (name, shape), count, here, there in zip(shapes.items(), counts, *parts, strict=True):
            self.host[name], self.there[name] = here[:count].view(shape).numpy(), there[:count].view(shape)

    def send(self) -> None:
        self._device.copy_(self._host, non_blocking=True)

    def fetch(self) -> None:
        self._host.copy_(self._device, non_blocking=True)
        if self._device.is_cuda:
            torch.cuda.current_stream(self._device.device).synchronize()


class _Recording:
    """What recordings have in common: what they are told, and the draft module's turns.

    None keeps the runner, whose they are: what refers to each other in a ring is freed by the garbage collector, at a
    time of its own choosing, which may be in the middle of a recording.
    """

    def __init__(self, runner: TorchRunner, shape: Shape) -> None:
        rows, new, drafts, pages, stops, _ = self.shape = shape
        self.told = _Words(
            {
                "tokens": (rows, new), "position": (rows, new), "table": (rows, pages), "first": (rows, 1),
                "counter": (rows,), "top_k": (rows,), "seed": (rows,), "floats": (2 * rows,),
                "later": (max(1, drafts), rows), "stops": (rows, stops),
            },
            runner.device,
        )  # fmt: skip
        self.found = _Words(
            {"drawn": (2, rows * new), "kept": (rows,), "drafted": (max(1, drafts), 2, rows)}, runner.device
        )
        self.told.there["position"].fill_(-1)  # all padding: recording leaves no trace in the cache
        temperature_R, top_p_R, min_p_R = self.told.there["floats"].view(torch.float32)[: 3 * rows].view(3, rows)
        top_k_R, seed_R = self.told.there["top_k"], self.told.there["seed"]
        self.settings = Settings(temperature_R, top_p_R, top_k_R, min_p_R, seed_R)

    def tell(self, slots: Slots, rows_B: np.ndarray, at_B: np.ndarray, counter_B: np.ndarray) -> None:
        """All but tokens and positions, of sequences whose first position is `at_B`."""
        rows, host = len(rows_B), self.told.host
        # Rows that are not used now must write nowhere, and no table may go on with what an earlier one left.
        host["position"][rows:], host["table"][:] = -1, 0
        pages = min(host["table"].shape[1], slots.table_SP.shape[1])
        host["table"][:rows, :pages] = slots.table_SP[rows_B, :pages]
        first_B = slots.drafted_from_S[rows_B]
        host["first"][:rows, 0] = np.where(first_B < 0, at_B, first_B)
        host["counter"][:rows], host["top_k"][:rows] = counter_B, slots.top_k_S[rows_B]
        host["seed"][:rows] = slots.seed_S[rows_B]
        floats = host["floats"].view(np.float32)[: 3 * self.shape.rows].reshape(3, -1)
        for values_R, values_S in zip(floats, (slots.temperature_S, slots.top_p_S, slots.min_p_S), strict=True):
            values_R[:rows] = values_S[rows_B]

    def draft(
        self, runner: TorchRunner, tokens_RT: Tensor, position_RT: Tensor, hidden_RTH: Tensor, last_R: Tensor | None,
        later_KR: Tensor, counter_R: Tensor,
    ) -> None:  # fmt: skip
        """Draw the drafts one by one into `found`, from the hidden states of some tokens and the tokens after them; of
        these `last_R` are the sequences' last, and what lies at `later_KR` comes after them."""
        model, told = runner.model, self.told.there
        for number, drawn_2R in enumerate(self.found.there["drafted"][: self.shape.drafts]):
            out_RTH = TorchRunner.extend_draft(runner, tokens_RT, position_RT, told["table"], hidden_RTH, told["first"])
            out_RH = out_RTH.flatten(0, 1)
            if number == 0 and last_R is not None:
                out_RH = out_RH.index_select(0, last_R)
            logits_RV = torch.mm(model.mtp_layers[0].shared_head.norm(out_RH), model.lm_head.weight.t())
            draw(logits_RV, self.settings, counter_R, drawn_2R, offset=number)
            hidden_RTH, tokens_RT, position_RT = (each.unsqueeze(1) for each in (out_RH, drawn_2R[0], later_KR[number]))


class Round(_Recording):
    """A recording of a round; without drafts, of a step and its draws. `logits_MV` (M, V) and `hidden_MH` are room."""

    def __init__(
        self, runner: TorchRunner, shape: Shape, logits_MV: Tensor, hidden_MH: Tensor, record: Record, memory: Any
    ) -> None:
        super().__init__(runner, shape)
        from teacher.kernels.accept import Accepted, accept, accept_reference

        self.logits_MV, told, found = logits_MV, self.told.there, self.found.there
        decide = accept if obstacle(runner.device) is None else accept_reference
        room = Accepted.empty(shape.rows, shape.new, runner.device, found["kept"])
        given = told["tokens"], told["position"], found["drawn"], told["stops"], told["counter"], shape.most, room

        def work() -> None:
            hidden_RTH = TorchRunner.extend(runner, told["tokens"], told["position"], told["table"])
            hidden_MH.copy_(hidden_RTH.flatten(0, 1))
            torch.mm(hidden_MH, runner.model.lm_head.weight.t(), out=logits_MV)
            draw(logits_MV, self.settings, told["counter"], found["drawn"], repeat=shape.new)
            if shape.drafts:
                decide(*given)
                drawn_RT = found["drawn"][0].view(shape.rows, shape.new)
                self.draft(runner, drawn_RT, room.place_RT, hidden_RTH, room.last_R, room.later_KR, room.counter_R)

        self._recorded = record(work, memory)

    def replay(self, slots: Slots, rows_B: np.ndarray, waiting_B: np.ndarray) -> dict[str, np.ndarray]:
        """Run the sequences' newest tokens and the drafts that wait: `drawn` (2, B, T), `kept` (B,) and `drafted`
        (K, 2, B), each pair of tokens and whether they are sure."""
        (rows, new, drafts, *_), count, host = self.shape, len(rows_B), self.told.host
        at_B = slots.length_S[rows_B] - 1
        offset_T = np.arange(new)
        host["tokens"][:count, 0] = slots.tokens_SW[rows_B, at_B]
        host["tokens"][:count, 1:] = slots.draft_SG[rows_B, : new - 1]
        host["position"][:count] = np.where(offset_T <= waiting_B[:, None], at_B[:, None] + offset_T, -1)
        self.tell(slots, rows_B, at_B, at_B + 1 - slots.prompt_S[rows_B])
        if drafts:
            stops = slots.stop_SN.shape[1]
            host["stops"][:count, :stops], host["stops"][:count, stops:] = slots.stop_SN[rows_B], -1
        self.told.send()
        self._recorded.replay()
        self.found.fetch()
        found = self.found.host
        drawn_2BT = found["drawn"].reshape(2, rows, new)[:, :count]
        return {"drawn": drawn_2BT, "kept": found["kept"][:count], "drafted": found["drafted"][:drafts, :, :count]}


class Drafts(_Recording):
    """A recording of the draft module's turns alone, behind a prompt: each sequence has one hidden state, its last."""

    def __init__(self, runner: TorchRunner, shape: Shape, record: Record, memory: Any) -> None:
        super().__init__(runner, shape)
        head, told = runner.model.lm_head.weight, self.told.there
        self._hidden_RH = torch.zeros(shape.rows, head.shape[1], dtype=head.dtype, device=runner.device)
        given = told["tokens"], told["position"], self._hidden_RH.unsqueeze(1), None, told["later"], told["counter"]
        self._recorded = record(lambda: self.draft(runner, *given), memory)

    def replay(self, slots: Slots, rows_B: np.ndarray, hidden_BH: Tensor) -> np.ndarray:
        """The drafts (B, K) behind each sequence's newest token, whose cached tokens end with the hidden state."""
        count, host = len(rows_B), self.told.host
        at_B, length_B = slots.cached_S[rows_B] - 1, slots.length_S[rows_B]
        host["tokens"][:count, 0] = slots.tokens_SW[rows_B, at_B + 1]
        host["position"][:count, 0] = at_B
        later_KB = at_B + 1 + np.arange(len(host["later"]))[:, None]
        host["later"][:] = -1
        host["later"][:, :count] = np.minimum(later_KB, self.shape.most)
        self.tell(slots, rows_B, at_B, length_B - slots.prompt_S[rows_B])
        self.told.send()
        self._hidden_RH[:count].copy_(hidden_BH)
        self._recorded.replay()
        self.found.fetch()
        return self.found.host["drafted"][:, 0, :count].T


def draw(
    logits_MV: Tensor, settings: Settings, counter_R: Tensor, out_2M: Tensor, repeat: int = 1, offset: int = 0
) -> None:
    """A token for each row of logits, and whether it is sure, into `out_2M`; `repeat` rows for each of settings."""
    if obstacle(logits_MV.device) is None:
        from teacher.kernels.draw import draw_likely

        draw_likely(logits_MV, settings, counter_R, out_2M, repeat, offset)
        return
    many = Settings(*(each.repeat_interleave(repeat) for each in settings))
    step_M = torch.arange(len(logits_MV), device=logits_MV.device) % repeat
    drawn_M, sure_M = sample_likely(logits_MV, many, counter_R.repeat_interleave(repeat) + step_M + offset)
    out_2M.copy_(torch.stack((drawn_M, sure_M.long())))
