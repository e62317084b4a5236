"""Where labelled images come from: class folders, CSV tables, the solar-cell demonstration set, or several joined."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import os
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import msgspec
import numpy as np

from eyas_device.camera.folder import SUFFIXES
from eyas_host.recipe.data import DataSection
from eyas_host.support.errors import DataError, MissingExtra

ELPV_NOTICE = (
    "Images: ELPV data set (Buerhop-Lutz et al. 2018; Deitsch et al. 2019, 2021), CC-BY-NC-SA-4.0: "
    "for non-commercial use, with credit, under the same licence. Do not ship them in a product."
)
ELPV_NO_MODULES = (
    "The set has no module ids: cells of one module may lie on both sides of the split, so figures are optimistic."
)
COLUMNS = ("path", "label", "group", "time")
"""Of a table; the last two may be absent."""


class LabelledImage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One labelled image."""

    path: str
    label: str
    sha256: str
    stratum: str = ""
    """What the split keeps balanced besides the label, e.g. the type of the cell."""
    severity: float | None = None
    """How grave a defect is, 0..1, where the source knows."""
    group: str = ""
    """What must not lie on two sides of a split: a patient, a batch, a module, a camera."""
    time: float | None = None
    """When it was taken, seconds since 1970 UTC."""


def list_images(data: DataSection) -> tuple[list[LabelledImage], tuple[str, ...]]:
    """Every image that `data` names, not yet read (sha256 is empty), and the sources' notices.

    Raises `DataError` for a source that cannot be used or has no groups or times where `data.by` needs them;
    `MissingExtra` without the demonstration set.
    """
    images = list(_elpv()) if data.source == "elpv" else []
    several = len(data.sources) + bool(images) > 1
    for source in data.sources:
        if source.source == "csv":
            images += _table(Path(source.path), times=data.by == "time")
        else:
            images += _folder(Path(source.path), fewest=1 if several else 2)
    labels = sorted({image.label for image in images})
    if len(labels) < 2:
        raise DataError(f"{_names(data)}: two or more classes are needed, found {len(labels)} ({', '.join(labels)})")
    grouped = data.by == "group" or (data.by == "auto" and any(image.group for image in images))
    for column in ("group",) if grouped else ("time",) if data.by == "time" else ():
        without = [image.path for image in images if getattr(image, column) in ("", None)]
        if without:
            raise DataError(
                f"{len(without)} of {len(images)} images have no {column}, e.g. {without[0]}; fill the column "
                f"`{column}` of their table or set [data] by = 'stratified'"
            )
    return images, (ELPV_NOTICE, ELPV_NO_MODULES) if data.source == "elpv" else ()


def list_source(path: Path) -> list[LabelledImage]:
    """Images of a folder of class folders, or of a table path,label[,group,time]; not yet read (sha256 is empty).

    Raises `DataError` for a source that cannot be used or has no images.
    """
    if not path.exists():
        raise DataError(f"{path}: no such folder or table; class folders or a CSV table path,label[,group] are needed")
    return list(_table(path, times=False) if path.is_file() else _folder(path, fewest=1))


def fingerprint(data: DataSection) -> str:
    """Names, sizes and times of all files that `data` names: cheap, and enough to notice a change."""
    if not data.sources:
        return data.source
    digest = hashlib.sha256()
    for source in data.sources:
        root = Path(source.path)
        if source.source == "csv":
            digest.update(root.read_bytes() if root.is_file() else b"")
            files = [root.parent / row["path"] for _, row in _rows(root)]
        else:
            files = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
        for path in files:
            with contextlib.suppress(OSError):  # a missing one is told when the images are listed
                stat = path.stat()
                digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def list_class_folders(root: Path, *, fewest: int = 2) -> dict[str, list[Path]]:
    """Label -> its images, for a folder that holds one folder a class.

    Raises `DataError` for a missing folder, fewer than `fewest` classes, or a class without images.
    """
    if root.is_file():
        raise DataError(f"{root}: is a file; class folders are a folder, a table needs [data] source = 'csv'")
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; a folder that holds one folder a class is needed")
    classes = sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    if len(classes) < fewest:
        have = classes[0].name if classes else "none"
        needed = "two or more class folders are" if fewest > 1 else "a folder for each class is"
        raise DataError(f"{root}: {needed} needed, found {len(classes)} ({have})")
    files = {folder.name: _images(folder) for folder in classes}
    empty = [label for label, found in files.items() if not found]
    if empty:
        raise DataError(f"{root}: class without images: {', '.join(empty)}; add images or remove the folder")
    return files


def _folder(root: Path, *, fewest: int) -> Iterator[LabelledImage]:
    """Class folders: the name of the folder is the label."""
    for label, files in list_class_folders(root, fewest=fewest).items():
        for path in files:
            yield LabelledImage(path=str(path.resolve()), label=label, sha256="")


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def _table(path: Path, *, times: bool) -> Iterator[LabelledImage]:
    """A CSV table path,label[,group,time]: paths relative to the table, UTF-8 with or without a byte order mark.

    `times`: whether a time that does not parse is a fault. Raises `DataError` with all faults of the table.
    """
    base = path.parent.resolve()
    faults: dict[str, list[int]] = {}
    rows = 0
    for line, row in _rows(path):
        rows += 1
        place = os.path.normpath(base / row["path"])
        moment = seconds(row["time"]) if row["time"] else None
        for wrong, what in (
            (not row["path"], "no path"),
            (not row["label"], "no label"),
            (bool(row["path"]) and not Path(place).is_file(), f"no such file (paths are relative to {base})"),
            (times and bool(row["time"]) and moment is None, "time is neither ISO 8601 (2026-11-30T14:05) nor seconds"),
        ):
            if wrong:
                faults.setdefault(what, []).append(line)
        yield LabelledImage(path=place, label=row["label"], sha256="", group=row["group"], time=moment)
    if faults:
        told = "; ".join(f"{len(lines)} x {what}, first in line {lines[0]}" for what, lines in faults.items())
        raise DataError(f"{path}: {told}; fix the table and run again")
    if not rows:
        raise DataError(f"{path}: the table has no rows below its header; one row an image is needed")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells of each row; absent columns are empty."""
    form = f"a table with the header {','.join(COLUMNS[:2])}[,{','.join(COLUMNS[2:])}] is needed"
    if path.is_dir():
        raise DataError(f"{path}: is a folder; {form}, or [data] source = 'folder' for class folders")
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            absent = [name for name in COLUMNS[:2] if name not in header]
            unknown = [name for name in header if name not in COLUMNS]
            if absent or unknown or len(set(header)) < len(header):
                hint = "; separate the columns by commas" if len(header) == 1 and set(header[0]) & set(";\t|") else ""
                raise DataError(f"{path}: the columns are {', '.join(header) or 'none'}; {form}{hint}")
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}: line {reader.line_num} has {len(cells)} cells where the header has {len(header)}; "
                        'put names with commas into quotes: "a, b.png"'
                    )
                row = dict.fromkeys(COLUMNS, "") | dict(zip(header, (cell.strip() for cell in cells), strict=True))
                yield reader.line_num, row
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {form}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 CSV ({error}); {form}") from None


def seconds(text: str) -> float | None:
    """Seconds since 1970 UTC of an ISO 8601 time (UTC where it names no zone) or of seconds; None for anything else."""
    try:
        value = float(text)
        return value if np.isfinite(value) else None
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text[:-1] + "+00:00" if text[-1:] in "Zz" else text)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def _elpv() -> Iterator[LabelledImage]:
    """Solar cells: defective from a defect probability of one half up; the type of the cell is the stratum."""
    try:
        import elpv_dataset
    except ImportError:
        raise MissingExtra("[data] source = 'elpv' needs the demonstration set: pip install 'eyas[demo]'") from None
    root = Path(elpv_dataset.__file__).parent / "data"
    table = np.genfromtxt(root / "labels.csv", dtype=None, names=["path", "probability", "type"], encoding="utf-8")
    for path, probability, kind in table:
        label = "defective" if probability >= 0.5 else "ok"
        yield LabelledImage(
            path=str(root / path), label=label, sha256="", stratum=str(kind), severity=round(float(probability), 4)
        )


def _names(data: DataSection) -> str:
    return " + ".join([data.source] * (data.source == "elpv") + [source.path for source in data.sources])


def thin(images: Iterable[LabelledImage], limit: int) -> list[LabelledImage]:
    """At most `limit` images: evenly spaced ones of each label, the same share of each."""
    everything = list(images)
    share = min(1.0, limit / len(everything))
    kept = []
    for label in sorted({p.label for p in everything}):
        own = [p for p in everything if p.label == label]
        places = np.linspace(0, len(own) - 1, max(1, round(len(own) * share))).astype(int)
        kept += [own[place] for place in places]
    return kept
