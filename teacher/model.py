"""DeepSeek-V3 in one sitting: embedding, decoder layers, norm, head, and the MTP modules behind them.

DeepSeek-V3 arXiv 2412.19437. Module names are those of the checkpoint, except that the experts of a layer are stacked.

Shapes: B batch, T tokens, H hidden, V vocabulary, D = qk_rope_head_dim, C = latent_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from teacher.attention import View
from teacher.config import DeepseekV3Config
from teacher.experts import Experts
from teacher.layer import DecoderLayer
from teacher.mtp import MTPLayer
from teacher.norm import RMSNorm
from teacher.rope import rotation_table
from teacher.routing import Router, Routing
from teacher.segments import Packing, segment_packing, segment_positions


@dataclass
class ModelOutput:
    """What `DeepseekV3.forward` returns."""

    logits: Tensor  # (B, T, V): position i predicts token i + 1; (B, T, 0) if not asked for
    hidden: Tensor  # (B, T, H) after the final norm
    latents: list[Tensor]  # per main layer (B, T, C): what a cache stores
    routing: list[Routing]  # one per MoE layer, in layer order, MTP layers last if they ran; rows are B * T tokens
    mtp_hidden: list[Tensor] = field(default_factory=list)  # k-th (from 1): (B, T - k, H) after its head's norm
    mtp_logits: list[Tensor] = field(default_factory=list)  # k-th: (B, T - k, V), position i predicts i + 1 + k


class _SkipInit(TorchFunctionMode):
    """Leaves out what nn.Linear and nn.Embedding draw for themselves; on meta that imports a compiler, for a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class Backbone(nn.Module):
    """The part that checkpoints call `model.`: embedding, layers (MTP modules last), final norm."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        main, extra = config.num_hidden_layers, config.num_nextn_predict_layers
        layers: list[nn.Module] = [DecoderLayer(config, layer) for layer in range(main)]
        self.layers = nn.ModuleList(layers + [MTPLayer(config, layer) for layer in range(main, main + extra)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class DeepseekV3(nn.Module):
    """A DeepSeek-V3 language model. Fresh weights are normal with std `initializer_range` (V3 section 4.2)."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # training: a layer keeps only its input, and runs again when its gradient is taken
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.cos_TD: Tensor
        self.sin_TD: Tensor
        self.fill_rotation_table()
        if not self.lm_head.weight.is_meta:
            self.initialize()

    @classmethod
    def on_meta(cls, config: DeepseekV3Config) -> DeepseekV3:
        """The model without memory, as loading and counting begin: 671B parameters in a tenth of a second."""
        with torch.device("meta"), _SkipInit():
            return cls(config)

    def fill_rotation_table(self) -> None:
        """Compute cos and sin of every position on the device of the weights; they are not part of a checkpoint."""
        device = self.lm_head.weight.device
        if device.type == "meta":
            shape = self.config.max_position_embeddings, self.config.qk_rope_head_dim // 2
            cos = sin = torch.empty(shape, dtype=torch.float32, device=device)
        else:
            cos, sin = rotation_table(self.config, self.config.max_position_embeddings)
        self.register_buffer("cos_TD", cos.to(device), persistent=False)
        self.register_buffer("sin_TD", sin.to(device), persistent=False)

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw fresh weights from torch's global generator."""
        std = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, Router)):
                nn.init.normal_(module.weight, std=std)
            elif isinstance(module, Experts):
                nn.init.normal_(module.gate_up_proj, std=std)
                nn.init.normal_(module.down_proj, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def main_layers(self) -> list[DecoderLayer]:
        """The decoder layers without the MTP modules."""
        return list(self.model.layers[: self.config.num_hidden_layers])  # type: ignore[arg-type]

    @property
    def mtp_layers(self) -> list[MTPLayer]:
        """The MTP modules, by depth."""
        return list(self.model.layers[self.config.num_hidden_layers :])  # type: ignore[arg-type]

    def forward(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        segment_ids_BT: Tensor | None = None,
        mtp: bool | int = False,
        logits: bool = True,
    ) -> ModelOutput:
        """Logits for every position; without `logits`, the hidden states that they are made of (training needs few).

        Rows may be padded on the right: later tokens never change earlier ones. Packed rows give `segment_ids_BT`
        (integers; a segment is a run of equal ones, and sees only itself) and positions that restart with each
        segment, which are derived when not given. `mtp` also runs the MTP modules; a number runs so many depths,
        the last module again and again on its own output, as a draft of several tokens does. Raises ValueError if a
        sequence is longer than the model's context.
        """
        length, context = input_ids_BT.shape[1], self.config.max_position_embeddings
        packing: Packing = None
        if segment_ids_BT is not None:
            packing = segment_packing(segment_ids_BT)
            if position_ids_BT is None:
                position_ids_BT = segment_positions(segment_ids_BT)
        if position_ids_BT is None:
            position_ids_BT = torch.arange(length, device=input_ids_BT.device).unsqueeze(0)
        if length > context and (longest := int(position_ids_BT.max()) + 1) > context:
            raise ValueError(f"input of {longest} tokens is longer than max_position_embeddings ({context})")
        cos_BTD, sin_BTD = self.cos_TD[position_ids_BT], self.sin_TD[position_ids_BT]

        embedded_BTH = self.model.embed_tokens(input_ids_BT)
        x_BTH = embedded_BTH
        latents, routing = [], []
        for layer in self.main_layers:
            x_BTH, latent_BTC, chosen = self._run(layer, x_BTH, cos_BTD, sin_BTD, packing)
            latents.append(latent_BTC)
            if chosen is not None:
                routing.append(chosen)
        hidden_BTH = self.model.norm(x_BTH)
        logits_BTV = self.lm_head(hidden_BTH) if logits else hidden_BTH[..., :0]
        output = ModelOutput(logits_BTV, hidden_BTH, latents, routing)
        if mtp:
            previous = hidden_BTH
            modules = self.mtp_layers
            for depth in range(1, (len(modules) if mtp is True else mtp) + 1):
                module, kept = modules[min(depth, len(modules)) - 1], length - depth
                packing = None if segment_ids_BT is None else segment_packing(segment_ids_BT[:, :kept])
                arguments = previous[:, :kept], embedded_BTH[:, depth:], cos_BTD[:, :kept], sin_BTD[:, :kept], packing
                previous, _, chosen = self._run(module.predict, *arguments)
                output.mtp_hidden.append(module.shared_head.norm(previous))
                if logits:
                    output.mtp_logits.append(self.lm_head(output.mtp_hidden[-1]))
                if chosen is not None:
                    routing.append(chosen)
        return output

    def _run(self, layer: Callable[..., Any], *arguments: Any) -> Any:
        """layer(*arguments), or its activation checkpoint."""
        if not (self.recompute and self.training):
            return layer(*arguments)
        return checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)

    @torch.inference_mode()
    def extend(self, input_ids_BT: Tensor, position_BT: Tensor, views: Sequence[View], absorbed: bool) -> Tensor:
        """Hidden states (B, T, H) after the final norm of new tokens of sequences whose earlier tokens are cached.

        `views` says for each main layer where its cache is; the new tokens' latents are stored there.
        """
        cos_BTD, sin_BTD = self.cos_TD[position_BT], self.sin_TD[position_BT]
        x_BTH = self.model.embed_tokens(input_ids_BT)
        for layer, view in zip(self.main_layers, views, strict=True):
            x_BTH = layer.extend(x_BTH, cos_BTD, sin_BTD, view, absorbed)
        return self.model.norm(x_BTH)

    @torch.inference_mode()
    def draft(self, hidden_BTH: Tensor, next_ids_BT: Tensor, position_BT: Tensor, view: View, absorbed: bool) -> Tensor:
        """The first MTP module as a draft: its output (B, T, H) before its norm, from hidden states at `position_BT`
        and the tokens after them. Given its own output and the token drafted from that, it drafts one further."""
        module = self.mtp_layers[0]
        cos_BTD, sin_BTD = self.cos_TD[position_BT], self.sin_TD[position_BT]
        joined_BTH = module.join(hidden_BTH, self.model.embed_tokens(next_ids_BT))
        return module.extend(joined_BTH, cos_BTD, sin_BTD, view, absorbed)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | str | None = None, *, fp8: bool = False) -> None:
        """Write config.json and safetensors that transformers and vLLM load.

        `dtype` converts the weights (DeepSeek ships bf16). `fp8` writes the projections of attention and feed-forward
        in block FP8 as DeepSeek-V3's checkpoint does (`teacher.fp8`), the rest in `dtype`. Raises ValueError naming
        the tensor if one holds values that FP8 cannot store, OSError if the disk is full.
        """
        from teacher.checkpoint_write import save_checkpoint

        save_checkpoint(self, folder, dtype, fp8=fp8)
