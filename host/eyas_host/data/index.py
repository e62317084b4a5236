"""The index: every labelled picture with its hash, from class folders or the solar-cell demonstration set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from eyas_device.bundle import sha256
from eyas_device.camera.folder import SUFFIXES
from eyas_device.errors import PictureError
from eyas_device.preprocess import read_picture
from eyas_host.errors import DataError, MissingExtra
from eyas_host.progress import track
from eyas_host.recipe import DataSection

ELPV_NOTICE = (
    "Pictures: ELPV data set (Buerhop-Lutz et al. 2018; Deitsch et al. 2019, 2021), CC-BY-NC-SA-4.0: "
    "for non-commercial use, with credit, under the same licence. Do not ship them in a product."
)
ELPV_NO_MODULES = (
    "The set has no module ids: cells of one module may lie on both sides of the split, so figures are optimistic."
)


class Picture(msgspec.Struct, frozen=True):
    """One labelled picture."""

    path: str
    label: str
    sha256: str
    stratum: str = ""
    """What the split keeps balanced besides the label, e.g. the type of the cell."""
    severity: float | None = None
    """How grave a defect is, 0..1, where the source knows."""


class Index(msgspec.Struct, frozen=True):
    """All pictures of a source, and what was left out."""

    pictures: tuple[Picture, ...]
    labels: tuple[str, ...]
    unreadable: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    def counts(self) -> Counter[str]:
        """Pictures a label."""
        return Counter(p.label for p in self.pictures)


def build_index(data: DataSection) -> Index:
    """List, hash and test-read every picture that `data` names.

    Raises `DataError` for a missing folder, fewer than two classes, an empty class, the same picture under two labels,
    or pictures that cannot be read (unless `skip_unreadable`); `MissingExtra` without the demonstration set.
    """
    found, notices = (
        (_elpv(), (ELPV_NOTICE, ELPV_NO_MODULES)) if data.source == "elpv" else (_folder(Path(data.path)), ())
    )
    candidates = list(found)
    if data.limit:
        candidates = _thin(candidates, data.limit)
    pictures, unreadable = [], []
    for picture in track(candidates, "reading pictures"):
        try:
            read_picture(Path(picture.path))
        except PictureError as error:
            unreadable.append(str(error))
            continue
        pictures.append(msgspec.structs.replace(picture, sha256=sha256(Path(picture.path))))
    if unreadable and not data.skip_unreadable:
        shown = "\n".join(f"  {line}" for line in unreadable[:10])
        more = f"\n  and {len(unreadable) - 10} more" if len(unreadable) > 10 else ""
        raise DataError(
            f"{len(unreadable)} unreadable picture{'s' * (len(unreadable) > 1)}; mend or remove them, or set "
            f"[data] skip_unreadable = true\n{shown}{more}"
        )
    index = Index(
        pictures=tuple(_unique(pictures)),
        labels=tuple(sorted({p.label for p in candidates})),
        unreadable=tuple(unreadable),
        notices=notices,
    )
    for label in index.labels:
        if not index.counts()[label]:
            raise DataError(f"class {label!r} has no readable picture; add some or remove its folder")
    return index


def list_class_folders(root: Path) -> dict[str, list[Path]]:
    """Label -> its pictures, for a folder that holds one folder a class.

    Raises `DataError` for a missing folder, fewer than two classes, or a class without pictures.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; a folder that holds one folder a class is needed")
    classes = sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    if len(classes) < 2:
        have = classes[0].name if classes else "none"
        raise DataError(f"{root}: two or more class folders are needed, found {len(classes)} ({have})")
    files = {folder.name: _pictures(folder) for folder in classes}
    empty = [label for label, found in files.items() if not found]
    if empty:
        raise DataError(f"{root}: class without pictures: {', '.join(empty)}; add pictures or remove the folder")
    return files


def _folder(root: Path) -> Iterator[Picture]:
    """Class folders: the name of the folder is the label."""
    for label, files in list_class_folders(root).items():
        for path in files:
            yield Picture(path=str(path.resolve()), label=label, sha256="")


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def _elpv() -> Iterator[Picture]:
    """Solar cells: defective from a defect probability of one half up; the type of the cell is the stratum."""
    try:
        import elpv_dataset
    except ImportError:
        raise MissingExtra("[data] source = 'elpv' needs the demonstration set: pip install 'eyas[demo]'") from None
    root = Path(elpv_dataset.__file__).parent / "data"
    table = np.genfromtxt(root / "labels.csv", dtype=None, names=["path", "probability", "type"], encoding="utf-8")
    for path, probability, kind in table:
        label = "defective" if probability >= 0.5 else "ok"
        yield Picture(
            path=str(root / path), label=label, sha256="", stratum=str(kind), severity=round(float(probability), 4)
        )


def _thin(pictures: list[Picture], limit: int) -> list[Picture]:
    """At most `limit` pictures: evenly spaced ones of each label, the same share of each."""
    share = min(1.0, limit / len(pictures))
    kept = []
    for label in sorted({p.label for p in pictures}):
        own = [p for p in pictures if p.label == label]
        places = np.linspace(0, len(own) - 1, max(1, round(len(own) * share))).astype(int)
        kept += [own[place] for place in places]
    return kept


def _unique(pictures: list[Picture]) -> Iterator[Picture]:
    """Drop exact copies; the same bytes under two labels are a mistake in the labels."""
    seen: dict[str, Picture] = {}
    for picture in pictures:
        first = seen.setdefault(picture.sha256, picture)
        if first is picture:
            yield picture
        elif first.label != picture.label:
            raise DataError(
                f"the same picture has two labels: {first.path} ({first.label}) and {picture.path} ({picture.label}); "
                "remove the wrong one"
            )
