"""What images store is reported in a line for each kind; 16 bits that are not used are never seen as black."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from eyas_device.camera import open_camera
from eyas_device.preprocess import Preprocessing
from eyas_host.data.dataset import ImageDataset
from eyas_host.data.first_look import doubts, look_at
from eyas_host.data.index import Index, build_index
from eyas_host.data.sources import LabelledImage
from eyas_host.data.stored_values import StoredImageFile, StoredValues, check_bits, describe_values
from eyas_host.recipe.data import DataSection
from eyas_host.recipe.load import load_recipe
from eyas_host.recipe.scaffold import new_recipe
from eyas_host.support.errors import DataError
from tests.support.stored_images import ALPHA, GREY, RGB, big_endian, files, png, saved, tiff

_RNG = np.random.default_rng(0)


def place(root: Path, name: str, data: bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def varied() -> np.ndarray:
    """An image in colour that no other one equals."""
    return _RNG.integers(0, 256, (24, 40, 3), dtype=np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(4):
        for label in "ab":
            place(tmp_path, f"{label}/{number}.png", saved(varied(), "PNG"))
    return tmp_path


def index(root: Path, bits: int = 0) -> Index:
    return build_index(DataSection(path=str(root)), bits)


def profile(*, wide: bool) -> bytes:
    """An sRGB profile, or the same with another name."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return data.replace("sRGB built-in".encode("utf-16-be"), "Display P3 xx".encode("utf-16-be")) if wide else data


def test_nothing_is_said_of_plain_images(root: Path) -> None:
    place(root, "a/srgb.png", saved(varied(), "PNG", icc_profile=profile(wide=False)))
    place(root, "b/plain.jpg", saved(varied(), "JPEG", quality=95))
    place(root, "b/opaque.tif", saved(varied(), "TIFF"))
    assert index(root).remarks == ()


def test_each_kind_is_a_line_with_a_count_and_examples(root: Path) -> None:
    for number in range(5):
        place(root, f"a/clear{number}.png", saved(np.dstack([varied(), ALPHA]), "PNG"))
    others = {"save_all": True, "append_images": [Image.fromarray(RGB)]}
    place(root, "a/film.webp", saved(varied(), "WEBP", lossless=True, **others))
    place(root, "b/film.png", saved(varied(), "PNG", **others))
    place(root, "b/stack.tif", saved(varied(), "TIFF", **others))
    place(root, "b/print.jpg", saved(Image.fromarray(varied()).convert("CMYK"), "JPEG"))
    place(root, "b/wide.jpg", saved(varied(), "JPEG", icc_profile=profile(wide=True)))
    place(root, "b/night.png", saved(varied() // 9, "PNG"))
    place(root, "b/lid.png", saved(np.full((24, 40, 3), (90, 10, 0), np.uint8), "PNG"))
    place(root, "b/grey.png", saved(varied()[..., 0], "PNG"))
    place(root, "b/stamp.png", saved(varied()[:6, :10], "PNG"))
    place(root, "b/poster.png", saved(np.tile(varied(), (5, 5, 1)), "PNG"))
    place(root, "b/strip.png", saved(varied()[:8], "PNG"))
    lines = index(root).remarks
    wanted = {
        "5 images with transparency: composited on black (a/clear0.png, ": ", …)",
        "2 images with several frames: the first is used (": "",
        "1 image with several pages: the first is used (b/stack.tif)": "",
        "1 image in CMYK: converted to RGB without a colour profile (b/print.jpg)": "",
        "1 image with the colour profile Display P3 xx: the values are used as they are stored (b/wide.jpg)": "",
        "1 image very dark (99 % of the values are at most 31 of 255): are they what the camera saw? (b/night.png)": "",
        "1 image of one colour: is there anything to see? (b/lid.png)": "",
        "1 image in grey among others in colour: a class must not be known by that (b/grey.png)": "",
        "1 image much smaller than the others (half of them have 40 x 24 pixels or more) (b/stamp.png)": "",
        "1 image much larger than the others (half of them have 40 x 24 pixels or less) (b/poster.png)": "",
        "1 image of another shape than the others (b/strip.png)": "",
    }
    for start, end in wanted.items():
        found = [line for line in lines if line.startswith(start)]
        assert len(found) == 1 and found[0].endswith(end), (start, lines)
    assert len(lines) == len(wanted), lines


def test_damage_inside_images_is_a_line_a_kind_and_not_printed(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        data = bytearray(saved(varied(), "JPEG", quality=95))
        data[-200:-180] = b"\xff" * 20
        place(root, f"a/damaged{number}.jpg", bytes(data))
    place(root, "b/spare.png", png(varied().reshape(24, -1), 8, 2, spare=b"z" * 400))
    lines = index(root).remarks
    assert capfd.readouterr().err == ""
    jpeg, other = sorted(lines, key=len, reverse=True)
    assert jpeg.startswith("2 damaged images, used as decoded (Corrupt JPEG data: ")
    assert jpeg.endswith("): a/damaged1.jpg, a/damaged2.jpg")
    assert other == "1 damaged image, used as decoded (libpng warning: IDAT: Too much image data): b/spare.png"


@pytest.mark.parametrize(("used", "bits"), [(10, 10), (11, 12), (12, 12), (14, 14)])
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bit_images_of_a_camera_of_fewer_bits_are_refused_with_the_fix(
    root: Path, kind: str, used: int, bits: int
) -> None:
    values = GREY.astype(np.uint16) << (used - 8)
    place(root, f"a/deep.{kind}", png(big_endian(values), 16, 0) if kind == "png" else tiff(values))
    place(root, f"b/dim.{kind}", png(big_endian(values // 2), 16, 0) if kind == "png" else tiff(values // 2))
    with pytest.raises(DataError) as caught:
        index(root)
    assert f"2 images of 16 bits per channel hold values up to {values.max()} of 65535 (a/deep." in str(caught.value)
    assert f"[image] bits = {bits} if white is {(1 << bits) - 1}, or bits = 16" in str(caught.value)
    lines = index(root, bits).remarks
    assert [line for line in lines if f"the upper 8 of {bits} bits are used" in line]
    assert not [line for line in lines if "very dark" in line]
    assert [line for line in index(root, 16).remarks if "very dark" in line] or bits == 14


def test_bits_that_are_too_few_are_refused(root: Path) -> None:
    place(root, "a/deep.png", png(big_endian(GREY.astype(np.uint16) << 6), 16, 0))
    with pytest.raises(
        DataError, match=r"bits = 12: 1 image of 16 bits .* up to 14720, more than 4095.*write bits = 14"
    ):
        index(root, 12)


def test_one_camera_of_fewer_bits_among_others_is_reported() -> None:
    def stored(name: str, value: int | None) -> StoredImageFile:
        return StoredImageFile(name, 9, 9, StoredValues(max_value=value))

    files = [stored("/x/a/1.png", 60_000), stored("/x/b/2.png", 4000), stored("/x/b/3.png", None)]
    check_bits(files, 0)
    assert any(
        line == "1 image of 16 bits that are less than a quarter as bright as others (up to 60000) (b/2.png)"
        for line in describe_values(files)
    )
    assert describe_values([]) == []


def test_a_new_recipe_has_the_bits_of_the_camera(tmp_path: Path) -> None:
    for number in range(4):
        for label in "ab":
            deep = varied()[..., 0].astype(np.uint16) << 4
            place(tmp_path, f"set/{label}/{number}.png", png(big_endian(deep), 16, 0))
    classes = {label: sorted((tmp_path / "set" / label).iterdir()) for label in "ab"}
    look = look_at(classes)
    assert look.bits == 12 and look.grey
    said = doubts(classes, look, 64)
    assert any("16 bits that use 12 would be seen almost black: the recipe has bits = 12" in line for line in said)
    assert not any("very dark" in line for line in said)
    recipe = load_recipe(new_recipe(tmp_path / "set", classes, tmp_path / "models", bits=look.bits))
    assert recipe.image.bits == recipe.image.preprocessing().bits == 12
    remarks = build_index(recipe.data, recipe.image.bits).remarks
    assert [line.partition(" (")[0] for line in remarks if "bits" in line] == [
        "8 images of 16 bits per channel: the upper 8 of 12 bits are used"
    ]


def test_training_and_the_folder_camera_see_the_same(tmp_path: Path) -> None:
    deep = png(big_endian(GREY.astype(np.uint16) << 4), 16, 0)
    kinds = (
        "png alpha",
        "tiff 16 alpha",
        "webp alpha",
        "bmp 565",
        "PNG orientation 5",
        "WEBP orientation 8",
        "jpeg cmyk",
    )
    stored = {"deep": deep} | {name.replace(" ", "-"): files()[name].data for name in kinds}
    for name, data in stored.items():
        place(tmp_path, f"a/{name}.png", data)
    spec = Preprocessing(size=32, bits=12)
    paths = sorted((tmp_path / "a").iterdir())
    images = [
        LabelledImage(path=str(path), label="a", sha256=hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths
    ]
    trained = list(ImageDataset(images, ("a",), spec).pixels)
    with open_camera(f"folder:{tmp_path}") as camera:
        for path, pixels in zip(paths, trained, strict=True):
            frame = camera.capture()
            assert frame is not None and frame.source == str(path)
            assert np.array_equal(frame.pixels(spec), pixels), path.name
    assert np.array_equal(trained[[path.stem for path in paths].index("deep")][..., 0], GREY)
