"""An exponential moving average of the weights: less noisy than the last step's, at the cost of one copy in float32."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Ema:
    """average = decay * average + (1 - decay) * weight after every step, with a bias-corrected start.

    The effective decay of step n is min(decay, n / (n + 9)): early on, the average follows the weights closely instead
    of remembering the initialisation.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay: {decay} is not between 0 and 1")
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.decay, self.updates = decay, 0
        self.names = [name for name, _ in named]
        self.weights: list[Tensor] = [p.data for _, p in named]
        self.averages = [weight.float().clone() for weight in self.weights]

    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 9))
        torch._foreach_lerp_(self.averages, [weight.float() for weight in self.weights], 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averages inside, its own weights again afterwards."""
        kept = [weight.clone() for weight in self.weights]
        self.copy_to_model()
        try:
            yield
        finally:
            torch._foreach_copy_(self.weights, kept)

    def copy_to_model(self) -> None:
        torch._foreach_copy_(self.weights, self.averages)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.averages, strict=True)) | {"_updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.updates = int(state["_updates"])
        for name, average in zip(self.names, self.averages, strict=True):
            average.copy_(state[name])
