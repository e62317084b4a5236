"""`eyas labels check`: labels that look wrong, as one self-contained HTML page.

It reads the sources and not the split, so that it also works where the split is refused for these very images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import msgspec
import numpy as np

from eyas_device.bundle import sha256
from eyas_host.data.duplicates import BITS
from eyas_host.data.file_info import UnreadableImage
from eyas_host.data.index import read_images
from eyas_host.data.label_pairs import LabelPair, find_label_pairs
from eyas_host.data.manifest import MANIFEST
from eyas_host.data.sources import LabelledImage, source_folders
from eyas_host.data.split import Split
from eyas_host.evaluation.verdict import validation_logits
from eyas_host.pipeline.runner import RunContext
from eyas_host.recipe.data import DataSection
from eyas_host.report.page import environment, thumbnail
from eyas_host.support.errors import DataError
from eyas_host.support.files import write_bytes

PAGE = Path("labels") / "check.html"
"""Below the run's folder."""
MIN_CONFIDENCE = 0.95
"""Of the teacher, from which a prediction of another label is listed."""
_MAX_SHOWN = 200
"""Pairs and contradictions on the page."""


class Contradiction(msgspec.Struct, frozen=True):
    """A validation image whose label the teacher contradicts; it never trained on it."""

    image: LabelledImage
    predicted: str
    confidence: float


class LabelCheck(msgspec.Struct, frozen=True):
    """What `eyas labels check` found."""

    images: int
    max_bits: int
    pairs: tuple[LabelPair, ...]
    contradictions: tuple[Contradiction, ...] | None
    """None without a teacher's predictions for the present split."""
    unreadable: tuple[UnreadableImage, ...]

    @property
    def suspects(self) -> int:
        """Pairs and contradictions."""
        return len(self.pairs) + len(self.contradictions or ())

    @property
    def summary(self) -> str:
        """One line."""
        same = sum(pair.identical for pair in self.pairs)
        text = f"{self.images} images: {_count(len(self.pairs), 'pair')} of look-alikes with two labels"
        text += f" ({same} identical)" if same else ""
        if self.contradictions is not None:
            text += f", {_count(len(self.contradictions), 'label')} that the teacher contradicts"
        return text + (f"; {len(self.unreadable)} unreadable left out" if self.unreadable else "")


def check_labels(context: RunContext) -> LabelCheck:
    """Look for labels that may be wrong. Raises `DataError` for sources that cannot be used."""
    data = context.recipe.data
    by = data.by if data.divided else "stratified"  # groups and times are of no matter here
    read = read_images(msgspec.structs.replace(data, by=by))
    max_bits = data.near_duplicates or DataSection().near_duplicates
    return LabelCheck(
        images=len(read.images),
        max_bits=max_bits,
        pairs=find_label_pairs(read.images, read.files, max_bits),
        contradictions=_contradictions(context),
        unreadable=tuple(read.unreadable),
    )


def write_label_check(context: RunContext, check: LabelCheck) -> Path:
    """Write the page of the run and return its path."""
    path = context.root / PAGE
    write_bytes(path, render_label_check(context.recipe.run.name, check, source_folders(context.recipe.data)).encode())
    return path


def render_label_check(name: str, check: LabelCheck, folders: Sequence[str] = ()) -> str:
    """The page: no scripts, no links, thumbnails inside; paths relative to the sources' `folders`."""

    def shown(image: LabelledImage) -> dict[str, str | None]:
        return {"path": _relative(image.path, folders), "label": image.label, "thumbnail": thumbnail(image.path)}

    return (
        environment()
        .get_template("labels.html.j2")
        .render(
            name=name,
            summary=check.summary,
            check=check,
            bits=BITS,
            min_confidence=MIN_CONFIDENCE,
            pairs=[(pair, shown(pair.one), shown(pair.two)) for pair in check.pairs[:_MAX_SHOWN]],
            unreadable=[f"{_relative(path, folders)}: {why}" for path, why in check.unreadable],
            contradictions=[(one, shown(one.image)) for one in (check.contradictions or ())[:_MAX_SHOWN]],
        )
    )


def _contradictions(context: RunContext) -> tuple[Contradiction, ...] | None:
    """Validation images that the teacher confidently puts into another class, the most confident first."""
    manifest, record = context.root / MANIFEST, context.record("verify")
    if record is None or not manifest.is_file() or record.inputs.get(MANIFEST.as_posix()) != sha256(manifest):
        return None
    try:
        split = Split.load(context.root)
        logits = validation_logits(context).get("teacher")
    except (DataError, OSError, ValueError, BadZipFile):
        return None
    images = split.manifest.validation
    if logits is None or logits.shape != (len(images), len(split.labels)):
        return None
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponents / exponents.sum(axis=1, keepdims=True)
    found = [
        Contradiction(image, split.labels[int(row.argmax())], float(row.max()))
        for image, row in zip(images, probabilities, strict=True)
        if row.max() >= MIN_CONFIDENCE and split.labels[int(row.argmax())] != image.label
    ]
    return tuple(sorted(found, key=lambda one: (-one.confidence, one.image.path)))


def _relative(path: str, folders: Sequence[str]) -> str:
    inside = [folder for folder in folders if Path(path).is_relative_to(folder)]
    return str(Path(path).relative_to(max(inside, key=len))) if inside else path


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
