"""Augmentation: geometry, light, mixing, RandAugment, forbidden augmentations, ramp-up, and the preview sheet."""

from __future__ import annotations

from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
import torch

from eyas_device.preprocess import Preprocessing, prepare
from eyas_host.data.index import build_index
from eyas_host.data.manifest import save_split
from eyas_host.data.preview import write_preview
from eyas_host.data.split import Split, split_index
from eyas_host.data.transforms import PHOTOMETRIC_OPS, Augmenter, photometric_randaugment, prepared
from eyas_host.pipeline.runner import RunContext
from eyas_host.recipe import Recipe
from eyas_host.recipe.augment import AugmentSection
from eyas_host.recipe.augment_rules import OFF
from eyas_host.recipe.data import DataSection
from eyas_host.recipe.image import ImageSection
from eyas_host.recipe.load import load_recipe
from eyas_host.recipe.run import RunSection
from eyas_host.support.errors import DataError, RecipeError
from tests.support.shapes import SHAPES, draw_folder, draw_shape

STILL = AugmentSection(horizontal_flip=False, rotate_degrees=0.0, crop_scale=1.0, brightness=0.0, contrast=0.0)
SPEC = Preprocessing(size=32)
EVERYTHING = AugmentSection(
    vertical_flip=True, quarter_turns=True, rotate_degrees=20.0, brightness=0.4, contrast=0.4, cutmix=0.3, mixup=0.3
)


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    return [draw_shape(label, seed, 60 + 4 * seed, 50) for label in SHAPES[:3] for seed in range(4)]


# Views


def test_without_augmentation_a_view_is_the_prepared_image(frames: list[np.ndarray]) -> None:
    assert np.array_equal(Augmenter(STILL, SPEC).views(frames, (0, 1)), prepared(frames, SPEC))


def test_flips_and_quarter_turns_give_exactly_the_eight_orientations() -> None:
    square = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    settings = msgspec.structs.replace(STILL, horizontal_flip=True, vertical_flip=True, quarter_turns=True)
    views = {view.tobytes() for n in range(80) for view in Augmenter(settings, SPEC).views([square], (n,))}
    rotated = [np.rot90(square, turns) for turns in range(4)]
    assert views == {np.ascontiguousarray(one).tobytes() for r in rotated for one in (r, r[:, ::-1])}


def test_a_view_depends_on_seed_and_row_only(frames: list[np.ndarray]) -> None:
    augmenter = Augmenter(EVERYTHING, SPEC)
    views = augmenter.views(frames, (0, 5, 1))
    assert np.array_equal(augmenter.views(frames, (0, 5, 1), rows=[7, 2]), views[[7, 2]])
    assert not np.array_equal(augmenter.views(frames, (0, 5, 2)), views)


def test_crops_enlarge_a_part_of_at_least_the_asked_area() -> None:
    ramp = np.repeat(np.arange(0, 256, 2, dtype=np.uint8)[None, :, None], 128, 0).repeat(3, 2)
    settings = msgspec.structs.replace(STILL, crop_scale=0.25)
    views = np.concatenate([Augmenter(settings, SPEC).views([ramp], (n,)) for n in range(60)])
    spans = views[:, 16, -1, 0].astype(int) - views[:, 16, 0, 0]
    assert spans.min() >= 0.45 * 254 and spans.max() > 0.9 * 240 and len(set(spans.tolist())) > 20


def test_rotation_stays_within_the_bound() -> None:
    bar = np.zeros((65, 65, 3), np.uint8)
    bar[30:35] = 255
    settings = msgspec.structs.replace(STILL, rotate_degrees=20.0)
    angles = []
    for n in range(40):
        rows, columns = np.nonzero(Augmenter(settings, Preprocessing(size=64)).views([bar], (n,))[0, :, 8:-8, 0] > 200)
        angles.append(np.degrees(np.arctan(np.polyfit(columns, rows, 1)[0])))
    assert max(map(abs, angles)) < 21 and max(angles) > 12 and min(angles) < -12


def test_brightness_and_contrast_stay_within_their_bounds() -> None:
    grey = np.full((32, 32, 3), 100, np.uint8)
    levels = [
        int(Augmenter(msgspec.structs.replace(STILL, brightness=0.3), SPEC).views([grey], (n,))[0, 0, 0, 0])
        for n in range(60)
    ]
    assert 69 <= min(levels) < 78 and 122 < max(levels) <= 131


def test_the_logarithm_of_a_change_of_light_is_uniform() -> None:
    grey = np.full((32, 32, 3), 100, np.uint8)
    settings = msgspec.structs.replace(STILL, brightness=0.6)
    levels = [int(Augmenter(settings, SPEC).views([grey], (n,))[0, 0, 0, 0]) for n in range(600)]
    quartiles = np.quantile(levels, (0.25, 0.5, 0.75))
    assert quartiles == pytest.approx([40 * 2**0.5, 80, 80 * 2**0.5], rel=0.06)  # of 40 to 160, two doublings


def test_cutmix_pastes_a_patch_of_another_view() -> None:
    black, white = np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)
    settings = msgspec.structs.replace(STILL, cutmix=1.0)
    views = np.concatenate([Augmenter(settings, SPEC).views([black, white], (n,), rows=[0]) for n in range(60)])
    assert set(np.unique(views).tolist()) == {0, 255}
    pasted = (views[..., 0] == 255).mean(axis=(1, 2))
    assert 0.25 < (pasted > 0).mean() < 0.75  # the other image is the image itself in half of the draws
    for view in views[pasted > 0]:
        rows, columns = np.nonzero(view[..., 0])
        assert np.ptp(rows) == np.ptp(columns) and len(rows) == (np.ptp(rows) + 1) ** 2
    assert not Augmenter(settings, SPEC).views([black, white], (0,), rows=[0], mixed=False).any()


# Forbidden


def loaded(folder: Path, augment: str) -> AugmentSection:
    path = folder / "recipe.toml"
    path.write_text(f'[run]\nname = "a"\n[data]\npath = "images"\n[augment]\n{augment}')
    return load_recipe(path).augment


def test_forbidden_defaults_are_off(tmp_path: Path) -> None:
    found = loaded(tmp_path, 'forbid = ["horizontal_flip", "rotate_degrees", "crop_scale", "brightness", "solarize"]')
    assert not found.horizontal_flip and found.rotate_degrees == 0.0 and found.crop_scale == 1.0
    assert found.brightness == 0.0 and found.contrast == 0.3


@pytest.mark.parametrize(
    ("augment", "words"),
    [
        ('forbid = ["horizontal_flip"]\nhorizontal_flip = true', ["horizontal_flip = true"]),
        ('forbid = ["cutmix", "mixup"]\ncutmix = 0.2', ["cutmix = 0.2"]),
        ('forbid = ["rotate_degrees"]\nrotate_degrees = 3.0', ["rotate_degrees = 3.0"]),
        ('forbid = ["horizontal_flip"]\nvertical_flip = true\nquarter_turns = true', ["one flip and a half turn"]),
        ('forbid = ["horizontal_flip"]\nvertical_flip = true\nrotate_degrees = 180', ["and rotate_degrees (one flip"]),
        (
            'forbid = ["vertical_flip"]\nquarter_turns = true\nhorizontal_flip = true',
            ["horizontal_flip and quarter_turns"],
        ),
        ('forbid = ["quarter_turns"]\nvertical_flip = true', ["horizontal_flip and vertical_flip (together"]),
        ('forbid = ["quarter_turns"]\nrotate_degrees = 90', ["rotate_degrees = 90.0 (comes close to a quarter turn)"]),
    ],
)
def test_enabling_what_is_forbidden_is_an_error(tmp_path: Path, augment: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        loaded(tmp_path, augment)
    _, *lines = str(caught.value).splitlines()
    assert len(lines) == 1 and "ruled out by forbid" in lines[0]
    assert all(word in lines[0] for word in words)


def test_names_of_augmentations_are_checked(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="horizontal_flop"):
        loaded(tmp_path, 'forbid = ["horizontal_flop"]')


@pytest.mark.parametrize("name", sorted(OFF))
def test_augmenter_never_draws_what_is_forbidden(name: str, frames: list[np.ndarray]) -> None:
    """Whatever a section says beside `forbid`, the views are those of the section with that setting off."""
    rich = msgspec.structs.replace(EVERYTHING, randaugment=2)
    forbidden = Augmenter(msgspec.structs.replace(rich, forbid=(name,)), SPEC).views(frames, (1,))
    off = Augmenter(msgspec.structs.replace(rich, forbid=(), **{name: OFF[name]}), SPEC).views(frames, (1,))
    if name in PHOTOMETRIC_OPS:  # RandAugment loses a step of that name too
        off = Augmenter(msgspec.structs.replace(rich, **{name: OFF[name]}, forbid=(name,)), SPEC).views(frames, (1,))
    assert np.array_equal(forbidden, off)
    assert not np.array_equal(forbidden, Augmenter(rich, SPEC).views(frames, (1,)))


# RandAugment


def test_randaugment_has_no_geometry_and_no_forbidden_step() -> None:
    names = set(photometric_randaugment(2, 9)._AUGMENTATION_SPACE)
    assert names == {"Identity", *PHOTOMETRIC_OPS.values()}
    assert set(photometric_randaugment(2, 9, ("solarize", "saturation"))._AUGMENTATION_SPACE) == names - {
        "Solarize",
        "Color",
    }
    assert set(photometric_randaugment(1, 9, tuple(PHOTOMETRIC_OPS))._AUGMENTATION_SPACE) == {"Identity"}


def test_randaugment_leaves_every_edge_where_it_is() -> None:
    """An image of two levels keeps its shape: whatever light does, the border between them does not move."""
    image = np.full((32, 32, 3), 60, dtype=np.uint8)
    image[8:20, 12:29] = 190
    settings = msgspec.structs.replace(STILL, randaugment=2, magnitude=12, forbid=("sharpness",))
    views = Augmenter(settings, SPEC).views([image] * 60, (4,))
    inside = image[..., 0] == 190
    for view in views:
        assert len(np.unique(view[inside].reshape(-1, 3), axis=0)) == 1
        assert len(np.unique(view[~inside].reshape(-1, 3), axis=0)) == 1
    assert len(np.unique(views[:, 0, 0, 0])) > 5
    assert np.array_equal(views, Augmenter(settings, SPEC).views([image] * 60, (4,)))


def test_saturation_knows_red_from_blue() -> None:
    """The only step left weighs the channels as a red-green-blue image's: pure blue is dark, pure red less so."""
    others = tuple(name for name in PHOTOMETRIC_OPS if name != "saturation")
    blue = np.zeros((32, 32, 3), dtype=np.uint8)
    blue[..., 0] = 200
    settings = msgspec.structs.replace(STILL, randaugment=1, magnitude=30, forbid=others)
    views = Augmenter(settings, SPEC).views([blue] * 40, (0,))
    greyed = next(view for view in views if view[0, 0, 2] > 0)
    assert abs(int(greyed[0, 0, 2]) - 0.9 * 0.114 * 200) < 3


# Mixup


def test_mixup_blends_some_views_with_another() -> None:
    plain = [np.full((32, 32, 3), 20 * n, dtype=np.uint8) for n in range(12)]
    views = Augmenter(msgspec.structs.replace(STILL, mixup=0.5), SPEC).views(plain, (1,))
    assert all((view == view[0, 0, 0]).all() for view in views)
    mixed = [int(view[0, 0, 0]) != 20 * n for n, view in enumerate(views)]
    assert 2 <= sum(mixed) <= 10


def test_a_view_leaves_a_gpus_random_generator_alone(frames: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout on a GPU would otherwise depend on whether this process draws the views."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    Augmenter(EVERYTHING, SPEC).views(frames, (2,))
    assert not seeded
    torch.manual_seed(3)
    assert seeded == [3]


def test_nothing_is_mixed_where_nobody_answers_for_it(frames: list[np.ndarray]) -> None:
    settings = msgspec.structs.replace(EVERYTHING, cutmix=1.0, mixup=1.0)
    alone = Augmenter(msgspec.structs.replace(settings, cutmix=0.0, mixup=0.0), SPEC).views(frames, (2,))
    assert np.array_equal(Augmenter(settings, SPEC).views(frames, (2,), mixed=False), alone)
    assert not np.array_equal(Augmenter(settings, SPEC).views(frames, (2,)), alone)


# Warm-up


def test_strength_rises_to_one() -> None:
    augmenter = Augmenter(AugmentSection(warm_up=3), SPEC)
    assert [augmenter.strength(epoch) for epoch in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert Augmenter(AugmentSection(), SPEC).strength(0) == 1.0


def test_weak_views_are_nearer_to_the_image(frames: list[np.ndarray]) -> None:
    settings = AugmentSection(
        horizontal_flip=False, rotate_degrees=30.0, crop_scale=0.4, brightness=0.5, contrast=0.5, randaugment=1
    )
    plain = prepared(frames, SPEC).astype(int)
    apart = [
        np.mean([np.abs(Augmenter(settings, SPEC).views(frames, (n,), strength=s) - plain).mean() for n in range(4)])
        for s in (0.1, 0.5, 1.0)
    ]
    assert apart[0] < 0.6 * apart[1] and apart[1] < 0.9 * apart[2]
    nothing = Augmenter(msgspec.structs.replace(settings, randaugment=0), SPEC).views(frames, (0,), strength=0.0)
    assert np.array_equal(nothing, prepared(frames, SPEC))


# The sheet


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    data = DataSection(path=str(draw_folder(tmp_path / "images", count=8, width=64, height=40, labels=SHAPES[:2])))
    recipe = Recipe(run=RunSection(name="seen"), data=data, image=ImageSection(size=64, fit="pad"), augment=EVERYTHING)
    save_split(split_index(build_index(data), data, 0), tmp_path / "run")
    return RunContext(recipe, tmp_path / "run")


def test_sheet_shows_images_before_and_after(context: RunContext) -> None:
    path = write_preview(context, images=2, views=3)
    sheet = cv2.imread(str(path))
    assert path == context.root / "preview/sheet.png"
    side, gap, names = 112, 8, 168
    assert sheet.shape[1] == 2 * 24 + names + 5 * (side + gap) + 16
    rows = [np.flatnonzero((sheet[:, 24 + names + 5 : 24 + names + side - 5] != 255).all(axis=(1, 2)))]
    assert len(rows[0]) == 4 * side
    prepared_left = 24 + names + side + gap
    cell = sheet[rows[0][:side], prepared_left : prepared_left + side]
    likely = [
        np.abs(cell.astype(int) - cv2.resize(shown, (side, side), interpolation=cv2.INTER_CUBIC)).mean()
        for p in Split.load(context.root).manifest.train
        for shown in [prepare(cv2.imread(p.path), context.recipe.image.preprocessing())]
    ]
    assert min(likely) < 1.0  # one of the training images, as the device prepares it
    before = path.read_bytes()
    assert write_preview(context, images=2, views=3).read_bytes() == before


def test_sheet_needs_a_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--from split"):
        write_preview(RunContext(Recipe(run=RunSection(name="none")), tmp_path))
