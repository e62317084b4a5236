"""The next version: the split of the one before, its weights, replay, and kept only if it is better."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from eyas_device.bundle import Bundle, sha256
from eyas_host.data.manifest import SPLITS, load_manifest
from eyas_host.data.split import Split
from eyas_host.models.pretrained import weights_file
from eyas_host.recipe.data import Source
from eyas_host.retrain import judge as judge_module
from eyas_host.retrain import run as run_module
from eyas_host.retrain.derive import PARENT, fit_heads
from eyas_host.retrain.judge import judge
from eyas_host.retrain.outcome import BETTER, UNSHOWN, WORSE, Compared, Judged
from eyas_host.retrain.run import retrain
from eyas_host.retrain.state import (
    BEGAN,
    KEPT_OUT,
    AlreadyRunning,
    Reason,
    Retraining,
    Terms,
    next_version,
    only_one,
    read_state,
)
from eyas_host.versions.collect import read_run
from eyas_host.versions.record import RegistryError, VersionRecord
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
    assert state.judged.old is not None and state.judged.new is not None
    assert state.judged.old.images == len(old.test)
    assert state.judged.new.images == len(new.test) - len(old.test)
    recipe = json.loads((root / "recipe.json").read_text())
    assert recipe["student"]["weights"] == recipe["teacher"]["weights"] == "file"
    assert recipe["student"]["epochs"] <= 2 and recipe["run"]["name"] == "toy"
    registry = Registry(place / "registry", now=lambda: 0.0, by="")
    if state.judged.passes:
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

        def record(root: Path, **more: Any) -> VersionRecord:
            found = read_run(root, **more)
            return msgspec.structs.replace(found, version=root.name.rpartition("-")[2], digest=f"{root.name:0>64}")

        monkeypatch.setattr("eyas_host.retrain.run.run_chain", chain)
        monkeypatch.setattr("eyas_host.retrain.run.read_run", record)
        monkeypatch.setattr("eyas_host.retrain.run.judge", given)
        registry = Registry(place / "registry", now=lambda: 5.0, by="me")
        settings: dict[str, Any] = {"version": "1.1.0", "terms": Terms(epochs=2), "reason": None}
        settings |= more
        said: list[str] = []
        state = retrain(
            registry,
            registry.find("toy@1.0.0"),
            [Source(path=str(place / "later"))],
            runs=place / "runs",
            now=lambda: 5.0,
            say=said.append,
            **settings,
        )
        (place / "said.txt").write_text("\n".join(said))
        return state

    return run


FIGURES = Compared(images=9, changed=4, gain=0.2, interval=(0.1, 0.3), p_better=0.01, p_worse=0.99)
IS_WORSE = Judged(outcome=WORSE, level=0.05, old=None, new=FIGURES, problems=("it loses",))
IS_BETTER = Judged(outcome=BETTER, level=0.05, old=None, new=FIGURES, problems=())
IS_UNSHOWN = msgspec.structs.replace(IS_BETTER, outcome=UNSHOWN)


def test_a_worse_one_is_kept_out_and_stays_so(quick: Callable[..., Retraining], place: Path) -> None:
    assert quick(place, IS_WORSE).stage == "kept out"
    assert quick(place, IS_BETTER).stage == "kept out", "the same folder is not judged again"
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


@pytest.mark.parametrize("at", range(14))
def test_killed_at_any_step_it_goes_on_and_registers_nothing_unjudged(
    quick: Callable[..., Retraining], place: Path, at: int
) -> None:
    """SIGKILL before or after each step: nothing is named or registered before the judgement is written."""
    child = os.fork()
    if child == 0:
        try:
            left = 2 * at  # each step counts twice: before it, and after it

            def counted(work: Callable[..., Any]) -> Callable[..., Any]:
                def run(*words: Any, **more: Any) -> Any:
                    step()
                    done = work(*words, **more)
                    step()
                    return done

                def step() -> None:
                    nonlocal left
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

                return run

            run_module.write_state = counted(run_module.write_state)  # type: ignore[assignment]
            run_module.read_run = counted(run_module.read_run)  # type: ignore[assignment]
            run_module.fit_heads = counted(run_module.fit_heads)  # type: ignore[assignment]
            run_module.derive = counted(run_module.derive)  # type: ignore[assignment]
            for name in ("add", "set_alias", "note", "bundle"):
                setattr(Registry, name, counted(getattr(Registry, name)))
            quick(place, IS_BETTER)
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    registry = Registry(place / "registry", now=lambda: 6.0, by="")
    state = read_state(place / "runs/toy-1.1.0")
    judged = state is not None and state.judged is not None
    if not judged:
        assert len(registry.versions()) == 1 and registry.aliases() == {"toy": {"champion": "1.0.0"}}
    if os.WIFSIGNALED(status):
        assert quick(place, IS_BETTER).stage == "registered"
    assert {one.version for one in registry.versions()} == {"1.0.0", "1.1.0"}
    assert registry.aliases() == {"toy": {"champion": "1.0.0", "challenger": "1.1.0"}}
    assert sum(one.what == "added" and one.version == "1.1.0" for one in registry.history()) == 1


def test_a_version_that_is_not_shown_to_be_better_is_tried_and_not_promoted(
    quick: Callable[..., Retraining], place: Path
) -> None:
    state = quick(place, IS_UNSHOWN, terms=Terms(promote=True))
    assert (state.stage, state.alias) == ("registered", "challenger")
    assert "which a rollout has to prove" in (place / "said.txt").read_text()
    registry = Registry(place / "registry", now=lambda: 6.0, by="")
    assert registry.find("champion").version == "1.0.0"
    assert registry.find("challenger").note == (
        "retrained from toy@1.0.0, not shown to be better: +20.0 points of balanced accuracy (+10.0 to +30.0) on 9 "
        "images, 4 of them predicted differently; by hand"
    )


def test_one_that_is_better_is_promoted_unless_another_one_serves_by_then(
    quick: Callable[..., Retraining], place: Path
) -> None:
    assert quick(place, IS_BETTER, terms=Terms(promote=True)).alias == "champion"
    with pytest.raises(KeyboardInterrupt):
        quick(place, KeyboardInterrupt(), version="1.2.0", terms=Terms(promote=True))
    registry = Registry(place / "registry", now=lambda: 6.0, by="")
    registry.set_alias("champion", registry.find("toy@1.0.0"))
    state = quick(place, IS_BETTER, version="1.2.0", terms=Terms(promote=True))
    assert state.alias == "challenger" and "toy@1.0.0 serves by now" in (place / "said.txt").read_text()


def test_the_log_says_why_it_began_who_approved_it_and_why_it_was_kept_out(
    quick: Callable[..., Retraining], place: Path
) -> None:
    reason = Reason(why="season or weather (3)", approved_by="anna", alarms=("a",))
    state = quick(place, IS_WORSE, reason=reason)
    assert (state.reason.begun_by, state.reason.approved_by, state.began, state.ended) == ("me", "anna", 5.0, 5.0)
    log = Registry(place / "registry", now=lambda: 6.0, by="").history()[-2:]
    assert [(one.what, one.by, one.version, one.note) for one in log] == [
        (BEGAN, "me", "1.1.0", "season or weather (3); approved by anna"),
        (KEPT_OUT, "me", "1.1.0", "it loses"),
    ]


def test_of_two_at_once_the_second_is_refused(place: Path) -> None:
    registry = Registry(place / "registry", now=lambda: 6.0, by="")
    with only_one(registry, "toy"):
        with pytest.raises(AlreadyRunning, match="toy: a retraining is running already"), only_one(registry, "toy"):
            pass
        done = eyas(place, "retrain", "later", "--cooldown", "0")
        assert done.code == 2 and "is running already" in done.err


@pytest.mark.parametrize("left", [(), (".retrain.json.4711.part",)])
def test_one_that_was_killed_while_it_wrote_its_first_line_begins(
    quick: Callable[..., Retraining], place: Path, left: tuple[str, ...]
) -> None:
    """The folder is made before `retrain.json` has its name."""
    (place / "runs/toy-1.1.0").mkdir(parents=True)
    for name in left:
        (place / "runs/toy-1.1.0" / name).write_text("{")
    assert quick(place, IS_BETTER).stage == "registered"


def test_a_folder_of_something_else_is_not_gone_on_with(quick: Callable[..., Retraining], place: Path) -> None:
    (place / "runs/toy-1.1.0").mkdir(parents=True)
    (place / "runs/toy-1.1.0/recipe.json").write_text("{}")
    with pytest.raises(RegistryError, match="is there already, and no retraining"):
        quick(place, IS_BETTER)
    with pytest.raises(RegistryError, match="is registered already"):
        quick(place, IS_BETTER, version="1.0.0")


def test_a_second_one_waits(place: Path) -> None:
    done = eyas(place, "retrain", "later", "--cooldown", "7")
    assert done.code == 2 and "--cooldown 0 does not wait" in done.err
    done = eyas(place, "retrain", "nowhere", "--cooldown", "0")
    assert done.code == 2 and "nowhere: there are no images" in done.err


def test_versions_follow_each_other() -> None:
    before = ("0.1.0", "1.9.3", "2.0.0-rc1", "3.0.1.dev4")
    assert [next_version(one) for one in before] == ["0.2.0", "1.10.0", "2.1.0", "3.1.0"]
    with pytest.raises(RegistryError, match="'v7': a version is three numbers"):
        next_version("v7")


@pytest.mark.parametrize(
    "version", ["2", "v1.2.0", "../1.2.0", "1.2.0/x", "1.2.0+4", "1.2.0\n", "\u0661.2.0", "1.2.0-"]
)
def test_what_is_no_version_is_refused_before_anything_is_written(
    quick: Callable[..., Retraining], place: Path, version: str
) -> None:
    with pytest.raises(RegistryError, match="a version is three numbers like"):
        quick(place, IS_BETTER, version=version)
    assert not (place / "runs").exists()


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
    images = [msgspec.structs.replace(split.test[0], sha256=f"{number:064}") for number in range(40)]
    targets = np.arange(40) % 2
    opened = SimpleNamespace(images=images, targets=targets, units=np.arange(40), pixels=None)
    monkeypatch.setattr(judge_module.Split, "open_test", lambda *_: opened)
    half = msgspec.structs.replace(split, test=tuple(images[:24]))
    right = np.eye(2)[targets]
    wrong, halves = 1 - right, np.arange(40)[:, None] < 24
    for before, after, outcome, problems in (
        (right, right, UNSHOWN, 1),
        (wrong, right, BETTER, 0),
        (right, wrong, WORSE, 2),
        (right, np.where(halves, wrong, right), WORSE, 1),
        (right, np.where(halves, right, wrong), WORSE, 1),
    ):
        answers = iter([before, after])
        monkeypatch.setattr(judge_module, "_predictions", lambda *_, answers=answers: next(answers))
        found = judge(run, run / "bundle", half)
        assert found.old is not None and found.new is not None
        assert (found.outcome, len(found.problems)) == (outcome, problems)
        assert (found.old.images, found.new.images) == (24, 16)
    answers = iter([right, wrong])
    monkeypatch.setattr(judge_module, "_predictions", lambda *_: next(answers))
    every = msgspec.structs.replace(split, test=tuple(images))
    assert "nothing shows that it is better" in judge(run, run / "bundle", every).problems[-1]


def test_a_candidate_with_other_classes_is_wrong_where_it_names_them(workplace: Path) -> None:
    run = workplace / "runs/toy"
    split, bundle = Split.load(run), Bundle.open(run / "bundle")
    pixels = split.train.pixels
    plain = judge_module._predictions(bundle, pixels, split.labels)
    assert plain.shape == (len(split.train.images), 3) and not plain[:, 2].any()
    turned = judge_module._predictions(bundle, pixels, split.labels[::-1])
    assert np.array_equal(turned[:, :2], plain[:, 1::-1]), "in the order of the images' labels"
    others = judge_module._predictions(bundle, pixels, ("square", "star"))
    assert others[:, 2].all() and not others[:, :2].any(), "no image has what it names"
