import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import UserError
from distill.recipe import Recipe
from distill.recipe_load import dump_recipe, load_recipe, parse_yaml, recipe_hash

MINIMAL = """
name: small
problems: {source: problems.jsonl}
teacher: {model: tiny-r1}
sampling: {samples: 2}
students:
  - {name: one, base: tiny-qwen}
  - {name: two, base: tiny-llama}
evals:
  problems: {source: eval.jsonl}
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(MINIMAL)
    return path


def sections(model):
    """Every section class reachable from a pydantic model."""
    from distill.recipe_load import _section

    yield model
    for field in model.model_fields.values():
        if (inner := _section(field.annotation)) is not None:
            yield from sections(inner)


def test_every_field_is_described():
    for section in sections(Recipe):
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            assert field.description.endswith("."), f"{section.__name__}.{name}: not a sentence"


def test_quickstart_is_valid_and_resolves_by_name():
    recipe = load_recipe("quickstart")
    assert recipe.name == "quickstart"
    assert load_recipe("configs/quickstart.yaml") == recipe
    assert len(recipe.problems.families) >= 6


def test_dump_round_trips_with_every_default_written(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file)
    text = dump_recipe(recipe)
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert load_recipe(again) == recipe
    assert recipe_hash(load_recipe(again)) == recipe_hash(recipe)
    tree = yaml.safe_load(text)
    assert set(tree) == set(Recipe.model_fields)
    assert set(tree["students"][0]) == set(type(recipe.students[0]).model_fields)


def test_run_folder_is_read_as_its_recipe(recipe_file, tmp_path):
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe(recipe_file)))
    assert load_recipe(folder) == load_recipe(recipe_file)
    with pytest.raises(UserError, match=r"holds no recipe\.yaml"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("students.0.epochs=2", lambda r: r.students[0].epochs, 2.0),
        ("students.1.learning_rate=2e-3", lambda r: r.students[1].learning_rate, 0.002),
        ("students.1.lora.r=8", lambda r: r.students[1].lora.r, 8),
        ("students.0.baselines=[base]", lambda r: r.students[0].baselines, ["base"]),
        ("students.0.baselines=[]", lambda r: r.students[0].baselines, []),
        ("evals.tasks=[distill_problems, gsm8k]", lambda r: r.evals.tasks, ["distill_problems", "gsm8k"]),
        ("filters.repetition.ngram=8", lambda r: r.filters.repetition.ngram, 8),
        ("filters.correctness={}", lambda r: r.filters.correctness is not None, True),
        ("problems.families.gcd.max_value=60", lambda r: r.problems.families, {"gcd": {"max_value": 60}}),
        ("problems.answer=null", lambda r: r.problems.answer, None),
        ("sampling.instruction=a=b: c", lambda r: r.sampling.instruction, None),
        ("sampling.instruction='a=b: c'", lambda r: r.sampling.instruction, "a=b: c"),
        ("sampling.instruction=''", lambda r: r.sampling.instruction, ""),
    ],
)
def test_override(recipe_file, override, read, expected):
    if override == "sampling.instruction=a=b: c":  # YAML: a mapping, hence not text
        with pytest.raises(UserError, match=r"sampling\.instruction"):
            load_recipe(recipe_file, [override])
    else:
        assert read(load_recipe(recipe_file, [override])) == expected


def test_later_override_wins(recipe_file):
    assert load_recipe(recipe_file, ["seed=1", "seed=2"]).seed == 2


def test_override_of_an_aliased_section_touches_one_place_only(tmp_path):
    path = tmp_path / "aliased.yaml"
    path.write_text(
        MINIMAL.replace("{source: problems.jsonl}", "&p {source: problems.jsonl, kind: math}").replace(
            "{source: eval.jsonl}", "*p"
        )
    )
    recipe = load_recipe(path, ["problems.kind=exact"])
    assert recipe.problems.kind == "exact"
    assert recipe.evals.problems is not None
    assert recipe.evals.problems.kind == "math"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.temprature=1", r"unknown key 'sampling\.temprature'; did you mean 'temperature'\?"),
        ("students.1.epoch=1", r"unknown key 'students\.1\.epoch'; did you mean 'epochs'\?"),
        ("filters.lenght={}", r"did you mean 'length'\?"),
        ("zzz=1", r"unknown key 'zzz'; known keys: name, seed, problems"),
        ("teacher.batch_size=many", r"teacher\.batch_size: should be a valid integer, found text 'many'"),
        ("sampling.samples=2.5", r"sampling\.samples: should be a valid integer, found a number 2\.5"),
        ("sampling.samples='2'", r"sampling\.samples: should be a valid integer, found text '2'"),
        ("sampling.samples=true", r"sampling\.samples: should be a valid integer, found a truth value"),
        ("sampling.samples=0", r"sampling\.samples: should be greater than or equal to 1, found a number 0"),
        ("sampling.top_p=1.5", r"sampling\.top_p: should be less than or equal to 1, found a number 1\.5"),
        ("sampling.temperature=.nan", r"sampling\.temperature: .*found a number nan"),
        ("students.0.weight_decay=.inf", r"students\.0\.weight_decay: should be a finite number, found a number inf"),
        ("problems.count=1000000000000", r"problems\.count: should be less than or equal to 1000000000"),
        ("selection.validation_fraction=1.0", r"should be less than 1,"),
        ("students.0.method=lor", r"students\.0\.method: should be 'full' or 'lora', found text 'lor'"),
        ("evals.tasks=[]", r"evals\.tasks: expected at least one, on which `students` are measured; found none"),
        ("students.0=3", r"students\.0: expected a mapping of settings, found a number 3"),
        ("teacher=null", r"teacher: expected a mapping of settings, found nothing"),
        ("name=../up", r"name: should match pattern"),
        ("name=", r"name: should be a valid string, found nothing"),
        ("students.1.name=one", r"two students are named 'one'"),
        ("students.1.name=teacher", r"cannot be named 'teacher'"),
        ("students.1.name=one-answers_only", r"cannot be named 'one-answers_only' beside 'one'"),
        ("students.1.name=one.base", r"cannot be named 'one.base' beside 'one'"),
        ("evals.problems=null", r"task 'distill_problems' needs `problems`"),
        ("problems.source=reasoning-gym", r"needs at least one entry in `families`"),
        ("students.7.epochs=1", r"students is a list, so expected an index from 0 to 1, found '7'"),
        ("students.x.epochs=1", r"found 'x'"),
        ("seed.x=1", r"seed is a number 0, it has no key 'x'|unknown key"),
        ("seed", r"expected key=value"),
        ("a..b=1", r"expected key=value"),
        ("seed=[1", r"not valid YAML"),
    ],
)
def test_mistakes_are_named(recipe_file, override, message):
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(recipe_file, ["seed=0", override])
    assert "\n" not in str(caught.value)
    assert override.partition("=")[0].rpartition(".")[2] in str(caught.value) or "needs" in str(caught.value)


def test_missing_key_tells_what_it_is_for(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL.replace("teacher: {model: tiny-r1}", "teacher: {batch_size: 2}"))
    with pytest.raises(UserError, match=r"r\.yaml: missing key 'teacher\.model' \(A shipped model"):
        load_recipe(path)


def test_misspelling_is_told_before_what_it_left_missing(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL.replace("sampling: {samples: 2}", "sampling: {sample: 2}"))
    with pytest.raises(
        UserError, match=r"unknown key 'sampling\.sample'; did you mean 'samples'\? \(and 1 more mistake\)"
    ):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", r"r\.yaml:2: not valid YAML \(the key 'name' is given twice\)"),
        ("name: [a\nb: c\n", r"r\.yaml:2: not valid YAML"),
        ("name: !!python/object/apply:os.system ['true']\n", r"r\.yaml:1: not valid YAML"),
        ("- a\n- b\n", r"expected a mapping with the recipe's keys, found a list"),
        ("", r"found nothing"),
        ("a: &x [*x]\n", r"an alias contains itself|alias"),
        ("\x00", r"not valid YAML"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(path)


def test_not_utf8(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(UserError, match=r"r\.yaml.*not valid YAML"):
        load_recipe(path)


def test_merged_keys_may_be_overridden_but_not_repeated():
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}", "f")["b"] == {"x": 3, "y": 2}
    with pytest.raises(UserError, match=r"f:2: .*'x' is given twice"):
        parse_yaml("a: &a {x: 1}\nb: {<<: *a, x: 3, x: 4}", "f")


def test_missing_recipe_names_a_near_one():
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        load_recipe("quickstrat")
    with pytest.raises(UserError, match=r"no such recipe file; shipped recipes: .*quickstart"):
        load_recipe("/nowhere/x.yaml")


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_yaml_floats_are_numbers(value):
    # PyYAML's own resolver reads '2e-05' as text.
    assert parse_yaml(f"a: {value!r}", "f") == {"a": value}


def test_a_recipe_may_end_at_the_dataset(tmp_path):
    path = tmp_path / "only.yaml"
    path.write_text("name: only\nproblems: {source: p.jsonl}\nteacher: {model: tiny-r1}\nsampling: {samples: 2}\n")
    recipe = load_recipe(path)
    assert (recipe.students, recipe.evals.tasks, recipe.evals.teacher) == ([], [], False)
