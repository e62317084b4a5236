"""Sources of labelled images: class folders, CSV tables, the solar-cell demonstration set, or several joined."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from eyas_device.support.image_files import list_image_files
from eyas_host.data.class_folders import ClassFolders, list_class_folders, list_divided
from eyas_host.data.label_rules import check_labels
from eyas_host.recipe.data import DataSection
from eyas_host.support.errors import DataError, MissingExtra

ELPV_NOTICE = (
    "Images: ELPV data set (Buerhop-Lutz et al. 2018; Deitsch et al. 2019, 2021), CC-BY-NC-SA-4.0: "
    "for non-commercial use, with credit, under the same licence. Do not ship them in a product."
)
ELPV_NO_MODULES = (
    "The set has no module ids: cells of one module may be in several splits, so the metrics are optimistic."
)
COLUMNS = ("path", "label", "group", "time")
"""Columns of a table; the last two are optional."""


class LabelledImage(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One labelled image."""

    path: str = ""
    """Where it lies on this machine; empty in a manifest."""
    label: str
    sha256: str
    stratum: str = ""
    """Stratified by besides the label, e.g. the type of the cell."""
    severity: float | None = None
    """Severity of the defect, 0..1, if the source has one."""
    group: str = ""
    """Group whose images must stay in one split: a patient, a batch, a module, a camera."""
    time: float | None = None
    """When it was taken, seconds since 1970 UTC."""
    split: Literal["", "train", "validation", "test"] = ""
    """The split whose folder it lies in, where the data set is divided already; empty in a manifest."""


class Candidates(NamedTuple):
    """What the sources of a data set have."""

    images: list[LabelledImage]
    """Not yet read: sha256 is empty."""
    notices: tuple[str, ...]
    left_out: Mapping[str, int]
    """Reason -> files that were left out."""


def list_images(data: DataSection) -> Candidates:
    """Every image of `data`, and what was left out.

    Raises `DataError` for an unusable source, or one without groups or times where `data.by` needs them;
    `MissingExtra` without the demonstration set.
    """
    images = list(_elpv()) if data.source == "elpv" else []
    left_out: Counter[str] = Counter()
    several = len(data.sources) + bool(images) > 1
    for source in data.sources:
        root = Path(source.path)
        if source.source == "csv":
            images += _table(root, times=data.by == "time")
        elif data.by == "folders":
            for split, listed in list_divided(root).items():
                images += _labelled(listed, split)
                left_out.update(listed.left_out)
        else:
            listed = list_class_folders(root, min_classes=1 if several else 2)
            images += _labelled(listed)
            left_out.update(listed.left_out)
    labels = sorted({image.label for image in images})
    if len(labels) < 2:
        raise DataError(f"{_describe(data)}: two or more classes are needed, found {len(labels)} ({', '.join(labels)})")
    check_labels(labels, _describe(data))
    grouped = data.by == "group" or (data.by == "auto" and any(image.group for image in images))
    for column in ("group",) if grouped else ("time",) if data.by == "time" else ():
        without = [image.path for image in images if getattr(image, column) in ("", None)]
        if without:
            raise DataError(
                f"{len(without)} of {len(images)} images have no {column}, e.g. {without[0]}; fill the column "
                f"`{column}` of their table or set [data] by = 'stratified'"
            )
    notices = (ELPV_NOTICE, ELPV_NO_MODULES) if data.source == "elpv" else ()
    return Candidates(images, notices, dict(left_out))


def source_folders(data: DataSection) -> tuple[str, ...]:
    """Absolute folder of each source on disk: the class folders' or the table's, `path` first."""
    roots = [Path(source.path).resolve() for source in data.sources]
    return tuple(str(root if root.is_dir() else root.parent) for root in roots)


def list_source(path: Path) -> list[LabelledImage]:
    """Images of a folder of class folders, or of a table path,label[,group,time]; not yet read (sha256 is empty).

    Raises `DataError` for a source that cannot be used or has no images.
    """
    if not path.exists():
        raise DataError(f"{path}: no such folder or table; class folders or a CSV table path,label[,group] are needed")
    return list(_table(path, times=False) if path.is_file() else _labelled(list_class_folders(path, min_classes=1)))


def fingerprint(data: DataSection) -> str:
    """Hash of names, sizes and modification times of all files of `data`: a cheap check for changes."""
    if not data.sources:
        return data.source
    digest = hashlib.sha256()
    for source in data.sources:
        root = Path(source.path)
        if source.source == "csv":
            digest.update(root.read_bytes() if root.is_file() else b"")
            files: Iterable[Path] = [root.parent / row["path"] for _, row in _read_table(root)]
        else:
            files = list_image_files(root, on_error=lambda _: None).images if root.is_dir() else ()
        for path in files:
            with contextlib.suppress(OSError):  # missing files are reported when the images are listed
                stat = path.stat()
                digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _labelled(folders: ClassFolders, split: Literal["", "train", "validation", "test"] = "") -> Iterator[LabelledImage]:
    """Images of class folders, labelled by the folder's name; of a link, its own path and not where it leads."""
    for label, files in folders.classes.items():
        for path in files:
            yield LabelledImage(path=os.path.normpath(path.absolute()), label=label, sha256="", split=split)


def _table(path: Path, *, times: bool) -> Iterator[LabelledImage]:
    """Images of a CSV table path,label[,group,time] in UTF-8; paths are relative to the table.

    `times`: whether a time that does not parse is an error. Raises `DataError` with all errors of the table.
    """
    base = path.parent.resolve()
    errors: dict[str, list[int]] = {}
    rows = 0
    for line, row in _read_table(path):
        rows += 1
        file = os.path.normpath(base / row["path"])
        moment = seconds(row["time"]) if row["time"] else None
        for wrong, error in (
            (not row["path"], "no path"),
            (not row["label"], "no label"),
            (bool(row["path"]) and not Path(file).is_file(), f"no such file (paths are relative to {base})"),
            (times and bool(row["time"]) and moment is None, "time is neither ISO 8601 (2026-11-30T14:05) nor seconds"),
        ):
            if wrong:
                errors.setdefault(error, []).append(line)
        yield LabelledImage(path=file, label=row["label"], sha256="", group=row["group"], time=moment)
    if errors:
        listed = "; ".join(f"{len(lines)} x {error}, first in line {lines[0]}" for error, lines in errors.items())
        raise DataError(f"{path}: {listed}; fix the table and run again")
    if not rows:
        raise DataError(f"{path}: the table has no rows below its header; one row per image is needed")


def _read_table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells of each row; missing columns are empty."""
    usage = f"a table with the header {','.join(COLUMNS[:2])}[,{','.join(COLUMNS[2:])}] is needed"
    if path.is_dir():
        raise DataError(f"{path}: is a folder; {usage}, or [data] source = 'folder' for class folders")
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            missing = [name for name in COLUMNS[:2] if name not in header]
            unknown = [name for name in header if name not in COLUMNS]
            if missing or unknown or len(set(header)) < len(header):
                advice = "; separate the columns by commas" if len(header) == 1 and set(header[0]) & set(";\t|") else ""
                raise DataError(f"{path}: the columns are {', '.join(header) or 'none'}; {usage}{advice}")
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}: line {reader.line_num} has {len(cells)} cells where the header has {len(header)}; "
                        'put names that contain commas in quotes: "a, b.png"'
                    )
                row = dict.fromkeys(COLUMNS, "") | dict(zip(header, (cell.strip() for cell in cells), strict=True))
                yield reader.line_num, row
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {usage}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 CSV ({error}); {usage}") from None


def seconds(text: str) -> float | None:
    """Seconds since 1970 UTC of an ISO 8601 time (UTC unless it has a zone) or a number; None for anything else."""
    try:
        value = float(text)
        return value if np.isfinite(value) else None
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text[:-1] + "+00:00" if text[-1:] in "Zz" else text)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _elpv() -> Iterator[LabelledImage]:
    """Solar cells: defective from a defect probability of 0.5; the cell type is the stratum."""
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


def _describe(data: DataSection) -> str:
    return " + ".join([data.source] * (data.source == "elpv") + [source.path for source in data.sources])


def subsample(images: Iterable[LabelledImage], limit: int) -> list[LabelledImage]:
    """At most `limit` images, evenly spaced and the same fraction of each label."""
    candidates = list(images)
    fraction = min(1.0, limit / len(candidates))
    kept = []
    for label in sorted({p.label for p in candidates}):
        own = [p for p in candidates if p.label == label]
        indices = np.linspace(0, len(own) - 1, max(1, round(len(own) * fraction))).astype(int)
        kept += [own[index] for index in indices]
    return kept
