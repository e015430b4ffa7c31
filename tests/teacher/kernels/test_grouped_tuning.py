"""Which tile a product takes: shipped files are whole, a user's own go before them, and all else goes by rule."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from teacher.kernels import tuning
from teacher.kernels.tuning import Tile, save, tile_for

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "_name", lambda device: "NVIDIA_H200")
    monkeypatch.setenv("DISTILL_KERNEL_CONFIGS", str(tmp_path))
    tuning._table.cache_clear()
    yield
    tuning._table.cache_clear()


def test_shipped_files_cover_r1s_shapes_at_any_load():
    shipped = list(Path(tuning.__file__).parent.glob("configs/*.json"))
    assert [path.stem for path in shipped] == ["NVIDIA_H200"]
    assert json.loads(shipped[0].read_text())["about"]["gpu"] == "NVIDIA H200"
    for kind, n, k in (("swiglu", 2048, 7168), ("gemm", 7168, 2048), ("gemm", 4096, 7168)):
        few, many = (tile_for(kind, n, k, rows, 256, CUDA) for rows in (8, 2_000_000))
        assert few.swap and many.specialize
        assert kind == "gemm" or {few.columns, many.columns} == {128}


def test_what_the_user_measured_goes_first_and_unknown_shapes_go_by_rule(tmp_path):
    mine, other = Tile(32, 64, 1, True), Tile(64, 128, 1)
    save(tmp_path / "NVIDIA_H200.json", {"gemm 7168 2048": [(4.0, mine), (0.5, mine), (1e9, other)]}, {})
    assert len(json.loads((tmp_path / "NVIDIA_H200.json").read_text())["tiles"]["gemm 7168 2048"]) == 2
    assert tile_for("gemm", 7168, 2048, 1000, 256, CUDA) == mine
    assert tile_for("gemm", 7168, 2048, 1025, 256, CUDA) == other
    assert tile_for("gemm", 512, 512, 1000, 256, CUDA) == tuning.default("gemm", 1000 / 256)
    assert tile_for("gemm", 7168, 2048, 1000, 256, torch.device("cpu")) == tuning.default("gemm", 1000 / 256)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "NVIDIA_H200.json").write_text('{"tiles": {"gemm 1 1": [{"rows": 3}]}}')
    with pytest.raises(ValueError, match=r"NVIDIA_H200.json: not a file of tiles as tests.bench.kernels_tune writes"):
        tile_for("gemm", 1, 1, 1, 1, CUDA)
