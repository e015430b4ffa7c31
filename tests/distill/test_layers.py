"""The house's arrows: distill uses teacher, students and evals, which know neither it nor each other.

The one exception is evals.grading, which whatever needs a verdict may ask. And the command line imports nothing heavy
before a command runs, nor does any module of distill when it is imported.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("distill", "teacher", "students", "evals")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
LM_EVAL_MODEL = "distill/lm_eval_teacher.py"  # a class of lm-eval's, imported by lm-eval alone
HEAVY = {"torch", "transformers", "datasets", "lm_eval", "reasoning_gym", "math_verify", "accelerate", "peft", "trl"}


def imported(nodes):
    """Full names of what the import statements among `nodes` bring in: `import a.b`, `from a import b` -> a.b."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the package in full here, so that this test can read them"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import(node):
    """The statements that run when a module is imported; not those of functions, nor those for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from at_import(child)


def wrong_way(package, source):
    """Imports in `source`, a module of `package`, against the arrows."""
    others = set(PACKAGES) - {package}
    return [
        name
        for name in imported(ast.walk(ast.parse(source)))
        if name.partition(".")[0] in others and not f"{name}.".startswith("evals.grading.")
    ]


def heavy_at_import(source):
    return [name for name in imported(at_import(ast.parse(source))) if name.partition(".")[0] in HEAVY]


def named(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [path for path in FILES if named(path).partition("/")[0] != "distill"], ids=named)
def test_no_import_against_the_arrows(path):
    assert wrong_way(named(path).partition("/")[0], path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", [path for path in FILES if named(path).partition("/")[0] == "distill"], ids=named)
def test_distill_imports_nothing_heavy_at_import(path):
    source = path.read_text(encoding="utf-8")
    if named(path) != LM_EVAL_MODEL:
        assert heavy_at_import(source) == []
    assert "distill.lm_eval_teacher" not in set(imported(ast.walk(ast.parse(source))))


def test_the_reader_of_imports_sees_what_it_is_to_forbid():
    assert len(FILES) > 80
    inside = "def f():\n    from evals.lm import Ask\n    import distill.errors as e\n"
    assert wrong_way("teacher", inside) == ["evals.lm.Ask", "distill.errors"]
    assert wrong_way("teacher", "from evals import grading\nfrom evals.grading import grade") == []
    assert wrong_way("teacher", "from teacher.model import DeepseekV3\nimport torch") == []
    source = "try:\n    import torch.nn\nfinally:\n    pass\ndef f():\n    import datasets\nclass C:\n    import peft\n"
    assert heavy_at_import(source) == ["torch.nn", "peft"]
    assert heavy_at_import("if TYPE_CHECKING:\n    import torch\n") == []
