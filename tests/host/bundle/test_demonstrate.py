"""The folder that a finished bundle is tried on: every validation image once, in a folder named like its label."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import cv2
import msgspec
import pytest

from eyas_device.agent.accuracy import Accuracy
from eyas_device.camera import open_camera
from eyas_host.bundle.demonstrate import link_validation
from eyas_host.data.index import build_index
from eyas_host.data.manifest import MANIFEST, load_manifest, save_split
from eyas_host.data.split import Split, split_index
from eyas_host.pipeline.runner import RunContext
from eyas_host.recipe import Recipe
from eyas_host.recipe.data import DataSection
from eyas_host.recipe.run import RunSection
from eyas_host.support.errors import DataError, StageError
from tests.support.shapes import SHAPES, draw_shape

LABELS = ("-rf", "con:aux*? (n.a.)", "猫", "Ger\u00e4t", "x" * 200)
ODD = ("", ".dat", ".JPG_original", ".PNG")


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    """A run on a table of files in a store, with odd suffixes or none; its bundle and test are of no matter here."""
    base = tmp_path_factory.mktemp("demonstrated")
    rows = ["path,label"]
    (base / "store").mkdir()
    for place, label in enumerate(LABELS):
        for number in range(12):
            name = f"store/{place}-{number}{ODD[number % len(ODD)]}"
            image = draw_shape(SHAPES[0], 100 * place + number, 40, 36)
            (base / name).write_bytes(cv2.imencode(".png", image)[1].tobytes())
            rows.append(f'{name},"{label}"')
    (base / "t.csv").write_text("\n".join(rows), encoding="utf-8")
    data = DataSection(source="csv", path=str(base / "t.csv"), near_duplicates=0, split=(0.5, 0.3, 0.2))
    root = base / "ok" / "run"  # a folder around it that is named like no label
    root.mkdir(parents=True)
    index = build_index(data)
    save_split(split_index(index, data, 0), root, index)
    return RunContext(Recipe(run=RunSection(name="run"), data=data), root)


def accuracy_of(context: RunContext, folder: Path) -> Accuracy:
    """As the device counts it, for predictions that are all right."""
    accuracy = Accuracy(LABELS, str(folder))
    labels = {image.sha256: image.label for image in Split.load(context.root).manifest.validation}
    with open_camera(f"folder:{folder}") as camera:
        for frame in iter(camera.capture, None):
            frame.pixels()
            accuracy.add(frame.source, LABELS.index(labels[sha256(Path(frame.source))]))
    return accuracy


def sha256(path: Path) -> str:
    from eyas_device.bundle import sha256 as of_file

    return of_file(path)


def test_the_device_finds_every_image_under_its_label(context: RunContext) -> None:
    folder = link_validation(context)
    accuracy = accuracy_of(context, folder)
    score = accuracy.score()
    assert score is not None
    assert (score.images, score.accuracy, accuracy.unlabelled) == (
        len(Split.load(context.root).manifest.validation),
        1.0,
        0,
    )
    assert all(path.is_symlink() for path in folder.rglob("*.*") if path.parent != folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(LABELS)
    assert link_validation(context) == folder, "a second time, too"


def test_images_are_copied_where_there_are_no_links(context: RunContext, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    score = accuracy_of(context, link_validation(context)).score()
    assert score is not None and score.images == len(Split.load(context.root).manifest.validation)


def test_a_link_in_the_place_of_the_folder_is_not_followed(context: RunContext, tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"x")
    shutil.rmtree(context.root / "validation", ignore_errors=True)
    (context.root / "validation").symlink_to(tmp_path)
    folder = link_validation(context)
    assert not folder.is_symlink()
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_folder_that_cannot_be_written_is_one_line(context: RunContext, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(StageError, match=r"validation: cannot be written \(No space left on device\); the bundle"):
        link_validation(context)


@pytest.mark.parametrize("label", ["..", "../../../evil", "a/b", "/abs", ".", ""])
def test_labels_of_an_older_split_never_lead_out_of_the_run(label: str, context: RunContext, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(context.root / "split", root / "split")
    manifest = load_manifest(root / MANIFEST)
    image = msgspec.structs.replace(manifest.validation[0], label=label)
    rest = manifest.validation[1:]
    changed = msgspec.structs.replace(manifest, validation=(image, *rest), labels=(*manifest.labels, label))
    (root / MANIFEST).write_bytes(msgspec.json.encode(changed))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="run again with --from split"):
        link_validation(RunContext(context.recipe, root))
    assert sorted(tmp_path.rglob("*")) == before
