from pathlib import Path

from distill.shipped import SHIPPED_MODELS, configs_folder, resolve_config, resolve_model, shipped_recipes


def test_recipes_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "quickstart" in shipped_recipes()
    for name in ("quickstart", "quickstart.yaml", "configs/quickstart.yaml"):
        assert resolve_config(name) == configs_folder() / "quickstart.yaml"
    assert resolve_config("nothing") is None


def test_a_file_here_goes_before_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("")
    assert resolve_config("quickstart") == Path("quickstart")
    (tmp_path / "tiny-r1").mkdir()
    assert resolve_model("tiny-r1") == Path("tiny-r1")


def test_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, (package, _) in SHIPPED_MODELS.items():
        model = resolve_model(name)
        assert isinstance(model, Path) and model.name == name and package in model.parts
    assert resolve_model("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
