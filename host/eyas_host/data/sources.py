"""Sources of labelled images: class folders, CSV tables, tar shards, the solar-cell demonstration set, or several."""

from __future__ import annotations

import contextlib
import hashlib
import os
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from eyas_device.support.image_files import HIDDEN, NO_SUFFIX, SUFFIXES, TOOLS, describe_left_out, is_litter
from eyas_host.data.class_folders import BESIDE, ClassFolders, list_class_folders, list_divided, source_lines
from eyas_host.data.label_rules import check_labels
from eyas_host.data.remote import fetch_all, find_remote
from eyas_host.data.remote_file import RemoteFile
from eyas_host.data.shards import Shards, find_remote_shards, find_shards, list_shards
from eyas_host.data.tables import Table, read_table, table_files
from eyas_host.data.times import Axis
from eyas_host.recipe.data import DataSection
from eyas_host.support.addresses import is_url
from eyas_host.support.errors import DataError, MissingExtra
from eyas_host.support.extras import install_line

ELPV_NOTICE = (
    "Images: ELPV data set (Buerhop-Lutz et al. 2018; Deitsch et al. 2019, 2021), CC-BY-NC-SA-4.0: "
    "for non-commercial use, with credit, under the same licence. Do not ship them in a product."
)
ELPV_NO_MODULES = (
    "The set has no module ids: cells of one module may be in several splits, so the metrics are optimistic."
)


class LabelledImage(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, gc=False):
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
    """The split that its folder or its table names, where the data set is divided already; empty in a manifest."""


class Candidates(NamedTuple):
    """What the sources of a data set have."""

    images: list[LabelledImage]
    """Not yet read: sha256 is empty."""
    notices: tuple[str, ...]
    left_out: Mapping[str, int]
    """Reason -> files that were left out."""
    remarks: tuple[str, ...] = ()
    """How the tables were read, and labels that look like one another."""
    origins: Mapping[tuple[str, str], str] = {}
    """(path, label) of an image -> the table and line that name it."""
    stamps: Mapping[str, tuple[int, int]] = {}
    """Tar shard -> its size and modification time when it was listed."""
    source_of: Mapping[tuple[str, str], int] = {}
    """(path, label) of an image -> number of its last source, where later sources correct labels of earlier ones."""


def list_images(data: DataSection) -> Candidates:
    """Every image of `data`, and what was left out.

    Raises `DataError` for an unusable source, or one without groups or times where `data.by` needs them;
    `MissingExtra` without the demonstration set.
    """
    images = list(_elpv()) if data.source == "elpv" else []
    left_out: Counter[str] = Counter()
    tables: dict[str, Table] = {}
    archives: dict[str, Shards] = {}
    several = len(data.sources) + bool(images) > 1
    starts = []
    for source in data.sources:
        root = Path(source.path)
        starts.append(len(images))
        if source.source == "csv":
            tables[source.path] = read_table(root, times=data.by == "time", splits=data.by == "column")
            if data.by != "column" and any(row.split for row in tables[source.path].rows):
                raise DataError(
                    f"{root}: its column split divides the images already: set [data] by = 'column' to keep that, or "
                    "leave the column out"
                )
            images += _rows(tables[source.path])
        elif source.source == "tar":
            archives[source.path] = list_shards(source.path, times=data.by == "time")
            images += _members(archives[source.path])
            left_out.update(archives[source.path].left_out)
        elif is_url(source.path):
            files, others = find_remote_images(source.path)
            images += (LabelledImage(path=url, label=label, sha256="") for url, label in files)
            left_out.update(others)
        elif data.by == "folders":
            for split, listed in list_divided(root).items():
                images += _labelled(listed, split)
                left_out.update(listed.left_out)
        else:
            listed = list_class_folders(root, min_classes=1 if several else 2)
            images += _labelled(listed)
            left_out.update(listed.left_out)
    if data.by == "column" and not any(image.split == "train" for image in images):
        raise DataError(f"{_describe(data)}: the column split has no training images; name some rows train")
    labels = sorted({image.label for image in images})
    if len(labels) < 2:
        raise DataError(f"{_describe(data)}: two or more classes are needed, found {len(labels)} ({', '.join(labels)})")
    lines: dict[str, str] = {}
    for table in tables.values():
        for row in table.rows:
            lines.setdefault(row.label, f"line {row.line}")
    check_labels(labels, _describe(data), lines)
    if data.by == "time":
        _check_axis({path: table.axis for path, table in tables.items()} | {p: one.axis for p, one in archives.items()})
    grouped = data.by == "group" or (data.by == "auto" and any(image.group for image in images))
    for column in ("group",) if grouped else ("time",) if data.by == "time" else ():
        without = [image.path for image in images if getattr(image, column) in ("", None)]
        if without:
            raise DataError(
                f"{len(without)} of {len(images)} images have no {column}, e.g. {without[0]}; fill the column "
                f"`{column}` of their table (of a shard's sample: in KEY.json), or set [data] by = 'stratified'"
            )
    notices = (ELPV_NOTICE, ELPV_NO_MODULES) if data.source == "elpv" else ()
    remarks = [f"{path}: {remark}" for path, table in tables.items() for remark in table.remarks]
    remarks += [f"{path}: {remark}" for path, shards in archives.items() for remark in shards.remarks]
    groups = sorted({image.group for image in images})
    remarks += [*similar_values("labels", labels), *(similar_values("groups", groups) if grouped else ())]
    origins = {(row.path, row.label): f"{path} line {row.line}" for path, table in tables.items() for row in table.rows}
    stamps = {shard: stamp for source in archives.values() for shard, stamp in source.stamps.items()}
    source_of = {}
    if data.corrections:
        source_of = {(image.path, image.label): bisect_right(starts, row) for row, image in enumerate(images)}
    return Candidates(images, notices, dict(left_out), tuple(remarks), origins, stamps, source_of)


def _check_axis(sources: Mapping[str, Axis]) -> None:
    """Raise `DataError` for sources whose times cannot be compared."""
    axes = {axis: path for path, axis in sources.items() if axis}
    if len(axes) > 1:
        kinds = {
            "instants": "have a zone or count from 1970",
            "local": "have no zone",
            "order": "are small numbers, no dates",
        }
        listed = ", ".join(f"those of {path} {kinds[axis]}" for axis, path in axes.items())
        raise DataError(f"the times of the sources cannot be compared: {listed}; write all in one form")


def similar_values(kind: str, values: Iterable[str]) -> list[str]:
    """Remarks about different values that may be meant as one: the same number, or the same letters in another case."""
    alike: dict[str, list[str]] = {}
    for value in values:
        try:
            alike.setdefault(f"{float(value):g}", []).append(value)
        except ValueError:
            alike.setdefault(value.casefold(), []).append(value)
    return [
        f"the {kind} {', '.join(map(repr, same))} are kept apart; if they mean one, write them in one way"
        for same in alike.values()
        if len(same) > 1
    ]


def source_folders(data: DataSection) -> tuple[str, ...]:
    """Absolute folder of each source on disk: the class folders' or the table's, `path` first."""
    roots = [Path(source.path).resolve() for source in data.sources if not is_url(source.path)]
    return tuple(str(root if root.is_dir() else root.parent) for root in roots)


def list_source(path: Path) -> Candidates:
    """Images of a folder of class folders, a table path,label[,group,time,split] or a tar shard; not yet read.

    Raises `DataError` for a source that cannot be used or has no images.
    """
    if not path.exists():
        raise DataError(f"{path}: no such folder or table; class folders or a CSV table path,label[,group] are needed")
    if path.suffix == ".tar":
        shards = list_shards(str(path))
        return Candidates(list(_members(shards)), (), shards.left_out, shards.remarks, {}, shards.stamps)
    if path.is_file():
        table = read_table(path)
        return Candidates(list(_rows(table)), (), {}, table.remarks)
    listed = list_class_folders(path, min_classes=1)
    return Candidates(list(_labelled(listed)), (), listed.left_out)


def fingerprint(data: DataSection) -> str:
    """Hash of names, sizes and modification times of all files of `data`: a cheap check for changes."""
    if not data.sources:
        return data.source
    digest = hashlib.sha256()
    for source in data.sources:
        root = Path(source.path)
        files: Iterable[Path] = ()
        if is_url(source.path):
            for file in find_remote_shards(source.path) if source.source == "tar" else find_remote(source.path):
                digest.update(f"{file.url} {file.size} {file.version}\n".encode())
        elif source.source == "csv":
            digest.update(root.read_bytes() if root.is_file() else b"")
            files = table_files(root)
        elif source.source == "tar":
            with contextlib.suppress(DataError):
                files = [Path(shard) for shard in find_shards(source.path)]
        else:
            for line in source_lines(root, divided=data.by == "folders"):
                digest.update(os.fsencode(f"{line}\n"))
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


def find_remote_images(url: str) -> tuple[list[tuple[str, str]], Counter[str]]:
    """Address and label of each image below a folder of an object store that holds one folder a class, downloaded.

    And the files that were left out, by reason. Raises `DataError` if there are none, or the store cannot be read.
    """
    taken: list[tuple[RemoteFile, str]] = []
    left_out: Counter[str] = Counter()
    for file in find_remote(url):
        *folders, name = file.url.removeprefix(url.rstrip("/")).strip("/").split("/")
        suffix = Path(name).suffix.lower()
        if any(is_litter(part) for part in (*folders, name)):
            left_out[HIDDEN if name.startswith(".") else TOOLS] += 1
        elif suffix not in SUFFIXES:
            left_out[suffix or NO_SUFFIX] += 1
        elif not folders:
            left_out[BESIDE] += 1
        else:
            taken.append((file, unicodedata.normalize("NFC", folders[0])))
    if not taken:
        raise DataError(f"{url}: no images in class folders there; {describe_left_out(left_out) or 'it is empty'}")
    fetch_all(file for file, _ in taken)
    return [(file.url, label) for file, label in taken], left_out


def _members(shards: Shards) -> Iterator[LabelledImage]:
    """Images of tar shards."""
    for path, label, group, moment in shards.images:
        yield LabelledImage(path=path, label=label, sha256="", group=group, time=moment)


def _rows(table: Table) -> Iterator[LabelledImage]:
    """Images of a table."""
    for _, path, label, group, moment, split in table.rows:
        yield LabelledImage(path=path, label=label, sha256="", group=group, time=moment, split=split or "")


def _elpv() -> Iterator[LabelledImage]:
    """Solar cells: defective from a defect probability of 0.5; the cell type is the stratum."""
    try:
        import elpv_dataset
    except ImportError:
        raise MissingExtra(f"[data] source = 'elpv' needs the demonstration set: {install_line('demo')}") from None
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
    by_label: dict[str, list[LabelledImage]] = {}
    for image in candidates:
        by_label.setdefault(image.label, []).append(image)
    kept = []
    for _, own in sorted(by_label.items()):
        indices = np.linspace(0, len(own) - 1, max(1, round(len(own) * fraction))).astype(int)
        kept += [own[index] for index in indices]
    return kept
