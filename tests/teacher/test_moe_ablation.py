"""The ablation's arms differ in what they are said to differ in, and in nothing else."""

from pathlib import Path

import torch

from teacher.config import DeepseekV3Config
from teacher.model import DeepseekV3
from tests.bench.moe_ablation import ARMS, configuration, folder, sizes


def test_arms_have_equal_total_and_active_expert_parameters() -> None:
    found = {}
    for arm in ARMS:
        with torch.device("meta"):
            model = DeepseekV3(DeepseekV3Config(vocab_size=300, **configuration(arm, 1, []).model))
        figures = sizes(model)
        found[arm[0]] = figures
        # Embedding, attention and the dense layer are the same too.
        figures["rest"] = figures.pop("parameters") - figures["expert_parameters"] - figures.pop("router_parameters")
    assert len({tuple(figures.items()) for figures in found.values()}) == 1
    assert found["a"]["expert_parameters"] == 3 * 16 * 3 * 128 * 128
    assert found["a"]["active_expert_parameters"] == 3 * 2 * 3 * 128 * 128


def test_arms_share_all_settings_but_experts_and_balance() -> None:
    changing = {"moe_intermediate_size", "n_shared_experts", "n_routed_experts", "num_experts_per_tok"}
    changing |= {"routed_scaling_factor", "balance_speed", "balance_loss"}
    rest = []
    for arm in ARMS:
        config = configuration(arm, 2, ["training.total_tokens=5"]).model_dump()
        assert config["training"]["total_tokens"] == 5 and config["seed"] == 2
        assert config["model"]["routed_scaling_factor"] == config["model"]["num_experts_per_tok"]
        for part in ("model", "training"):
            config[part] = {name: value for name, value in config[part].items() if name not in changing}
        rest.append(config)
    assert all(config == rest[0] for config in rest)


def test_another_setting_is_another_run(tmp_path: Path) -> None:
    arm = next(iter(ARMS))
    runs = {folder(tmp_path, arm, seed, changes) for seed in (1, 2) for changes in ([], ["training.total_tokens=5"])}
    assert len(runs) == 4
