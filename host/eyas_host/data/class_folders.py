"""Class folders: a folder with one sub-folder for each label, or one such folder for each split."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from eyas_device.support.image_files import SUFFIXES, Listing, is_litter, list_image_files
from eyas_host.support.errors import DataError

SplitName = Literal["train", "validation", "test"]

SPLIT_NAMES: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "holdout": "test",
    "hold-out": "test",
    "held-out": "test",
    "eval": "test",
    "evaluation": "test",
}
"""Usual names of the folders of a divided data set, in lower case -> split."""
BESIDE = "beside the class folders"


class ClassFolders(NamedTuple):
    """Images of class folders."""

    classes: Mapping[str, tuple[Path, ...]]
    """Label -> its images, sorted by path."""
    left_out: Mapping[str, int]
    """Reason -> files that were left out."""
    splits: tuple[str, ...] = ()
    """Names of the folders that divide the images into splits already."""


def inspect_folder(root: Path) -> ClassFolders:
    """All images of a folder of class folders, divided into splits or not. Raises `DataError` as the two lists do."""
    names = split_folders(root) if root.is_dir() else {}
    if not names:
        return list_class_folders(root)
    classes: dict[str, tuple[Path, ...]] = {}
    left_out: Counter[str] = Counter()
    for listed in list_divided(root).values():
        left_out.update(listed.left_out)
        for label, files in listed.classes.items():
            classes[label] = (*classes.get(label, ()), *files)
    return ClassFolders(dict(sorted(classes.items())), dict(left_out), tuple(names))


def list_class_folders(root: Path, *, min_classes: int = 2) -> ClassFolders:
    """List a folder that holds one folder per class; the folder's name, in Unicode's NFC form, is the label.

    Links to files and folders are followed; what systems and tools leave behind is left out.

    Raises `DataError` for a missing folder, fewer than `min_classes` classes, a class without images, a set that is
    divided into training and test already, and labels that look the same.
    """
    folders, beside = _class_folders(root)
    divided = split_folders(root)
    if divided:
        raise DataError(
            f"{root}: is divided already: {', '.join(divided)} are splits, not classes; set [data] by = 'folders' to "
            f"keep this division, or point [data] path at one of them, e.g. {root / next(iter(divided))}"
        )
    if len(folders) < min_classes:
        raise DataError(_too_few(root, folders, min_classes))
    classes: dict[str, tuple[Path, ...]] = {}
    left_out = Counter(beside)
    empty = []
    for label, folder in folders.items():
        listing = _listed(folder)
        left_out.update(listing.left_out)
        classes[label] = listing.images
        if not listing.images:
            kinds = ", ".join(f"{count} {reason}" for reason, count in listing.left_out.items())
            empty.append(f"{folder.name} ({kinds or 'empty'})")
    if empty:
        raise DataError(
            f"{root}: class without images: {', '.join(empty)}; add images ({', '.join(sorted(SUFFIXES))}) "
            "or remove the folder"
        )
    return ClassFolders(classes, dict(left_out))


def list_divided(root: Path) -> dict[SplitName, ClassFolders]:
    """Split -> its class folders, for a folder that is divided into splits already.

    Raises `DataError` if it is not, if one of its folders is no split, or if none holds the training images.
    """
    if not root.is_dir():
        raise DataError(
            f"{root}: no such folder; [data] by = 'folders' needs train/, and val/ or test/, with class folders"
        )
    names = _folder_names(root)
    splits = split_folders(root)
    if not splits:
        raise DataError(
            f"{root}: [data] by = 'folders' needs a folder for each split with class folders in it: train, val or "
            f"validation, test; found {', '.join(names) or 'none'}"
        )
    divided: dict[SplitName, ClassFolders] = {}
    for name, split in splits.items():
        if split in divided:
            raise DataError(f"{root}: two folders are the {split} split ({', '.join(splits)}); join or remove one")
        divided[split] = list_class_folders(root / name, min_classes=1)
    if "train" not in divided:
        raise DataError(f"{root}: no folder of training images (train or training); found {', '.join(splits)}")
    return divided


def split_folders(root: Path) -> dict[str, SplitName]:
    """Name of each folder -> its split, if `root` is divided into splits that hold class folders; else empty.

    It is if all of its folders, two at least or `train` alone, are called as splits usually are, and hold folders
    instead of images.
    """
    names = _folder_names(root)
    splits = {name: SPLIT_NAMES[name.lower()] for name in names if name.lower() in SPLIT_NAMES}
    if len(splits) < len(names) or (len(names) < 2 and list(splits.values()) != ["train"]):
        return {}
    return splits if all(_folder_names(root / name) for name in names) else {}


def _class_folders(root: Path) -> tuple[dict[str, Path], Counter[str]]:
    """Label -> folder, and files that lie beside the folders."""
    if root.is_file():
        raise DataError(f"{root}: is a file; a table needs [data] source = 'csv'")
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; a folder with one folder per class is needed")
    folders: dict[str, Path] = {}
    for name in _folder_names(root):
        label = unicodedata.normalize("NFC", os.fsencode(name).decode(errors="replace"))
        if "\N{REPLACEMENT CHARACTER}" in label:
            raise DataError(f"{root}: the folder {os.fsencode(name)!r} has a name that is not UTF-8; rename it")
        if label in folders:
            raise DataError(
                f"{root}: two folders are called {label!r}, in two forms of Unicode ({folders[label].name!a} and "
                f"{name!a}); join them"
            )
        folders[label] = root / name
    beside = Counter(
        BESIDE
        for path in root.iterdir()
        if path.suffix.lower() in SUFFIXES and path.is_file() and not is_litter(path.name)
    )
    return folders, beside


def _folder_names(root: Path) -> list[str]:
    try:
        return sorted(path.name for path in root.iterdir() if not is_litter(path.name) and path.is_dir())
    except OSError as error:
        raise DataError(f"{root}: cannot be listed ({error.strerror})") from None


def _listed(folder: Path) -> Listing:
    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); allow it or move it away") from None

    return list_image_files(folder, on_error=fail)


def _too_few(root: Path, folders: Mapping[str, Path], min_classes: int) -> str:
    names = next(iter(folders), "none")
    needed = "two or more class folders are" if min_classes > 1 else "a folder for each class is"
    text = f"{root}: {needed} needed, found {len(folders)} ({names})"
    if len(folders) == 1:
        inner = next(iter(folders.values()))
        if len(_folder_names(inner)) >= 2:
            return f"{text}; did you mean {inner}?"
    return text
