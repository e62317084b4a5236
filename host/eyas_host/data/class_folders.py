"""Class folders: a folder with one sub-folder for each label, or one such folder for each split."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from eyas_device.support.image_files import SUFFIXES, Listing, describe_left_out, is_litter, list_image_files
from eyas_device.support.logs import clean
from eyas_host.data.label_rules import check_labels
from eyas_host.data.split_names import SplitName, split_name
from eyas_host.support.errors import DataError

BESIDE = "beside the class folders"
_SHOWN = 5


class ClassFolders(NamedTuple):
    """Images of class folders."""

    classes: Mapping[str, tuple[Path, ...]]
    """Label -> its images, sorted by path."""
    left_out: Mapping[str, int]
    """Reason -> files that were left out."""
    splits: tuple[str, ...] = ()
    """Names of the folders that divide the images into splits already."""
    doubts: tuple[str, ...] = ()
    """What might be meant otherwise, one sentence each."""


def inspect_folder(root: Path) -> ClassFolders:
    """All images of a folder of class folders, divided into splits or not. Raises `DataError` as the two lists do."""
    _check_root(root)
    names = split_folders(root)
    if not names:
        found = list_class_folders(root)
        check_labels(found.classes, root)
        return found._replace(doubts=tuple(_doubts(root, found)))
    classes: dict[str, tuple[Path, ...]] = {}
    left_out: Counter[str] = Counter()
    divided = list_divided(root)
    _check_same_classes(root, divided)
    for listed in divided.values():
        left_out.update(listed.left_out)
        for label, files in listed.classes.items():
            classes[label] = (*classes.get(label, ()), *files)
    check_labels(classes, root)
    return ClassFolders(dict(sorted(classes.items())), dict(left_out), tuple(names))


def list_class_folders(root: Path, *, min_classes: int = 2) -> ClassFolders:
    """List a folder that holds one folder per class; the folder's name, in Unicode's NFC form, is the label.

    Links to files and folders are followed; what systems and tools leave behind is left out.

    Raises `DataError` for a missing folder, fewer than `min_classes` classes, a class without images, a set that is
    divided into training and test already, and labels that look the same.
    """
    _check_root(root)
    divided = split_folders(root)
    if divided:
        raise DataError(
            f"{root}: is divided already: {', '.join(divided)} are splits, not classes; set [data] by = 'folders' to "
            f"keep this division, or point at one of them, e.g. {root / next(iter(divided))}"
        )
    folders = _labels(root, _folder_names(root))
    listing = _listed(root)
    if len(folders) < min_classes:
        raise DataError(_too_few(root, tuple(folders.values()), min_classes, listing))
    images, loose = _by_folder(root, listing.images)
    classes = {label: tuple(images.get(name, ())) for label, name in folders.items()}
    empty = [name for label, name in folders.items() if not classes[label]]
    if empty:
        raise DataError(_without_images(root, empty, [name for name in folders.values() if name not in empty]))
    return ClassFolders(classes, _with(listing.left_out, loose))


def list_divided(root: Path) -> dict[SplitName, ClassFolders]:
    """Split -> its class folders, for a folder that is divided into splits already.

    Raises `DataError` if it is not, if images lie in a folder that is no split or in no class folder, or if none holds
    the training images.
    """
    _check_root(root)
    splits = split_folders(root)
    if not splits:
        raise DataError(
            f"{root}: [data] by = 'folders' needs a folder for each split with class folders in it: train, val or "
            f"validation, test; found {_shown(_folder_names(root)) or 'none'}"
        )
    if "train" not in splits.values():
        raise DataError(f"{root}: no folder of training images (train or training); found {', '.join(splits)}")
    listing = _listed(root)
    images, loose = _by_folder(root, listing.images)
    if others := [name for name in images if name not in splits]:
        raise DataError(
            f"{root}: is divided into {', '.join(splits)}, but images lie in {_shown(others)}, too, which is no split "
            "(train, val or validation, test); move it away or rename it"
        )
    divided: dict[SplitName, ClassFolders] = {}
    for name, split in splits.items():
        if split in divided:
            raise DataError(f"{root}: two folders are the {split} split ({', '.join(splits)}); join or remove one")
        inner, beside = _by_folder(root / name, images.get(name, ()))
        divided[split] = ClassFolders(_split_classes(root / name, inner, beside), {BESIDE: beside} if beside else {})
    _check_depth(root, divided, splits)
    left_out = _with(listing.left_out, loose)
    divided["train"] = divided["train"]._replace(left_out=_with(left_out, divided["train"].left_out.get(BESIDE, 0)))
    return divided


def split_folders(root: Path) -> dict[str, SplitName]:
    """Name of each folder -> its split, if `root` is divided into splits that hold class folders; else empty.

    It is if `train` and another one of its folders are called as splits usually are, or if two are, or `train` alone,
    and one of them holds folders instead of images. A class `train` beside a class `bus` makes no division, nor does
    `valid` beside `invalid`.
    """
    names = _folder_names(root)
    splits = {name: split for name in names if (split := split_name(name))}
    if "train" in splits.values() and len(set(splits.values())) > 1:
        return splits
    alone = len(names) == 1 and list(splits.values()) == ["train"]
    return splits if (len(splits) > 1 or alone) and any(_holds_folders(root / name) for name in splits) else {}


def source_lines(root: Path, *, divided: bool) -> Iterator[str]:
    """Name, size, time and links of every image that is taken from `root`: they change when an image does.

    All image files count where the folder cannot be used as it is.
    """
    try:
        parts = list_divided(root).values() if divided else [list_class_folders(root, min_classes=1)]
        files: Iterable[Path] = [path for part in parts for own in part.classes.values() for path in own]
    except DataError:
        files = list_image_files(root, on_error=lambda _: None).images if root.is_dir() else ()
    known: set[Path] = set(root.parents)
    for path in files:
        way = [path]
        while (parent := way[-1].parent) not in known:
            known.add(parent)
            way.append(parent)
        try:
            yield from (f"{link} -> {link.readlink()}" for link in reversed(way) if link.is_symlink())
            status = path.stat()
        except OSError:  # a missing file is reported when the images are listed
            continue
        yield f"{path} {status.st_size} {status.st_mtime_ns}"


def _check_root(root: Path) -> None:
    try:
        if not stat.S_ISDIR(root.stat().st_mode):
            raise DataError(f"{root}: is a file; a table needs [data] source = 'csv'")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{root}: no such folder; a folder with one folder per class is needed") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{root}: cannot be read ({getattr(error, 'strerror', error)})") from None
    try:
        os.fsencode(root.absolute()).decode()
    except UnicodeDecodeError:
        raise DataError(f"{os.fsencode(root.absolute())!r}: the path is not UTF-8; rename or move the folder") from None


def _labels(root: Path, names: Iterable[str]) -> dict[str, str]:
    """Label -> name of its folder."""
    folders: dict[str, str] = {}
    for name in names:
        label = unicodedata.normalize("NFC", os.fsencode(name).decode(errors="replace"))
        if "\N{REPLACEMENT CHARACTER}" in label:
            raise DataError(f"{root}: the folder {os.fsencode(name)!r} has a name that is not UTF-8; rename it")
        if label in folders:
            raise DataError(
                f"{root}: two folders are called {label!r}, in two forms of Unicode ({folders[label]!a} and "
                f"{name!a}); join them"
            )
        folders[label] = name
    return folders


def _by_folder(root: Path, images: Iterable[Path]) -> tuple[dict[str, list[Path]], int]:
    """Name of each folder in `root` -> the images below it; and the count of those that lie in no folder."""
    folders: dict[str, list[Path]] = {}
    depth, loose = len(root.parts), 0
    for path in images:
        if len(path.parts) == depth + 1:
            loose += 1
        else:
            folders.setdefault(path.parts[depth], []).append(path)
    return folders, loose


def _split_classes(folder: Path, inner: Mapping[str, list[Path]], beside: int) -> dict[str, tuple[Path, ...]]:
    """Label -> images of the class folders of one split."""
    names = _folder_names(folder)
    if beside and not inner:
        raise DataError(
            f"{folder}: {beside:,} image{'s' * (beside > 1)} in no class folder, so that nobody knows the labels; sort "
            "them into class folders, or move the folder away"
        )
    empty = [name for name in names if name not in inner]
    if empty or not inner:
        raise DataError(_without_images(folder, empty, ()))
    return {label: tuple(inner[name]) for label, name in _labels(folder, names).items()}


def _check_depth(root: Path, divided: Mapping[SplitName, ClassFolders], splits: Mapping[str, SplitName]) -> None:
    """Raise `DataError` if every split has a single folder, which holds the class folders."""
    inner = [_folder_names(root / name) for name in splits]
    if all(len(part.classes) == 1 for part in divided.values()) and len(inner[0]) == 1:
        folder = root / next(iter(splits)) / inner[0][0]
        if len(_folder_names(folder)) > 1 and _holds_folders(folder):
            raise DataError(
                f"{root}: the class folders lie one level too deep, e.g. in {folder}; move them up, so that "
                f"{folder.parent} holds them"
            )


def _check_same_classes(root: Path, divided: Mapping[SplitName, ClassFolders]) -> None:
    """Raise `DataError` if a split lacks classes that others have."""
    labels = {label for part in divided.values() for label in part.classes}
    lacking = [
        f"{split} has no {_shown(missing)}"
        for split, part in divided.items()
        if (missing := sorted(labels - set(part.classes)))
    ]
    if lacking:
        raise DataError(
            f"{root}: {'; '.join(lacking)}: every split needs images of every class; add some, or remove the class "
            "from all splits"
        )


def _doubts(root: Path, found: ClassFolders) -> Iterator[str]:
    names = _folder_names(root)
    for name in names:
        if split_name(name) and _holds_folders(root / name):
            yield f"{name} is taken as a class; if it is a split, keep only splits (train, val, test) in {root}"
    inner = [set(_folder_names(root / name)) for name in names]
    if len(inner[0]) > 1 and all(some == inner[0] for some in inner) and not all(n[:1].isdigit() for n in inner[0]):
        yield (
            f"the classes are {_shown(found.classes)}; the folders {_shown(sorted(inner[0]))}, which each of them has, "
            "are no classes"
        )


def _folder_names(root: Path) -> list[str]:
    try:
        return sorted(path.name for path in root.iterdir() if not is_litter(path.name) and path.is_dir())
    except OSError as error:
        raise DataError(f"{root}: cannot be listed ({error.strerror})") from None


def _holds_folders(folder: Path) -> bool:
    """Whether a folder holds folders, and no image beside them."""
    try:
        with os.scandir(folder) as entries:
            found = False
            for entry in entries:
                path = folder / entry.name  # unlike an entry, it takes a link to itself for no file
                if not is_litter(entry.name):
                    if path.suffix.lower() in SUFFIXES and path.is_file():
                        return False
                    found = found or path.is_dir()
            return found
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror})") from None


def _listed(folder: Path) -> Listing:
    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); allow it or move it away") from None

    listing = list_image_files(folder, on_error=fail)
    if listing.misnamed:
        count, first = len(listing.misnamed), os.fsencode(listing.misnamed[0])
        what = f"{count:,} images have names that are" if count > 1 else "1 image has a name that is"
        raise DataError(f"{folder}: {what} not UTF-8, e.g. {first!r}; rename {'them' if count > 1 else 'it'}")
    return listing


def _with(left_out: Mapping[str, int], loose: int) -> dict[str, int]:
    return dict(left_out) | ({BESIDE: left_out.get(BESIDE, 0) + loose} if loose else {})


def _without_images(root: Path, empty: Iterable[str], others: Iterable[str]) -> str:
    """A message about class folders without images; `others` have some."""
    kinds = []
    for name in empty:
        left_out = _listed(root / name).left_out
        kinds.append(f"{name} ({', '.join(f'{count} {reason}' for reason, count in left_out.items()) or 'empty'})")
    text = f"{root}: class without images: {_shown(kinds)}" if kinds else f"{root}: no class folders and no images"
    hint = _deeper(root, others)
    return f"{text}; add images ({', '.join(sorted(SUFFIXES))}) or remove the folder{hint}"


def _too_few(root: Path, names: tuple[str, ...], min_classes: int, listing: Listing) -> str:
    needed = "two or more class folders are" if min_classes > 1 else "a folder for each class is"
    text = f"{root}: {needed} needed, found {len(names)} ({', '.join(names) or 'none'})"
    loose = sum(len(path.parts) == len(root.parts) + 1 for path in listing.images)
    if loose and not names:
        return (
            f"{text}; {loose:,} image{'s lie' if loose > 1 else ' lies'} in no folder: sort them into a folder for "
            "each class, or list them in a table path,label ([data] source = 'csv')"
        )
    left_out = describe_left_out(listing.left_out)
    return text + (f"; {left_out}" if left_out and not listing.images else "") + _deeper(root, names)


def _deeper(root: Path, names: Iterable[str]) -> str:
    """The question whether the folder below the only one of `names` is meant; empty if there is none."""
    names, top = tuple(names), root
    while len(names) == 1 and _holds_folders(root / names[0]):
        root = root / names[0]
        names = tuple(_folder_names(root))
    return f"; did you mean {root}?" if len(names) > 1 and root != top else ""


def _shown(names: Iterable[str]) -> str:
    """The first names, and how many there are more."""
    names = tuple(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(clean, names[:_SHOWN])) + more
