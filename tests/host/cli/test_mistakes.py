"""User errors on the command line: one clear message, exit code 2, no traceback, no partial files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.support.inside import Done, eyas
from tests.support.shapes import SHAPES, draw_folder
from tests.support.small_disk import mounted


def recipe(folder: Path, text: str = "") -> Path:
    path = folder / "recipe.toml"
    path.write_text(f'[run]\nname = "mistake"\n[data]\npath = "images"\n{text}')
    return path


def refused(done: Done, *words: str, lines: int = 1) -> None:
    assert done.code == 2, (done.code, done.err)
    assert "Traceback" not in done.err
    stderr = done.err.splitlines()
    errors = [number for number, line in enumerate(stderr) if line.startswith("eyas: ")]
    assert len(errors) == 1, done.err
    for word in words:
        assert word in done.err
    assert len(stderr[errors[0] :]) <= lines + 4


def nothing_finished(folder: Path) -> None:
    assert not list(folder.rglob("stage.json"))
    assert not list(folder.rglob("*.part"))


def no_folder(folder: Path) -> None:
    pass


def one_class(folder: Path) -> None:
    draw_folder(folder / "images", labels=SHAPES[:1])


def empty_class(folder: Path) -> None:
    draw_folder(folder / "images", labels=SHAPES[:2])
    (folder / "images/zebra").mkdir()


def zero_bytes(folder: Path) -> None:
    draw_folder(folder / "images", labels=SHAPES[:2])
    (folder / "images/circle/empty.png").touch()


def not_an_image(folder: Path) -> None:
    draw_folder(folder / "images", labels=SHAPES[:2])
    (folder / "images/circle/notes.jpg").write_bytes(b"not an image" * 100)


def two_labels(folder: Path) -> None:
    draw_folder(folder / "images", labels=SHAPES[:2])
    same = folder / "images/circle/000.png"
    (folder / "images/cross/copy.png").write_bytes(same.read_bytes())


def too_few(folder: Path) -> None:
    draw_folder(folder / "images", labels=SHAPES[:2], count=2)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (no_folder, "no such folder"),
        (one_class, "two or more class folders"),
        (empty_class, "zebra"),
        (zero_bytes, "empty.png"),
        (not_an_image, "notes.jpg"),
        (two_labels, "two labels"),
        (too_few, "too few images"),
    ],
)
def test_bad_images(tmp_path: Path, make: Callable[[Path], None], word: str) -> None:
    make(tmp_path)
    refused(eyas(tmp_path, "distill", recipe(tmp_path)), word)
    nothing_finished(tmp_path)


def test_skip_unreadable_leaves_images_out(tmp_path: Path) -> None:
    zero_bytes(tmp_path)
    done = eyas(tmp_path, "split", recipe(tmp_path, "skip_unreadable = true"))
    assert done.code == 0
    assert "left out" in done.err and "empty.png" in done.err


def test_unusual_but_valid_images_are_accepted(tmp_path: Path) -> None:
    images = draw_folder(tmp_path / "images", labels=SHAPES[:2])
    grey = cv2.imread(str(images / "circle/000.png"), cv2.IMREAD_GRAYSCALE)
    assert cv2.imwrite(str(images / "circle/grey.png"), grey)
    assert cv2.imwrite(str(images / "circle/deep.png"), grey.astype(np.uint16) * 257 + 1)
    assert cv2.imwrite(str(images / "circle/alpha.png"), cv2.cvtColor(grey, cv2.COLOR_GRAY2BGRA) // 2)
    done = eyas(tmp_path, "split", recipe(tmp_path))
    assert done.code == 0, done.err
    assert "27 images" in done.err


def test_all_errors_of_a_recipe_at_once(tmp_path: Path) -> None:
    text = "split = [0.5, 0.2, 0.2]\n[teacher]\nepochs = 'six'\nrat = 1\n[studen]\nviews = 3\n"
    done = eyas(tmp_path, "distill", recipe(tmp_path, text))
    refused(done, "4 errors", "[data] split", "[teacher] epochs", "[teacher] rat", "[studen]", lines=5)


def test_unknown_model_before_any_training(tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", labels=SHAPES[:2])
    done = eyas(tmp_path, "distill", recipe(tmp_path, '[student]\nmodel = "mobilenetv3_smal_100"\n'))
    refused(done, "mobilenetv3_smal_100", "mobilenetv3_small_100")
    assert not list(tmp_path.rglob("*.ckpt"))


def test_no_weights_and_no_network(tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", labels=SHAPES[:2])
    done = eyas(tmp_path, "distill", recipe(tmp_path, '[teacher]\nmodel = "resnet18"\n'))
    refused(done, "no weights for resnet18", "hub", "packaged")


def test_missing_extra_names_its_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('[run]\nname = "demo"\n[data]\nsource = "elpv"\n')
    monkeypatch.setitem(sys.modules, "elpv_dataset", None)
    refused(eyas(tmp_path, "distill", path), "pip install 'eyas[demo]'")


def test_unknown_stage(tmp_path: Path) -> None:
    done = eyas(tmp_path, "distill", recipe(tmp_path), "--from", "quantise")
    assert done.code == 2
    assert "quantise" in done.err and "qat" in done.err


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("--from", "techer"), "did you mean 'teach'?"),
        (("--only", "quat"), "did you mean 'qat'?"),
        (("--set", "epochs=3"), "did you mean teacher.epochs or student.epochs or prune.epochs"),
        (("--set", "size=96"), "did you mean image.size?"),
        (("--set", "teacher.epoch=3"), "did you mean 'epochs'?"),
        (("--set", "image.epochs=3"), "[teacher]"),
        (("--set", "techer.epochs=3"), "did you mean 'teacher'?"),
        (("--set", "teacher.weights=hubb"), "did you mean 'hub'?"),
        (("--sett", "a.b=1"), "--set"),
    ],
)
def test_what_was_probably_meant(tmp_path: Path, words: tuple[str, ...], meant: str) -> None:
    done = eyas(tmp_path, "distill", recipe(tmp_path), *words)
    assert done.code == 2 and meant in done.err, done.err
    assert "Traceback" not in done.err and not (tmp_path / "runs").exists()


def test_a_verb_that_was_probably_meant(tmp_path: Path) -> None:
    done = eyas(tmp_path, "distil", recipe(tmp_path))
    assert done.code == 2 and "Did you mean 'distill'?" in done.err


def test_only_a_stage_whose_inputs_are_missing(tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", labels=SHAPES[:2])
    refused(eyas(tmp_path, "distill", recipe(tmp_path), "--only", "qat"), "needs split")


def test_new_refuses_to_overwrite(tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", labels=SHAPES[:2])
    assert eyas(tmp_path, "new", "images").code == 0
    refused(eyas(tmp_path, "new", "images"), "exists already")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    with mounted(tmp_path / "small", "size=1m") as disk:
        yield disk


def test_full_disk(tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_folder(tmp_path / "images", labels=SHAPES[:2])
    text = "[image]\nsize = 64\n[teacher]\nhead_epochs = 1\nepochs = 1\n[student]\nviews = 1\n"
    done = eyas(tmp_path, "distill", recipe(tmp_path, text), "--runs", small_disk)
    refused(done, "the run needs about", "1 MB are free", "free some space")
    nothing_finished(small_disk)
    monkeypatch.setattr("eyas_host.stages.preflight._check_space", lambda *_: None)  # a disk that fills meanwhile
    done = eyas(tmp_path, "distill", recipe(tmp_path, text), "--runs", small_disk)
    refused(done, "No space left on device")
    assert (small_disk / "mistake/split/stage.json").exists()  # finished stages stay
    assert not list(small_disk.rglob("*.part"))
    assert not (small_disk / "mistake/teach/stage.json").exists()


def test_new_quotes_unusual_names(tmp_path: Path) -> None:
    images = draw_folder(tmp_path / 'odd "name"\n[run]', labels=SHAPES[:2])
    (images / "cross").rename(images / 'cross "seed = 7"')
    assert eyas(tmp_path, "new", images, "--name", "odd").code == 0
    done = eyas(tmp_path, "split", "models/odd/recipe.toml")
    assert done.code == 0, done.err
    assert "24 images, 2 classes" in done.err
