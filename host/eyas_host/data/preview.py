"""`eyas preview`: a contact sheet of the model's input, from the stored image to the augmented views.

The views come from the augmentation that training uses, so that a cropped defect or a mirrored letter is noticed before
it costs a training run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eyas_device.preprocess import Pixels
from eyas_host.data.image_bytes import file_name
from eyas_host.data.split import Split
from eyas_host.data.stored_values import describe_values, examine_files
from eyas_host.data.transforms import Augmenter, prepared
from eyas_host.pipeline.runner import RunContext
from eyas_host.recipe import Recipe
from eyas_host.support.files import atomic_write
from eyas_host.support.progress import warn

SHEET = Path("preview") / "sheet.png"
"""Below the run's folder."""
_MAX_CLASSES = 12
_GAP, _BREAK, _MARGIN, _NAMES, _LINE = 8, 16, 24, 168, 18
"""Pixels: between cells, between classes, around the sheet, for names on the left, height of a text line."""
_INK, _MUTED, _PAPER, _PLATE = "#1b1f24", "#6a737d", "#ffffff", 0xF0
_DPI = 100


def write_preview(context: RunContext, *, images: int = 3, views: int = 6) -> Path:
    """Write the contact sheet of some training images of each class, and return its path.

    Raises `DataError` if the run has no split or an image changed since.
    """
    recipe = context.recipe
    spec = recipe.image.preprocessing()
    train = Split.load(context.root, spec).train
    rows = [
        row
        for label in range(len(train.labels))
        for row in _evenly_spaced(np.flatnonzero(train.targets == label), images)
    ]
    rows = [row for row in rows if train.targets[row] < _MAX_CLASSES]
    frames = train.pixels.rows(rows)
    augmenter = Augmenter(recipe.augment, spec)
    columns = [prepared(frames, spec), *(augmenter.views(frames, (recipe.run.seed, 8, n)) for n in range(views))]
    side = int(np.clip(spec.size, 112, 176))
    cells, captions = [], []
    for index, (row, frame) in enumerate(zip(rows, frames, strict=True)):
        cells.append([_letterbox(one, side) for one in (frame, *(column[index] for column in columns))])
        size = f"{frame.shape[1]} x {frame.shape[0]}"
        captions.append((train.labels[train.targets[row]], file_name(train.images[row].path), size))
    titles = ["stored", "prepared", *(f"view {number + 1}" for number in range(views))]
    left_out = len(train.labels) - _MAX_CLASSES
    head = [f"{recipe.run.name}: the model's input", *_describe(recipe)]
    if left_out > 0:
        head[0] += f" ({left_out} more classes not shown)"
    path = context.root / SHEET
    with atomic_write(path) as temporary:
        _draw(cells, captions, titles, head, side).savefig(temporary, format="png", dpi=_DPI)
    bits = recipe.image.bits
    for line in describe_values(examine_files((train.images[row].path for row in rows), bits), bits):
        warn(f"of those shown, {line}")
    return path


def _evenly_spaced(rows: npt.NDArray[np.int64], count: int) -> list[int]:
    """At most `count` of `rows`, evenly spaced."""
    return [int(rows[i]) for i in np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))]


def _draw(
    cells: Sequence[Sequence[Pixels]],
    captions: Sequence[tuple[str, str, str]],
    titles: Sequence[str],
    head: Sequence[str],
    side: int,
) -> Figure:
    """The sheet: one row of cells uint8 [side, side, 3] per image, its caption, `titles` above, `head` on top."""
    step = side + _GAP
    first = _MARGIN + 44 + _LINE * (len(head) + 1)
    tops = [first + row * step + _BREAK * (_class_count(captions[: row + 1]) - 1) for row in range(len(captions))]
    width = 2 * _MARGIN + _NAMES + len(titles) * step + _BREAK
    height = tops[-1] + side + _MARGIN
    sheet = np.full((height, width, 3), 255, dtype=np.uint8)
    figure = Figure((width / _DPI, height / _DPI), dpi=_DPI, facecolor=_PAPER)
    FigureCanvasAgg(figure)

    def write(text: str, x: float, y: float, *, size: float = 9, colour: str = _INK, weight: str = "normal") -> None:
        figure.text(x / width, 1 - y / height, text, size=size, color=colour, weight=weight, va="top", parse_math=False)

    write(head[0], _MARGIN, _MARGIN, size=15, weight="bold")
    for number, line in enumerate(head[1:]):
        write(line, _MARGIN, _MARGIN + 32 + _LINE * number, colour=_MUTED)
    for column, title in enumerate(titles):
        write(title, _left(column, step), first - _LINE, colour=_MUTED, size=8.5)
    for row, (label, name, stored) in enumerate(captions):
        top, first_of_class = tops[row], not row or label != captions[row - 1][0]
        for column, pixels in enumerate(cells[row]):
            left = _left(column, step)
            sheet[top : top + side, left : left + side] = pixels
        if first_of_class:
            write(_shorten(label, 18), _MARGIN, top, size=11, weight="bold")
        write(_shorten(name, 24), _MARGIN, top + 22 * first_of_class, size=8, colour=_MUTED)
        write(stored, _MARGIN, top + 22 * first_of_class + 15, size=8, colour=_MUTED)
    figure.figimage(sheet, zorder=-1)
    return figure


def _class_count(captions: Sequence[tuple[str, str, str]]) -> int:
    return len({label for label, _, _ in captions})


def _left(column: int, step: int) -> int:
    """X of a column's left edge, pixels; a wider gap follows the stored and the prepared image."""
    return _MARGIN + _NAMES + column * step + (_BREAK if column > 1 else 0)


def _letterbox(pixels: Pixels, side: int) -> Pixels:
    """The image scaled to fit a grey square, uint8 [side, side, 3] RGB."""
    scale = side / max(pixels.shape[:2])
    width, height = (max(1, round(length * scale)) for length in (pixels.shape[1], pixels.shape[0]))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    small = cv2.resize(pixels, (width, height), interpolation=method)
    plate = np.full((side, side, 3), _PLATE, dtype=np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    plate[top : top + height, left : left + width] = small[..., ::-1]
    return plate


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _describe(recipe: Recipe) -> Iterator[str]:
    """The recipe's preprocessing and augmentation as text, a line each."""
    image, augment = recipe.image, recipe.augment
    centre = "" if image.crop_fraction == 1.0 else f", centre {image.crop_fraction:.0%}"
    yield f"prepared as on the device: {image.size} x {image.size}, {image.fit}, {image.interpolation}{centre}"
    geometry = [
        name.replace("_", " ")
        for name in ("horizontal_flip", "vertical_flip", "quarter_turns")
        if getattr(augment, name)
    ]
    if augment.rotate_degrees:
        geometry.append(f"rotation up to {augment.rotate_degrees:g}°")
    if augment.crop_scale < 1:
        geometry.append(f"crops down to {augment.crop_scale:.0%} of the area")
    light = [f"{name} ±{getattr(augment, name):.0%}" for name in ("brightness", "contrast") if getattr(augment, name)]
    if augment.randaugment:
        light.append(f"{augment.randaugment} RandAugment operations, magnitude {augment.magnitude}")
    mixes = [f"{name} in {getattr(augment, name):.0%}" for name in ("cutmix", "mixup") if getattr(augment, name)]
    yield "augmented: " + (", ".join(geometry + light + mixes) or "nothing")
    if augment.forbid:
        yield "never: " + ", ".join(name.replace("_", " ") for name in augment.forbid)
