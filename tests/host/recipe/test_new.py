"""`eyas new`: no recipe that Eyas itself warns of, what it says about the images, and commands that can be typed."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import cv2
import numpy as np
import pytest
import timm

from eyas_host.cli import app
from eyas_host.data.first_look import doubts, look_at
from eyas_host.models.weights import fit_to_images
from eyas_host.recipe.load import load_recipe
from eyas_host.recipe.presets import STUDENTS, TEACHERS
from eyas_host.recipe.scaffold import new_recipe
from eyas_host.recipe.warnings import label_warnings, recipe_warnings
from eyas_host.train.view_cache import check_views_fit
from tests.support.garments import draw_garments
from tests.support.inside import eyas

SIZES = [(28, 28), (32, 32), (64, 48), (96, 80), (130, 140), (300, 200), (640, 480), (4000, 3000), (3000, 4000)]
LONG = [(64, 20), (400, 100), (2000, 300), (6000, 900), (120, 900), (12000, 200)]
LABELS = [
    ("ok", "defective"),
    tuple(map(str, range(10))),
    ("left", "right"),
    ("upside-down", "upright"),
    tuple(f"type {number}" for number in range(40)),
]


def backbone(name: str) -> Any:
    """What `fit_to_images` reads of a network: its configuration."""
    config = timm.get_pretrained_cfg(name)
    assert config is not None
    return SimpleNamespace(pretrained_cfg=config.to_dict(), default_cfg=config.to_dict())


def classes_of(labels: tuple[str, ...], images: int) -> dict[str, list[Path]]:
    """`images` paths over the labels; none is read."""
    return {label: [Path("x.png")] * (images // len(labels)) for label in labels}


@pytest.mark.parametrize("teacher", TEACHERS)
def test_no_recipe_of_new_is_warned_of(teacher: str, tmp_path: Path) -> None:
    students = [(student.model, origin) for student in STUDENTS.values() for origin in ("hub", "pretrained")]
    bodies = [(name, origin, backbone(name)) for name, origin in [(TEACHERS[teacher].model, "hub"), *students]]
    fits = set()
    for number, typical in enumerate([*SIZES, *LONG]):
        labels, images = LABELS[number % len(LABELS)], (40, 200, 5000)[number % 3]
        network = [*STUDENTS.values()][number % len(STUDENTS)]
        path = new_recipe(
            tmp_path, classes_of(labels, images), tmp_path, str(number), TEACHERS[teacher], network, typical=typical
        )
        recipe = load_recipe(path)
        assert recipe_warnings(recipe) == label_warnings(recipe, labels) == []
        for model, origin, body in bodies:
            assert fit_to_images(body, model, origin, recipe.image).warnings == (), typical
        fits.add(recipe.image.fit)
    assert fits == {"crop", "pad"}


@pytest.mark.parametrize("labels", LABELS)
def test_labels_that_a_mirror_would_change_are_not_mirrored(labels: tuple[str, ...], tmp_path: Path) -> None:
    recipe = load_recipe(new_recipe(tmp_path, classes_of(labels, 200), tmp_path, "labels"))
    assert label_warnings(recipe, labels) == []
    assert recipe.augment.horizontal_flip == (labels[0] not in ("0", "left"))


def test_the_views_of_very_many_images_fit_into_the_cache(tmp_path: Path) -> None:
    classes = classes_of(("a", "b"), 300_000)
    recipe = load_recipe(new_recipe(tmp_path, classes, tmp_path, "large", typical=(640, 480)))
    train = 210_000
    assert recipe.student.views < 6
    assert train * recipe.student.views * 3 * recipe.image.size**2 < 1e9 * recipe.student.cache_gb
    assert check_views_fit(tmp_path, recipe, train, existing=recipe.student.views) == 0


def test_a_long_image_keeps_some_height(tmp_path: Path) -> None:
    recipe = load_recipe(new_recipe(tmp_path, classes_of(("a", "b"), 40), tmp_path, "p", typical=(900, 300)))
    assert (recipe.image.size, recipe.image.fit) == (192, "pad")


def grey(value: int, width: int = 60, height: int = 50) -> np.ndarray[Any, np.dtype[np.uint8]]:
    noise = np.random.default_rng(value).integers(0, 256, (height // 10, width // 10), dtype=np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def folder(root: Path, counts: dict[str, int], **size: int) -> dict[str, list[Path]]:
    for label, count in counts.items():
        (root / label).mkdir(parents=True)
        for number in range(count):
            assert cv2.imwrite(str(root / label / f"{number:03}.png"), grey(crc32(f"{label}{number}".encode()), **size))
    return {label: sorted((root / label).iterdir()) for label in counts}


def test_what_is_said_of_a_good_set(tmp_path: Path) -> None:
    classes = folder(tmp_path, {"ok": 30, "scratched": 35})
    look = look_at(classes)
    assert look.describe_sizes() == "60 x 50 pixels, grey"
    assert doubts(classes, look, 128) == []


@pytest.mark.parametrize(
    ("counts", "size", "words"),
    [
        ({"a": 30, "b": 12}, {}, "few images: b 12"),
        ({"a": 30, "b": 2}, {}, "too few images to be split into training, validation and test: b 2"),
        ({"a": 301, "b": 29}, {}, "imbalance: 10 images of 'a' for each of 'b'"),
        ({"a": 30, "b": 30}, {"width": 28, "height": 28}, "very small images: 28 x 28"),
        ({"a": 30, "b": 30}, {"width": 600, "height": 60}, "a strip of 128 x 13"),
        ({"scratch": 30, "Scratches": 30}, {}, "are 'scratch' and 'Scratches' the same class?"),
        ({"no-defect": 30, "No defect": 30}, {}, "are 'no-defect' and 'No defect' the same class?"),
        ({"ok": 30, "New folder": 30}, {}, "is 'New folder' a class?"),
    ],
)
def test_doubts(counts: dict[str, int], size: dict[str, int], words: str, tmp_path: Path) -> None:
    classes = folder(tmp_path, counts, **size)
    found = doubts(classes, look_at(classes), 128)
    assert words in found[0] and len(found) <= 2, found


def test_frames_of_one_scene_and_damaged_files(tmp_path: Path) -> None:
    classes = folder(tmp_path, {"a": 30, "b": 30})
    scene = grey(1, 200, 200)
    for number, path in enumerate(classes["a"]):
        assert cv2.imwrite(str(path), np.clip(scene.astype(int) + number % 5, 0, 255).astype(np.uint8))
    (tmp_path / "b/000.png").write_bytes(b"\x89PNG\r\n")
    look = look_at(classes)
    found = doubts(classes, look, 128)
    assert any("neighbouring images look nearly the same" in doubt for doubt in found)
    assert any("cannot be read" in doubt and "000.png" in doubt for doubt in found)
    assert "mostly 200 x 200" in look.describe_sizes()


def commands(text: str) -> list[list[str]]:
    """The command lines in some output, as a shell reads them."""
    lines = [line.partition("    #")[0].partition("    to ")[0].strip() for line in text.splitlines()]
    lines = [line.partition(":    ")[2] if line.startswith(("next", "then")) else line for line in lines]
    return [words for line in lines if len(words := shlex.split(line)) > 1 and words[0].endswith("eyas")]


def test_new_says_what_to_type_and_a_second_time_too(tmp_path: Path) -> None:
    images = draw_garments(tmp_path / "our clothes (2026)", count=2)
    first = eyas(tmp_path, "new", images.name)
    assert first.code == 0 and "20 images, 10 classes" in first.out and "28 x 28 pixels, grey" in first.out
    preview, distill = commands(first.out)
    assert preview[1:] == ["preview", "models/our-clothes-2026/recipe.toml"] and distill[1] == "distill"
    again = eyas(tmp_path, "new", images.name)
    assert again.code == 2 and "exists already" in again.err and "20 images" in again.out
    use, another = commands(again.err)
    assert use[1:] == distill[1:]
    assert eyas(tmp_path, *another[1:]).code == 0
    assert (tmp_path / "models/our-clothes-2026-2/recipe.toml").exists()


def test_commands_are_quoted_and_name_the_program_as_it_was_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eyas_host.support.commands import command

    own = tmp_path / "my env" / "bin" / "eyas"
    own.parent.mkdir(parents=True)
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["my env/bin/eyas", "new", "x"])
    assert command("eyas", "distill", "a b.toml") == "'my env/bin/eyas' distill 'a b.toml'"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr("sys.argv", [str(own), "new", "x"])
    assert command("eyas", "new") == f"'{own}' new"
    monkeypatch.setenv("PATH", str(own.parent))
    assert command("eyas", "new") == "eyas new"


def test_the_help_names_the_same_commands() -> None:
    assert "eyas preview models/images/recipe.toml" in (app.HELP / "new.md").read_text(encoding="utf-8")
