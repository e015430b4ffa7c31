"""Where the packaged recipes and models lie, in a wheel and in an editable checkout alike."""

from importlib.util import find_spec
from pathlib import Path

SHIPPED_MODELS = {
    "tiny-r1": ("teacher", "models/tiny-r1"),
    "tiny-qwen": ("students", "models/tiny-qwen"),
    "tiny-llama": ("students", "models/tiny-llama"),
}


def configs_folder() -> Path:
    """The recipes: inside the installed package, or at the repository's root in an editable install."""
    here = Path(__file__).resolve().parent
    installed = here / "configs"
    return installed if installed.is_dir() else here.parent / "configs"


def shipped_recipes() -> list[str]:
    return sorted(path.stem for path in configs_folder().glob("*.yaml"))


def resolve_config(name: str) -> Path | None:
    """A path as given, or the shipped file of that name ('quickstart', 'teacher/tiny-r1'); None if neither exists."""
    given = Path(name)
    if given.exists():
        return given
    relative = name.removeprefix("configs/")
    for candidate in (configs_folder() / relative, configs_folder() / f"{relative}.yaml"):
        if candidate.is_file():
            return candidate
    return None


def resolve_model(name: str) -> Path | str:
    """A folder if one of that name exists here or is shipped; else the name itself (the hub's, or an endpoint's)."""
    if Path(name).exists():
        return Path(name)
    if name in SHIPPED_MODELS:
        package, folder = SHIPPED_MODELS[name]
        return package_folder(package) / folder
    return name


def package_folder(package: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"package {package} is part of this distribution"
    return Path(next(iter(spec.submodule_search_locations)))
