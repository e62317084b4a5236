"""Recipes: read whole, refused whole, and the shipped ones say what the code does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tomllib
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from eyas_host.data.class_folders import list_class_folders
from eyas_host.recipe import Recipe
from eyas_host.recipe.load import RENAMED, load_recipe
from eyas_host.recipe.scaffold import new_recipe
from eyas_host.support.errors import RecipeError
from tests.support.paths import ROOT

MODELS = ROOT / "models"
SHIPPED = sorted(MODELS.glob("*/recipe.toml"))
MINIMAL = '[run]\nname = "toy"\n[data]\npath = "images"\n'
FIELDS = {
    section.name: {field.name: field for field in msgspec.structs.fields(section.type)}
    for section in msgspec.structs.fields(Recipe)
}


def default(field: msgspec.structs.FieldInfo) -> object:
    """What a setting is where nobody sets it; None for what must be set."""
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return None if field.required else field.default


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def faults(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(folder, text, *overrides)
    head, *lines = str(caught.value).splitlines()
    assert head == f"{folder / 'recipe.toml'}: {len(lines)} error{'s' if len(lines) > 1 else ''}"
    return [line.strip() for line in lines]


def test_minimal_recipe_takes_every_default_and_a_path_beside_the_file(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL)
    assert recipe.data.path == str(tmp_path / "images")
    assert recipe.run.name == "toy"
    for section, fields in FIELDS.items():
        for name, field in fields.items():
            if (section, name) not in {("run", "name"), ("data", "path")}:
                assert getattr(getattr(recipe, section), name) == default(field)


def test_absolute_path_stays(tmp_path: Path) -> None:
    assert load(tmp_path, '[run]\nname = "a"\n[data]\npath = "/somewhere/else"').data.path == "/somewhere/else"


def test_all_faults_come_together(tmp_path: Path) -> None:
    lines = faults(
        tmp_path,
        """
        [run]
        name = "no/slash"
        colour = "red"
        [data]
        split = [0.5, 0.5, 0.5]
        [image]
        size = 100
        fit = "zoom"
        [augment]
        horizontal_flip = 1
        [student]
        epochs = 0
        kd_ratio = 1.5
        [pruning]
        method = "channel"
        [compile]
        runtimes = ["litert", "litert"]
        """,
        "gate.max_dp",
        "quantize.epochs=-1",
    )
    wanted = (
        "[run] colour: unknown key; allowed: name, seed, device, threads",
        "[pruning]: unknown section; did you mean 'prune'? allowed: run, data,",
        "[run] name = 'no/slash'",
        "[image] fit = 'zoom'",
        "[image] size = 100: must be a multiple of 32",
        "[augment] horizontal_flip = 1",
        "[student] epochs = 0",
        "[student] kd_ratio = 1.5",
        "[quantize] epochs = -1",
        "[data] split = [0.5, 0.5, 0.5]",
        "[data] path: missing",
        "[compile] runtimes:",
        "--set gate.max_dp: the form is section.key=value",
    )
    for start in wanted:
        assert sum(line.startswith(start) for line in lines) == 1, (start, lines)
    assert len(lines) == len(wanted)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("run.seed", "-1"),
        ("run.seed", str(2**31)),
        ("run.device", '"tpu"'),
        ("run.threads", "1.5"),
        ("data.split", "[0.7, 0.3]"),
        ("data.split", "[1.0, 0.0, 0.0]"),
        ("data.skip_unreadable", '"yes"'),
        ("image.size", "16"),
        ("image.crop_fraction", "0.0"),
        ("augment.rotate_degrees", "181"),
        ("student.kd_ratio", "true"),
        ("student.kd_ratio", "nan"),
        ("student.temperature", "0"),
        ("student.temperature", "inf"),
        ("student.feature_loss", "inf"),
        ("student.ema", "1.0"),
        ("student.rate", "1" + 400 * "0"),
        ("teacher.unfreeze", '"some"'),
        ("teacher.unfreeze", "3"),
        ("prune.sparsity", "1.0"),
        ("compile.runtimes", '["tensorrt"]'),
        ("compile.runtimes", "[]"),
        ("pack.version", '"1.0"'),
        ("pack.golden", "65"),
    ],
)
def test_values_out_of_range_are_named(tmp_path: Path, setting: str, value: str) -> None:
    section, key = setting.split(".")
    (line,) = faults(tmp_path, MINIMAL, f"{setting}={value}")
    assert line.startswith(f"[{section}] {key}")


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (("data.source=elpv",), "[data] path: source = 'elpv'"),
        (("prune.keep=1.0",), "[prune] keep = 1.0 prunes nothing"),
        (("prune.method=nncf", "prune.sparsity=0.0"), "[prune] sparsity = 0 prunes nothing"),
        (("teacher.weights=random", "student.weights=hub"), "[teacher] weights = 'random'"),
        (("data.path=",), "[data] path: missing"),
        (("teacher.sampler=balanced",), "[teacher] sampler = 'balanced' with class_weights = true"),
        (("student.sampler=balanced",), "[student] sampler = 'balanced' with class_weights = true"),
        (("student.weights=file",), "[student] weights = 'file': weights_file is missing"),
        (("teacher.weights=hub", "teacher.weights_file=w.pth"), "[teacher] weights_file belongs to weights = 'file'"),
        (("student.feature_layers=[{student='a', teacher='b', weight=0}]",), "[student] feature_layers"),
        (("run.amp=fp16", "run.device=cpu"), "[run] amp = 'fp16' needs a GPU"),
        (("run.trackers=['wandb', 'wandb']",), "[run] trackers = ['wandb', 'wandb']: each once"),
        (("run.processes=5", "student.batch=9"), "[run] processes = 5: [student] batch = 9 has no 2 images for each"),
        (("run.processes=5", "teacher.batch=4"), "[run] processes = 5: [teacher] batch = 4 has no image for each"),
        (("teacher.schedule=plateau", "teacher.plateau_epochs=3"), "[teacher] patience = 3 stops the training before"),
        (
            ("teacher.unfreeze_by=plateau", "teacher.plateau_epochs=4"),
            "[teacher] patience = 3 stops the training before",
        ),
    ],
)
def test_impossible_combinations(tmp_path: Path, overrides: tuple[str, ...], start: str) -> None:
    (line,) = faults(tmp_path, MINIMAL, *overrides)
    assert line.startswith(start)


def test_combinations_that_are_possible(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL, "prune.method=none", "prune.keep=1.0").prune.keep == 1.0
    assert load(tmp_path, '[run]\nname = "a"\n[data]\nsource = "elpv"').data.path == ""
    balanced = load(tmp_path, MINIMAL, "teacher.sampler=balanced", "teacher.class_weights=false")
    assert balanced.teacher.sampler == "balanced"
    assert load(tmp_path, MINIMAL, "run.processes=1", "student.batch=2", "teacher.batch=2").run.processes == 1
    assert load(tmp_path, MINIMAL, "teacher.weights_file=w.pth").teacher.weights_file == str(tmp_path / "w.pth")


def test_overrides_win_and_are_read_as_toml(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        MINIMAL + "[student]\nepochs = 5\n",
        "student.epochs=7",
        "student.rate=1",
        "run.name=other",
        'teacher.unfreeze="4"',
        "data.split=[0.6, 0.2, 0.2]",
        "augment.cutmix = 0.5",
        "student.epochs=9",
    )
    assert (recipe.student.epochs, recipe.student.rate, recipe.run.name) == (9, 1.0, "other")
    assert (recipe.teacher.unfreeze, recipe.data.split) == ("4", (0.6, 0.2, 0.2))
    assert faults(tmp_path, MINIMAL, "augment.cut mix=0.5")[0].startswith("[augment] cut mix: unknown key")


@pytest.mark.parametrize("override", ["wheels=3", "student.=3", ".epochs=3", "student.epochs", "="])
def test_malformed_overrides(tmp_path: Path, override: str) -> None:
    assert faults(tmp_path, MINIMAL, override) == [f"--set {override}: the form is section.key=value"]


OLD_NAMES = [
    ("picture.size=64", "[picture] is now [image]"),
    ("run.metric=auc", "[run] metric is now [run] selection_metric"),
    (
        "run.selection_metric=objective",
        '[run] selection_metric = "objective" is now [run] selection_metric = "combined"',
    ),
    ("teacher.weights=warm", '[teacher] weights = "warm" is now [teacher] weights = "pretrained"'),
    ("student.weights=warm", '[student] weights = "warm" is now [student] weights = "pretrained"'),
    ("student.ready=student.pt", "[student] ready is now [student] checkpoint"),
    ("student.hint=0.5", "[student] hint is now [student] feature_loss"),
    ("student.hints=[]", "[student] hints is now [student] feature_layers"),
    ("pack.pictures=never", "[pack] pictures is now [pack] images"),
]


def test_old_names_are_answered_with_the_new_ones(tmp_path: Path) -> None:
    assert {line.partition(" is now ")[0] for _, line in OLD_NAMES} == set(RENAMED)
    for override, line in OLD_NAMES:
        assert faults(tmp_path, MINIMAL, override) == [line]
    together = faults(tmp_path, MINIMAL, *(override for override, _ in OLD_NAMES), "student.epochs=0")
    assert set(together) > {line for _, line in OLD_NAMES} and len(together) == len(OLD_NAMES) + 1


def test_a_section_that_is_no_section(tmp_path: Path) -> None:
    assert faults(tmp_path, "student = 3\n" + MINIMAL, "student.epochs=3") == ["[student]: must be a section, not int"]


@pytest.mark.parametrize("content", [None, b"[run\n", b"\xff\xfe", b"a = " + b"[" * 5000, b"a = " + b"1" * 5000])
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=str(path)):
        load_recipe(path)


def test_both_shipped_recipes_load() -> None:
    assert [path.parent.name for path in SHIPPED] == ["solar-cells", "template"]
    for path in SHIPPED:
        assert load_recipe(path).run.seed == 0


def test_the_template_names_every_setting_with_its_default() -> None:
    written = tomllib.loads((MODELS / "template" / "recipe.toml").read_text())
    known = {
        s: {n for n, field in f.items() if field.default is not None} for s, f in FIELDS.items()
    }  # TOML has no null
    assert {section: set(keys) for section, keys in written.items()} == known
    loaded = load_recipe(MODELS / "template" / "recipe.toml")
    different = {
        f"{section}.{name}"
        for section, fields in FIELDS.items()
        for name, field in fields.items()
        if getattr(getattr(loaded, section), name) != default(field)
    }
    assert different == {"run.name", "data.path"}


def test_the_solar_recipe_departs_from_the_defaults_only_where_it_says_so() -> None:
    recipe = load_recipe(MODELS / "solar-cells" / "recipe.toml")
    assert recipe.data.source == "elpv"
    assert recipe.augment.vertical_flip and recipe.augment.quarter_turns


def test_new_writes_a_recipe_that_loads(tmp_path: Path, shape_images: Path) -> None:
    classes = list_class_folders(shape_images).classes
    path = new_recipe(shape_images, classes, tmp_path, "shapes")
    recipe = load_recipe(path)
    assert (recipe.run.name, recipe.data.path) == ("shapes", str(shape_images))
    assert (recipe.image.size, recipe.image.fit, recipe.student.epochs) == (128, "crop", 60)
    assert recipe.augment.horizontal_flip
    with pytest.raises(RecipeError, match="exists already"):
        new_recipe(shape_images, classes, tmp_path, "shapes")
    with pytest.raises(RecipeError, match="--name"):
        new_recipe(shape_images, classes, tmp_path, "..")


_KEYS = st.sampled_from([f"{s}.{k}" for s, keys in FIELDS.items() for k in keys]) | st.text(max_size=6)
_VALUES = st.recursive(
    st.booleans()
    | st.integers()
    | st.integers(min_value=10**300, max_value=10**320)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "hub", "random", "channel", "nncf", "none", "elpv", "all", "pad"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(value) if math.isfinite(value) and "." in str(value) else "inf" if value > 0 else "nan"
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(c):08x}" for c in value if not 0xD800 <= ord(c) < 0xE000) + '"'
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    return str(value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(_KEYS, _VALUES, max_size=6), st.lists(st.text(max_size=12), max_size=2))
@example({"run.name": "a", "data.source": "elpv"}, [])
@example({"student.rate": 10**310}, ["student.rate=[[["])
def test_any_settings_give_a_recipe_or_a_recipe_error(
    tmp_path: Path, values: dict[str, Any], overrides: list[str]
) -> None:
    tree: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, key = name.partition(".")
        tree.setdefault(section, {})[key] = value
    lines = [
        f"[{_toml(section)}]\n" + "".join(f"{_toml(k)} = {_toml(v)}\n" for k, v in keys.items())
        for section, keys in tree.items()
    ]
    try:
        recipe = load(tmp_path, "".join(lines), *overrides)
    except RecipeError as error:
        assert "error" in str(error) or "not TOML" in str(error)
    else:
        assert math.isclose(sum(recipe.data.split), 1.0, abs_tol=1e-6)
        assert all(
            math.isfinite(v) for v in (recipe.student.rate, recipe.student.feature_loss, recipe.student.temperature)
        )


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet=st.sampled_from("[]{}=\"'.,#\n ax1-:T") | st.characters(codec="utf-8"), max_size=60))
def test_any_text_gives_a_recipe_or_a_recipe_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError):  # no such text names a run and a folder
        load(tmp_path, text)
