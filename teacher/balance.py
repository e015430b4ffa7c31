"""Expert load balance without an auxiliary loss, and V3's small sequence-wise loss beside it.

Loss-free balancing: arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv 2412.19437, section 2.1.2 (eq. 16-20).

Loads are counted from the routing that a training forward returns, not by hooks inside the model: so evaluation and
generation cannot be counted, and a forward that activation checkpointing repeats in backward is counted once.

Legend: B rows, T positions, N = B * T, E experts, K experts a token, L MoE layers, S sequences (examples).
"""

import torch

from teacher import shapes
from teacher.batches import ahead
from teacher.experts import MoE
from teacher.model import DeepseekV3
from teacher.routing import Routing


class LoadBalance:
    """Counts the loads of all MoE layers and updates their selection biases.

    Layers are in the order of a forward's routings: main layers, then MTP modules. Further routings are the last
    module's own, run again on its output, each a depth deeper.
    """

    def __init__(self, model: DeepseekV3) -> None:
        layers = [(0, layer) for layer in model.main_layers] + list(enumerate(model.mtp_layers, start=1))
        moes = [(depth, layer.mlp) for depth, layer in layers if isinstance(layer.mlp, MoE)]
        self.routers = [moe.gate for _, moe in moes]
        self.depths = [depth for depth, _ in moes]
        self.experts = model.config.n_routed_experts

    @torch.no_grad()
    def loads(self, routings: list[Routing], segment_ids_BT: torch.Tensor) -> torch.Tensor:
        """How many tokens of one forward chose each expert, (L, E) int64; padding (segment 0) has no say."""
        loads_LE = torch.zeros(len(self.routers), self.experts, dtype=torch.int64, device=segment_ids_BT.device)
        for number, routing in enumerate(routings):
            layer, depth = self._place(number)
            real_N = (_segments(segment_ids_BT, depth) > 0).flatten()
            weight_NK = real_N.to(torch.int64).unsqueeze(1).expand_as(routing.indices_NK)
            loads_LE[layer].scatter_add_(0, routing.indices_NK.flatten(), weight_NK.flatten())
        return loads_LE

    @torch.no_grad()
    def update(self, loads_LE: torch.Tensor, speed: float) -> torch.Tensor:
        """End an optimizer step of these loads: bias += speed * sign(mean load - load) in each layer (eq. 16).

        Returns the step's MaxVio of each layer, (L,) float32. A layer without any load (an MTP module that did not
        run) keeps its bias: sign(0) is 0. So does a router that is not trained.
        """
        step_LE = speed * torch.sign(loads_LE.float().mean(dim=1, keepdim=True) - loads_LE)
        for router, step_E in zip(self.routers, step_LE, strict=True):
            if router.weight.requires_grad:
                router.e_score_correction_bias += step_E
        return max_violation(loads_LE)

    def sequence_loss(self, routings: list[Routing], segment_ids_BT: torch.Tensor) -> torch.Tensor:
        """V3's sequence-wise loss without alpha, summed over the examples and the layers of a forward.

        Every layer adds its own, as in the code that DeepSeek released with its models: alpha is a layer's.
        """
        rows_B1 = torch.arange(len(segment_ids_BT), device=segment_ids_BT.device).unsqueeze(1)
        most = segment_ids_BT.shape[1] if shapes.fixed(segment_ids_BT) else int(segment_ids_BT.max())
        total = torch.zeros((), device=segment_ids_BT.device)
        for number, routing in enumerate(routings):
            segments_BT = _segments(segment_ids_BT, self._place(number)[1])
            sequence_N = torch.where(segments_BT > 0, rows_B1 * most + segments_BT - 1, -1).flatten()
            top_k = routing.indices_NK.shape[1]
            total = total + sequence_balance_loss(routing.scores_NE, top_k, sequence_N, len(rows_B1) * most)
        return total

    def _place(self, number: int) -> tuple[int, int]:
        """Layer and MTP depth of a forward's `number`-th routing."""
        last = len(self.depths) - 1
        return min(number, last), self.depths[min(number, last)] + max(0, number - last)


def _segments(segment_ids_BT: torch.Tensor, depth: int) -> torch.Tensor:
    """What an MTP module at `depth` computes on: it has no token to read at an example's last `depth` positions."""
    return ahead(segment_ids_BT, segment_ids_BT, depth, 0)[:, :-depth] if depth else segment_ids_BT


def max_violation(loads_LE: torch.Tensor) -> torch.Tensor:
    """MaxVio (2408.15664 eq. 4): how far the busiest expert's load is above the mean, relative to it; 0 is balance."""
    mean_L = loads_LE.float().mean(dim=-1)
    if loads_LE.numel() == 0:  # a model without MoE layers
        return mean_L
    return (loads_LE.amax(dim=-1) - mean_L) / mean_L.clamp(min=1e-9)


def sequence_balance_loss(scores_NE: torch.Tensor, top_k: int, sequence_N: torch.Tensor, count: int) -> torch.Tensor:
    """Sum over sequences of sum_i f_i P_i (V3 eq. 17-20 without alpha): 1 a sequence if it is balanced.

    scores_NE: sigmoid affinities, with gradient. sequence_N: which of `count` sequences a token belongs to, or -1 for
    padding. f_i counts the top-k of the affinities without the selection bias, as the paper writes it; it has no
    gradient, P_i (the mean normalised affinity) has.
    """
    real_N1 = (sequence_N >= 0).unsqueeze(1).to(scores_NE.dtype)
    where_N = sequence_N.clamp(min=0)
    experts = scores_NE.shape[1]

    def sums(values_NE: torch.Tensor) -> torch.Tensor:
        return values_NE.new_zeros(count, experts).index_add(0, where_N, values_NE * real_N1)

    length_S1 = scores_NE.new_zeros(count, 1).index_add(0, where_N, real_N1).clamp(min=1)
    with torch.no_grad():
        chosen_NE = torch.zeros_like(scores_NE).scatter_(1, scores_NE.topk(top_k, dim=-1).indices, 1.0)
        f_SE = sums(chosen_NE) * experts / (top_k * length_S1)
    p_SE = sums(scores_NE / scores_NE.sum(dim=-1, keepdim=True)) / length_S1
    return (f_SE * p_SE).sum()
