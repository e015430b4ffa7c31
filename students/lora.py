"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: only the adapters are trained, then merged for export."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Lora:
    """The update of a weight is (alpha / r) * B A, with A [r, in] and B [out, r]."""

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str = "all-linear"


def add_adapters(model: Any, settings: Lora) -> Any:
    """`model` with its weights frozen and float32 adapters added. Raises ValueError if no module has a given name."""
    from peft import LoraConfig, get_peft_model

    targets = settings.target_modules
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # peft documents an int but multiplies by whatever it is given
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def merge_adapters(model: Any, adapter_folder: Path | None) -> Any:
    """The plain model with the adapters' update added in float32; the adapters alone go to `adapter_folder`."""
    if adapter_folder is not None:
        model.save_pretrained(adapter_folder)
    # In bfloat16 an update smaller than 1/256 of a weight would vanish.
    return model.float().merge_and_unload(safe_merge=True)
