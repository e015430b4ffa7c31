"""What torch compiles, and what it keeps for the backward pass.

layers   each decoder layer by itself, in place: names in checkpoints stay, layers that are alike share their code,
         and lengths are symbols in it, so that it is compiled once for all rows. For a GPU, where it fuses norms,
         rotation, activation, residuals and autocast's conversions into few passes over memory
model    the whole model at once: pays for batches of one shape (1.4 times on a CPU in pretraining; C++ compiler)
"""

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from accelerate import Accelerator

WORTH_COMPILING = 100  # steps; the layers compile in half a minute or so


def compilation(asked: str | None, accelerator: "Accelerator", steps: int) -> str:
    """'layers', 'model' or 'off'; decides where None was asked. Sharded layers (FSDP) are compiled only if asked.

    Raises ValueError for anything else.
    """
    if asked is not None:
        if asked not in ("layers", "model", "off"):
            raise ValueError(f"compile: {asked!r} is not known; expected layers, model or off")
        return asked
    whole = accelerator.distributed_type.value != "FSDP"
    return "layers" if accelerator.device.type == "cuda" and whole and steps >= WORTH_COMPILING else "off"


def compile_layers(model: Any, backend: str = "inductor") -> None:
    """Compile each decoder layer of a transformers model in place. Raises ValueError if it has none."""
    for layer in decoder_layers(model):
        layer.compile(dynamic=True, backend=backend)
    if not model.get_input_embeddings().weight.requires_grad:
        # Else the first layer alone, whose input needs no gradient, would be compiled once more (half a minute).
        model.enable_input_require_grads()


def recompute_layers(model: Any) -> None:
    """Keep only each decoder layer's input for the backward pass. Raises ValueError for a model that cannot."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(f"recompute: {type(model).__name__} does not support it")
    model.gradient_checkpointing_enable({"use_reentrant": False})


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"compile: {type(model).__name__} has no decoder layers that could be compiled")
    return layers
