"""The next version: the split of the one before, its weights, replay, and kept only if it is better."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from eyas_device.bundle import sha256
from eyas_host.data.manifest import SPLITS, load_manifest
from eyas_host.evaluation.metrics import PairedLoss
from eyas_host.models.pretrained import weights_file
from eyas_host.recipe.data import Source
from eyas_host.retrain import judge as judge_module
from eyas_host.retrain.derive import PARENT, fit_heads, next_version
from eyas_host.retrain.judge import Judged, judge
from eyas_host.retrain.run import Retraining, read_state, retrain
from eyas_host.versions.record import RegistryError
from eyas_host.versions.registry import Registry
from tests.support.inside import eyas
from tests.support.shapes import SHAPES, draw_folder

_TOY = """
[run]
name = "toy"
trackers = []
[data]
path = "{images}"
[image]
size = 64
[teacher]
model = "mobilenetv3_small_100"
weights_file = "{weights}"
head_epochs = 2
epochs = 0
batch = 16
[student]
model = "tf_mobilenetv3_small_minimal_100"
views = 1
epochs = 1
batch = 16
labels_only = false
[prune]
method = "none"
[quantize]
method = "ptq"
calibration = 8
[compile]
runtimes = ["litert"]
[gate]
min_agreement = 0.0
max_dp = 1.0
max_drop = 1.0
[pack]
golden = 4
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry whose champion was trained in a minute on two shapes, and images of later."""
    folder = tmp_path_factory.mktemp("retrain")
    draw_folder(folder / "images", labels=SHAPES[:2], width=48, height=48)
    draw_folder(folder / "later", labels=SHAPES[:3], width=64, height=64)
    recipe = _TOY.format(images=folder / "images", weights=weights_file("mobilenetv3_small_100"))
    (folder / "toy.toml").write_text(recipe)
    done = eyas(folder, "distill", "toy.toml")
    assert done.code == 0, done.err
    assert eyas(folder, "models", "add", "runs/toy", "--alias", "champion").code == 0
    return folder


@pytest.fixture
def place(workplace: Path, tmp_path: Path) -> Path:
    """A copy of it; the images stay where they are."""
    for name in ("registry", "later"):
        shutil.copytree(workplace / name, tmp_path / name)
    return tmp_path


def test_a_label_that_it_does_not_know_is_named_before_anything_is_trained(place: Path) -> None:
    done = eyas(place, "retrain", "later", "--cooldown", "0")
    assert done.code == 2 and f"{SHAPES[2]}: none of the classes of toy@1.0.0; --new-class teaches it" in done.err
    assert not (place / "runs/toy-1.1.0/teach").exists()
    assert len(Registry(place / "registry", now=lambda: 0.0, by="").versions()) == 1


def test_the_next_version_keeps_the_split_replays_the_old_images_and_is_judged(place: Path, workplace: Path) -> None:
    """Whether it is better is up to a minute's training; what follows from it is not."""
    done = eyas(place, "retrain", "later", "--cooldown", "0", "--new-class", "--epochs", "2", "--max-loss", "1")
    root = place / "runs/toy-1.1.0"
    state = read_state(root)
    assert state is not None and state.judged is not None, done.err
    old, new = load_manifest(workplace / "runs/toy/split/manifest.json"), load_manifest(root / "split/manifest.json")
    where = {image.sha256: name for name in SPLITS for image in getattr(new, name)}
    for name in SPLITS:
        assert {where[image.sha256] for image in getattr(old, name)} == {name}, "every image stays"
    assert len(new.train) > len(old.train) and new.labels == tuple(sorted(SHAPES[:3]))
    assert state.judged.old_images == len(old.test) and state.judged.new_images == len(new.test) - len(old.test)
    recipe = json.loads((root / "recipe.json").read_text())
    assert recipe["student"]["weights"] == recipe["teacher"]["weights"] == "file"
    assert recipe["student"]["epochs"] <= 2 and recipe["run"]["name"] == "toy"
    registry = Registry(place / "registry", now=lambda: 0.0, by="")
    if state.judged.better:
        assert (done.code, state.stage) == (0, "registered")
        record = registry.find("toy@challenger")
        assert (record.version, record.parent) == ("1.1.0", "1.0.0")
        assert "eyas models alias champion toy@1.1.0" in done.out
    else:
        assert (done.code, state.stage) == (1, "kept out") and "kept out:" in done.out
        assert [one.version for one in registry.versions()] == ["1.0.0"]
    assert registry.find("champion").version == "1.0.0", "nobody has let another one serve"
    again = eyas(place, "retrain", "later", "--cooldown", "0", "--new-class", "--version", "1.1.0")
    assert ("is registered already" in again.err) or ("was kept out" in again.out)


def test_a_version_is_built_again_from_its_recipe_and_its_images_wherever_they_lie(
    place: Path, workplace: Path
) -> None:
    moved = shutil.copytree(workplace / "images", place / "archive")
    done = eyas(place, "models", "rebuild", "toy@1.0.0", "--data", moved, "--json")
    found = json.loads(done.out.splitlines()[-1])
    assert done.code == 0 and found["ok"], found
    assert found["same_data"] and found["same_split"] and found["tools"] == []
    assert found["same_weights"], "the same machine, libraries and seed"
    tested = {image.sha256 for image in load_manifest(workplace / "runs/toy/split/manifest.json").test}
    next(path for path in moved.glob("*/*") if sha256(path) in tested).unlink()
    fewer = eyas(place, "models", "rebuild", "toy@1.0.0", "--data", moved, "--runs", "others")
    assert fewer.code == 2 and "images of its held-out test set are gone" in fewer.err, fewer.err


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> Callable[..., Retraining]:
    """Retrain without training: the stages copy the parent's run, and the judgement is given."""

    def chain(stages: object, context: Any, **more: object) -> None:
        if not (context.root / "bundle").exists():
            shutil.copytree(workplace / "runs/toy", context.root, dirs_exist_ok=True)

    def run(place: Path, judged: Judged | BaseException, **more: object) -> Retraining:
        def given(*_: object, **__: object) -> Judged:
            if isinstance(judged, BaseException):
                raise judged
            return judged

        monkeypatch.setattr("eyas_host.retrain.run.run_chain", chain)
        monkeypatch.setattr("eyas_host.retrain.run.judge", given)
        registry = Registry(place / "registry", now=lambda: 5.0, by="me")
        settings: dict[str, Any] = {
            "version": "1.1.0",
            "epochs": 2,
            "max_loss": 0.01,
            "promote": False,
            "new_class": False,
        }
        sources = [Source(path=str(place / "later"))]
        return retrain(
            registry,
            registry.find("champion"),
            sources,
            runs=place / "runs",
            now=lambda: 5.0,
            say=lambda line: None,
            **settings | more,
        )

    return run


WORSE = Judged(old=None, old_images=0, new=PairedLoss(0.2, (0.1, 0.3), 0.3), new_images=9, problems=("it loses",))
BETTER = msgspec.structs.replace(WORSE, problems=())


def test_a_worse_one_is_kept_out_and_stays_so(quick: Callable[..., Retraining], place: Path) -> None:
    assert quick(place, WORSE).stage == "kept out"
    assert quick(place, BETTER).stage == "kept out", "the same folder is not judged again"
    assert Registry(place / "registry", now=lambda: 0.0, by="").aliases() == {"toy": {"champion": "1.0.0"}}


def test_a_judgement_that_is_killed_registers_nothing_and_is_taken_again(
    quick: Callable[..., Retraining], place: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        quick(place, KeyboardInterrupt())
    state = read_state(place / "runs/toy-1.1.0")
    assert state is not None and state.stage == "judging"
    registry = Registry(place / "registry", now=lambda: 0.0, by="")
    assert len(registry.versions()) == 1 and registry.aliases() == {"toy": {"champion": "1.0.0"}}


def test_a_folder_of_something_else_is_not_gone_on_with(quick: Callable[..., Retraining], place: Path) -> None:
    (place / "runs/toy-1.1.0").mkdir(parents=True)
    with pytest.raises(RegistryError, match="is there already, and no retraining"):
        quick(place, BETTER)
    with pytest.raises(RegistryError, match="is registered already"):
        quick(place, BETTER, version="1.0.0")


def test_a_second_one_waits(place: Path) -> None:
    done = eyas(place, "retrain", "later", "--cooldown", "7")
    assert done.code == 2 and "--cooldown 0 does not wait" in done.err
    done = eyas(place, "retrain", "nowhere", "--cooldown", "0")
    assert done.code == 2 and "nowhere: there are no images" in done.err


def test_versions_follow_each_other() -> None:
    assert [next_version(one) for one in ("0.1.0", "1.9.3", "2.0.0-rc1")] == ["0.2.0", "1.10.0", "2.1.0"]
    with pytest.raises(RegistryError, match="name the next one"):
        next_version("v7")


def test_a_class_keeps_its_part_of_the_last_layer_and_a_new_one_begins_in_the_middle(tmp_path: Path) -> None:
    (tmp_path / PARENT).mkdir()
    weight, bias = torch.arange(6.0).reshape(2, 3), torch.tensor([1.0, 3.0])
    state = {"backbone.classifier.weight": weight, "backbone.classifier.bias": bias, "bn.weight": torch.ones(2)}
    torch.save(state, tmp_path / PARENT / "teacher.pt")
    fit_heads(tmp_path, ["b", "c"], ["a", "b", "c"])
    found = torch.load(tmp_path / PARENT / "teacher.pt", weights_only=True)
    assert found["backbone.classifier.bias"].tolist() == [2.0, 1.0, 3.0]
    assert found["backbone.classifier.weight"].tolist() == [[1.5, 2.5, 3.5], [0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert found["bn.weight"].tolist() == [1.0, 1.0], "no last layer"


def test_both_answer_the_same_images_and_a_loss_on_either_set_keeps_it_out(
    monkeypatch: pytest.MonkeyPatch, workplace: Path
) -> None:
    run = workplace / "runs/toy"
    split = load_manifest(run / "split/manifest.json")
    half = msgspec.structs.replace(split, test=split.test[: len(split.test) // 2])
    images = [image.label for image in split.test]
    right = np.eye(2)[[split.labels.index(label) for label in images]]
    wrong = 1 - right
    halves = np.arange(len(images)) < len(half.test)
    for before, after, problems in (
        (right, right, 0),
        (wrong, right, 0),
        (right, wrong, 2),
        (right, np.where(halves[:, None], wrong, right), 1),
        (right, np.where(halves[:, None], right, wrong), 1),
    ):
        answers = iter([before, after])
        monkeypatch.setattr(judge_module, "_predictions", lambda *_, answers=answers: next(answers))
        found = judge(run, run / "bundle", half)
        assert (len(found.problems), found.old_images, found.new_images) == (
            problems,
            len(half.test),
            len(images) - len(half.test),
        )
    answers = iter([right, right])
    monkeypatch.setattr(judge_module, "_predictions", lambda *_: next(answers))
    assert "nothing shows that it is better" in judge(run, run / "bundle", split).problems[0]
