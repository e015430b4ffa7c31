"""vLLM's side of `distill_fp8`: what weights a layer holds, how the checkpoint's are loaded, and who multiplies.

Written against vLLM 0.32. Tensor and pipeline parallelism are vLLM's and need nothing here; expert parallelism is
refused, since the kernels want all experts of a layer on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, FusedMoeWeightScaleSupported, RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.utils.fp8_utils import (
    create_fp8_scale_parameter,
    create_fp8_weight_parameter,
    validate_fp8_block_shape,
    validate_fp8_block_shape_moe,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.model_executor.parameter import BlockQuantScaleParameter
from vllm.model_executor.utils import set_weight_attrs

from teacher.fp8 import FP8, WEIGHT_BLOCK, scale_shape
from teacher.vllm_plugin.ops import fp8_experts, fp8_linear

NAME = "distill_fp8"
_BLOCK = list(WEIGHT_BLOCK)


@register_quantization_config(NAME)
class DistillFp8Config(QuantizationConfig):
    """Block FP8 as in DeepSeek-V3's checkpoints. Raises ValueError for FP8 of another form."""

    def __init__(self, skipped: list[str]) -> None:
        super().__init__()
        self.skipped = skipped

    @classmethod
    def get_name(cls) -> str:
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 90

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        return []

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """The checkpoint says "fp8"; that this method reads it counts only where the user asked for it."""
        return NAME if user_quant == NAME and hf_quant_cfg.get("quant_method") == "fp8" else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DistillFp8Config:
        block, scheme = config.get("weight_block_size"), config.get("activation_scheme")
        if block != _BLOCK or scheme != "dynamic":
            raise ValueError(
                f"{NAME}: quantization_config has weight_block_size {block} and activation_scheme {scheme!r}; taken: "
                f"{_BLOCK} and 'dynamic', as DeepSeek-V3's"
            )
        return cls(config.get("ignored_layers") or config.get("modules_to_not_convert") or [])

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            if is_layer_skipped(prefix, self.skipped, self.packed_modules_mapping):
                return UnquantizedLinearMethod()
            return Fp8Linear()
        if isinstance(layer, RoutedExperts):
            return Fp8Experts(layer.moe_config)
        return None


class Fp8Linear(LinearMethodBase):
    """A projection of block FP8 weights."""

    def create_weights(
        self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **attributes: Any,
    ) -> None:  # fmt: skip
        validate_fp8_block_shape(
            layer, input_size, output_size, input_size_per_partition, output_partition_sizes, _BLOCK
        )
        loader = attributes.get("weight_loader")
        layer.weight_block_size = _BLOCK  # type: ignore[assignment]  # vLLM finds a part's scales by it
        outputs = sum(output_partition_sizes)
        layer.register_parameter("weight", create_fp8_weight_parameter(outputs, input_size_per_partition, loader))
        scale = create_fp8_scale_parameter(
            BlockQuantScaleParameter, output_partition_sizes, input_size_per_partition, _BLOCK, loader
        )
        layer.register_parameter("weight_scale_inv", scale)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = fp8_linear(x.flatten(0, -2), layer.weight, layer.weight_scale_inv).unflatten(0, x.shape[:-1])
        return y if bias is None else y + bias


class Fp8Experts(FusedMoEMethodBase):
    """The routed experts of a layer; vLLM routes, and adds the shared expert."""

    def create_weights(
        self, layer: RoutedExperts, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
        params_dtype: torch.dtype, **attributes: Any,
    ) -> None:  # fmt: skip
        if self.moe.moe_parallel_config.use_ep:
            raise ValueError(f"{NAME}: experts are spread over devices; taken: tensor parallelism (no expert parallel)")
        validate_fp8_block_shape_moe(intermediate_size_per_partition, _BLOCK)
        layer.weight_block_size = _BLOCK
        inner = intermediate_size_per_partition
        shapes = {"w13": (num_experts, 2 * inner, hidden_size), "w2": (num_experts, hidden_size, inner)}
        for name, shape in shapes.items():
            weight = nn.Parameter(torch.empty(shape, dtype=FP8), requires_grad=False)
            layer.register_parameter(f"{name}_weight", weight)
            set_weight_attrs(weight, attributes)
            scale = nn.Parameter(torch.ones(scale_shape(shape), dtype=torch.float32), requires_grad=False)
            layer.register_parameter(f"{name}_weight_scale_inv", scale)
            set_weight_attrs(scale, attributes | {"quant_method": FusedMoeWeightScaleSupported.BLOCK.value})

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None  # vLLM's own kernels would be told by it how to quantise

    def apply(
        self, layer: RoutedExperts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:  # fmt: skip
        assert not layer.apply_router_weight_on_input and layer.expert_map is None
        return fp8_experts(
            x, topk_ids, topk_weights, layer.w13_weight, layer.w13_weight_scale_inv, layer.w2_weight,
            layer.w2_weight_scale_inv,
        )  # fmt: skip
