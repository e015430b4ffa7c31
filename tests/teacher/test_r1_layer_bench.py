"""The bench of R1's layers rehearses on a CPU, and its figures make tables."""

import json
import sys

import pytest

pytest.importorskip("triton")

from tests.bench import engine_gpu_table, r1_layer, r1_layer_table


def test_a_rehearsal_and_its_table(tmp_path, monkeypatch, capsys):
    for module in ("teacher.quantized_experts", "teacher.quantized_linear"):  # the interpreter takes its time
        monkeypatch.setattr(f"{module}.chosen_path", lambda device: "reference")
    path = tmp_path / "r1_layer.json"
    r1_layer.main(["--tiny", "--device", "cpu", "--json", str(path)])
    found = json.loads(path.read_text())
    assert [row["rows"] for row in found["decode"]] == [1, 3] and len(found["prefill"]) == 1
    for row in found["decode"] + found["prefill"]:
        assert row["us"]["moe layer"] > 0 and row["eight_gpus"]["tokens_per_second"] >= 0
        parts = row["floor_us"]
        # 8 experts a token of three matrices, in FP8; the shared one is with them.
        assert parts["experts"] > parts["attention"] > parts["router"] > 0 and parts["shared"] == 0
    found["about"] = dict.fromkeys(("gpu", "driver", "torch", "triton", "commit", "command"), "x")
    path.write_text(json.dumps(found))
    monkeypatch.setattr(sys, "argv", ["table", str(path)])
    capsys.readouterr()
    r1_layer_table.main()
    said = capsys.readouterr().out
    assert "| 1 at 128 |" in said and "| 64 |" in said


def test_the_engines_table(tmp_path, monkeypatch, capsys):
    about = dict.fromkeys(("gpu", "driver", "torch", "triton", "commit", "command"), "x")
    rows = [
        {"model": "lite", "concurrency": 1, "tokens_per_second": 1234, "accepted": None},
        {"model": "lite", "concurrency": 8, "tokens_per_second": 5678, "accepted": None},
        {"model": "lite", "concurrency": 8, "speculate": 4, "tokens_per_second": 9, "accepted": 0.5},
        {"model": "lite", "concurrency": 64, "left_out": "after 1 s"},
    ]
    path = tmp_path / "engine.json"
    path.write_text(json.dumps({"about": about, "rows": rows}))
    monkeypatch.setattr(sys, "argv", ["table", str(path)])
    engine_gpu_table.main()
    said = capsys.readouterr().out
    assert "| lite | 1,234 | 5,678 |  |" in said and "| lite, MTP, 4 drafted a step |  | 9 (50% accepted) |  |" in said
    assert "Left out for time: 1 rows" in said
