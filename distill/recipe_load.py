"""Read a recipe: YAML, then `key=value` overrides, then the typed model, with errors a person can act on."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from distill.errors import UserError
from distill.files import sha256_json
from distill.recipe import Recipe, default_filters
from distill.shipped import resolve_config, shipped_recipes


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Resolve a recipe from a file, a run folder or a shipped name ('quickstart').

    `overrides` are 'dotted.path=value' strings; the value is YAML ('students.0.epochs=2', 'evals.tasks=[a, b]').
    Raises UserError naming the file and the field.
    """
    path = find_recipe(path_or_name)
    tree = read_tree(path, (), "the recipe's keys")
    if tree.get("traces"):
        tree.setdefault("filters", default_filters())  # before the overrides: one of a filter must not drop the others
    for override in overrides:
        apply_override(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{_culprit(error, overrides) or path}: {explain(error, Recipe)}") from None


def read_tree(path: Path, overrides: Sequence[str], keys: str) -> dict[str, Any]:
    """A YAML file's mapping with the overrides applied; `keys` says what it should hold. Raises UserError."""
    tree = parse_yaml(path.read_bytes(), str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping with {keys}, found {_kind(tree)}")
    for override in overrides:
        apply_override(tree, override)
    return tree


def _culprit(error: ValidationError, overrides: Sequence[str]) -> str | None:
    """The override that set the field of the first mistake, if one did."""
    place = _place(_first(error)["loc"])
    for override in reversed(overrides):
        key = override.partition("=")[0].strip()
        if place == key or place.startswith(key + "."):
            return f"override {override!r}"
    return None


def find_recipe(path_or_name: str | Path) -> Path:
    path = resolve_config(str(path_or_name))
    if path is not None and path.is_dir():
        path = path / "recipe.yaml" if (path / "recipe.yaml").is_file() else None
        if path is None:
            raise UserError(f"{path_or_name}: the folder holds no recipe.yaml; expected a recipe file or a run folder")
    if path is None:
        names = shipped_recipes()
        near = difflib.get_close_matches(str(path_or_name), names, n=1)
        hint = f"did you mean {near[0]!r}" if near else f"shipped recipes: {', '.join(names) or 'none'}"
        raise UserError(f"{path_or_name}: no such recipe file; {hint}")
    return path


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def recipe_hash(recipe: Recipe) -> str:
    return sha256_json(recipe.model_dump(mode="json"))


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (PyYAML reads 2e-3 as text) and no silently repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                # Merging copies the pairs of `<<` in front; those have another line than this mapping's own.
                if key.value in seen and node.start_mark.index <= key.start_mark.index < node.end_mark.index:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                if node.start_mark.index <= key.start_mark.index < node.end_mark.index:
                    seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: bytes | str, place: str) -> Any:
    """Parse YAML with aliases expanded into separate copies, so that an override touches one place only.

    Raises UserError naming `place` and the line.
    """
    try:
        return _unalias(yaml.load(text, Loader=_Loader), place, ())
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{place}{line}: not valid YAML ({error.problem})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{place}: not valid YAML ({' '.join(str(error).split())})") from None


def _unalias(value: Any, place: str, above: tuple[int, ...]) -> Any:
    if id(value) in above:
        raise UserError(f"{place}: a YAML alias contains itself")
    if isinstance(value, dict):
        return {key: _unalias(item, place, (*above, id(value))) for key, item in value.items()}
    if isinstance(value, list):
        return [_unalias(item, place, (*above, id(value))) for item in value]
    return value


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one dotted path in `tree` in place; numbers index lists, missing sections are created."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"override {override!r}: expected key=value, as in students.0.epochs=2")
    value = parse_yaml(text, f"override {override!r}")
    node: Any = tree
    for depth, key in enumerate(keys):
        done = ".".join(keys[:depth]) or "the recipe"
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdecimal() or int(key) >= len(node):
                expected = f"an index from 0 to {len(node) - 1}" if node else "no index, for the list is empty"
                raise UserError(f"override {override!r}: {done} is a list, so expected {expected}, found {key!r}")
            index: Any = int(key)
        elif isinstance(node, dict):
            index = key
        else:
            raise UserError(f"override {override!r}: {done} is {_kind(node)}, it has no key {key!r}")
        if last:
            node[index] = value
        else:
            if isinstance(node, dict) and node.get(index) is None:
                node[index] = {}
            node = node[index]


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first mistake of a pydantic error as one sentence (and how many more there are)."""
    first = _first(error)
    place = _place(first["loc"])
    kind, found = first["type"], first.get("input")
    if kind == "extra_forbidden":
        known = _fields_at(model, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known) or 'none'}"
        text = f"unknown key {place!r}; {hint}"
    elif kind == "missing":
        text = f"missing key {place!r} ({_description(model, first['loc'])})"
    elif kind == "value_error":
        text = f"{place + ': ' if place else ''}{first['ctx']['error']}"
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        text = f"{place}: expected a mapping of settings, found {_kind(found)}"
    else:
        message = re.sub(r"^(Input|String|List|Dictionary) | after validation.*", "", first["msg"])
        text = f"{place}: {message}, found {_kind(found)}"
    more = error.error_count() - 1
    return text + (f" (and {more} more mistake{'s' if more > 1 else ''})" if more else "")


def _first(error: ValidationError) -> Any:
    # A misspelt key often also shows as a missing one: the misspelling is the cause, so it is told first.
    return min(error.errors(include_url=False), key=lambda detail: detail["type"] != "extra_forbidden")


def _place(loc: Sequence[int | str]) -> str:
    """'students.0.epochs'; pydantic's marks for branches of a union, such as 'list[str]', are left out."""
    return ".".join(str(part) for part in loc if "[" not in str(part))


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section(arg))), None)


def _section_at(model: type[BaseModel], loc: Sequence[int | str]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = model
    for part in loc:
        if isinstance(part, str) and section is not None and part in section.model_fields:
            section = _section(section.model_fields[part].annotation)
    return section


def _fields_at(model: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    section = _section_at(model, loc)
    return list(section.model_fields) if section else []


def _description(model: type[BaseModel], loc: Sequence[int | str]) -> str:
    section = _section_at(model, loc[:-1])
    field = section.model_fields.get(str(loc[-1])) if section else None
    return (field.description if field and field.description else "required").rstrip(".")


def _kind(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    names = {dict: "a mapping", list: "a list", bool: "a truth value", int: "a number", float: "a number", str: "text"}
    text = repr(value)
    shown = f" {text}" if len(text) <= 60 and not isinstance(value, dict | list) else ""
    return names.get(type(value), type(value).__name__) + shown
