"""The public API of `eyas_host`: its names, how cheap it is to import, and the examples in its docstrings."""

from __future__ import annotations

import inspect
import subprocess
import sys
import uuid
from pathlib import Path

import cv2
import pytest

import eyas_host
from eyas_device.telemetry.messages import Status, encode, topic
from eyas_host.fleet.store.database import Batch, Store
from eyas_host.fleet.store.validate import ValidMessage, validate
from eyas_host.support import errors
from tests.support import tiny
from tests.support.device_fixtures import pristine_bundle, weights  # noqa: F401 - fixtures
from tests.support.doctests import run_examples
from tests.support.shapes import draw_folder

ERRORS = {
    name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, errors.EyasError)
}
NAMES = ("distill", "evaluate", "load_recipe", "open_run", "open_store")
HEAVY = ("cv2", "msgspec", "numpy", "rich", "sqlalchemy", "torch", "typer")


def test_the_public_names() -> None:
    assert set(eyas_host.__all__) == {*NAMES, *ERRORS, "__version__"}
    assert len(ERRORS) > 5
    assert set(eyas_host.__all__) <= set(dir(eyas_host))


@pytest.mark.parametrize("name", eyas_host.__all__)
def test_a_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(eyas_host, name)
    assert name == "__version__" or (value.__name__ == name and value.__doc__)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match=r"module 'eyas_host' has no attribute 'train_all'"):
        eyas_host.train_all  # type: ignore[attr-defined]  # noqa: B018


def test_the_import_loads_nothing_heavy() -> None:
    code = "import sys, eyas_host; print(*sys.modules); dir(eyas_host); eyas_host.RecipeError"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert {"eyas_host", "eyas_device"} <= loaded
    assert not loaded & set(HEAVY)


def test_a_run_is_read_without_a_training_framework(place: Path) -> None:
    code = "import sys, eyas_host; eyas_host.open_run('runs/shapes'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, pristine_bundle: Path) -> Path:  # noqa: F811
    """A folder with a recipe and its split, a store with one device, and a bundle with a second labelled set."""
    place = tmp_path_factory.mktemp("api")
    draw_folder(place / "images", count=12)
    recipe = place / "models/shapes/recipe.toml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text('[run]\nname = "shapes"\n[data]\npath = "../../images"\n')
    eyas_host.distill(recipe, runs=place / "runs", until="split")
    with Store(f"sqlite:///{place}/fleet.db") as store:
        payload = encode(Status(device="camera-1", spool=str(uuid.uuid4()), sequence=0, state="online"))
        message = validate(topic("line-2", "camera-1", "status"), payload)
        assert isinstance(message, ValidMessage), message
        store.add(Batch(received=1_700_000_000.0, messages=[message]))
    (place / "bundle").symlink_to(pristine_bundle)
    for label in tiny.LABELS:
        (place / "second-set" / label).mkdir(parents=True)
        for seed in range(4):
            path = place / "second-set" / label / f"{seed}.png"
            assert cv2.imwrite(str(path), tiny.draw_shape(label, 500 + seed))
    return place


@pytest.mark.parametrize("name", [None, *NAMES])
def test_the_examples_run(name: str | None, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert run_examples(eyas_host, name) > 0


def test_open_run_refuses_what_is_not_a_run(tmp_path: Path, place: Path) -> None:
    with pytest.raises(eyas_host.RunError, match=r"not a run \(recipe.json: No such file"):
        eyas_host.open_run(tmp_path)
    (tmp_path / "recipe.json").write_text('{"run": {"nome": "x"}}')
    with pytest.raises(eyas_host.RunError, match="cannot be read by this version"):
        eyas_host.open_run(tmp_path)


def test_distill_refuses_an_unknown_stage(place: Path) -> None:
    with pytest.raises(eyas_host.RunError, match=r"'splt' is not a stage; did you mean 'split'"):
        eyas_host.distill(place / "models/shapes/recipe.toml", until="splt")


def test_a_run_cannot_be_changed(place: Path) -> None:
    run = eyas_host.open_run(place / "runs/shapes")
    assert (run.bundle, run.report) == (None, None)
    with pytest.raises(AttributeError):
        run.bundle = place  # type: ignore[misc]


def test_open_store_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(eyas_host.EyasError, match="there is no store"):
        eyas_host.open_store(f"sqlite:///{tmp_path}/absent.db")
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty.db").touch()
    with pytest.raises(eyas_host.EyasError, match="there is no store"):
        eyas_host.open_store(f"sqlite:///{tmp_path}/empty.db")


def test_under_torchrun_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "-m", "eyas_host", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout and "distill" in done.stdout
