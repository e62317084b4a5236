"""A first look at a folder of labelled images: what a sample of them is like, and what raises doubts."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from msgspec import Struct

from eyas_device.errors import ImageError
from eyas_device.preprocess import Pixels, Preprocessing
from eyas_host.data.class_balance import MAX_RATIO, MIN_IMAGES
from eyas_host.data.duplicates import perceptual_hash
from eyas_host.data.stored_values import StoredImageFile, describe_values, examine, examine_files, used_bits

_PAIRS = 24
"""Pairs of neighbouring files that are read."""
_SECONDS = 4.0
_IN_FULL = Preprocessing(size=1)
"""Images are decoded at their full size."""
_ALIKE_BITS = 16
"""As `[data] near_duplicates`."""
_TRAINING = 0.7
_SMALL, _LARGE = 48, 1500
"""Shorter side below which images are enlarged much, and above which much detail is lost, pixels."""
_MIN_OF_CLASS = 5
_SHOWN = 5
_NO_CLASSES = {"unsorted", "unknown", "misc", "other", "new", "newfolder", "todo", "temp", "tmp", "images", "backup"}


class FirstLook(Struct, frozen=True):
    """A sample of a folder's images."""

    sizes: tuple[tuple[int, int], ...]
    """Width and height of each image that was read, the most frequent first."""
    grey: bool
    """Whether all of them are without colour."""
    unreadable: tuple[str, ...]
    """Images that cannot be read, and why."""
    pairs: int
    """Pairs of neighbouring files that were compared."""
    alike: int
    """How many of them look nearly the same."""
    stored: tuple[str, ...] = ()
    """What they store that is to be known, a line for each kind."""
    bits: int = 0
    """Bits that images of 16 bits per channel use, if those are fewer than 16."""

    @property
    def typical(self) -> tuple[int, int]:
        """The most frequent width and height; (128, 128) if no image was read."""
        return self.sizes[0] if self.sizes else (128, 128)

    def describe_sizes(self) -> str:
        """`28 x 28 pixels, grey`."""
        if not self.sizes:
            return "none of a sample could be read"
        colour = "grey" if self.grey else "colour"
        (width, height), kinds = self.typical, len(set(self.sizes))
        if kinds == 1:
            return f"{width} x {height} pixels, {colour}"
        widths, heights = zip(*self.sizes, strict=True)
        return (
            f"{min(widths)} to {max(widths)} x {min(heights)} to {max(heights)} pixels, mostly {width} x {height}, "
            f"{colour} (a sample of {len(self.sizes)})"
        )


def look_at(classes: Mapping[str, Sequence[Path]]) -> FirstLook:
    """Read pairs of neighbouring files, spread over all classes, for some seconds at most."""
    sizes: list[tuple[int, int]] = []
    unreadable, grey, pairs, alike = [], True, 0, 0
    files: list[StoredImageFile] = []
    until = time.monotonic() + _SECONDS
    for pair in _neighbours([files for files in classes.values() if files]):
        read: list[Pixels] = []
        for path in pair:
            try:
                found = examine(path.read_bytes(), _IN_FULL, where=str(path))
            except ImageError as error:
                unreadable.append(str(error))
                continue
            except OSError as error:
                unreadable.append(f"{path}: cannot be read ({error.strerror})")
                continue
            image = found.pixels
            read.append(image)
            files.append(StoredImageFile(str(path), image.shape[1], image.shape[0], found.values))
            sizes.append((image.shape[1], image.shape[0]))
            grey = grey and bool((image == image[..., :1]).all())
        if len(read) == 2:
            hashes = [np.unpackbits(np.frombuffer(perceptual_hash(image), np.uint8)) for image in read]
            pairs, alike = pairs + 1, alike + int((hashes[0] != hashes[1]).sum() <= _ALIKE_BITS)
        if time.monotonic() > until:
            break
    counts = Counter(sizes)
    ordered = tuple(sorted(sizes, key=lambda size: (-counts[size], size)))
    deep = [file.values.max_value for file in files if file.values.max_value is not None]
    bits = used_bits(max(deep)) % 16 if deep else 0
    if bits:
        files = examine_files((file.path for file in files), bits)
    stored = tuple(describe_values(files, bits))
    return FirstLook(ordered, grey and bool(sizes), tuple(unreadable), pairs, alike, stored, bits)


def _neighbours(classes: Sequence[Sequence[Path]]) -> Iterator[Sequence[Path]]:
    """Pairs of files that follow each other, of one class after the other."""
    rounds = -(-_PAIRS // max(1, len(classes)))
    for number in range(rounds):
        for files in classes:
            at = number * len(files) // rounds
            yield files[at : at + 2]


def doubts(classes: Mapping[str, Sequence[Path]], look: FirstLook, size: int) -> list[str]:
    """What may go wrong with these images at the model's input size, a line each."""
    return [*_few_images(classes), *_imbalance(classes), *_names(list(classes)), *_looks(look, size)]


def _few_images(classes: Mapping[str, Sequence[Path]]) -> Iterator[str]:
    tiny = {label: len(files) for label, files in classes.items() if len(files) < _MIN_OF_CLASS}
    needed = round(MIN_IMAGES / _TRAINING)
    few = {label: len(files) for label, files in classes.items() if len(files) < needed and label not in tiny}
    if tiny:
        yield f"too few images to be split into training, validation and test: {_listed(tiny)}; collect more"
    if few:
        yield f"few images: {_listed(few)}; figures of classes below {needed} are mostly chance"


def _imbalance(classes: Mapping[str, Sequence[Path]]) -> Iterator[str]:
    large, small = max(classes, key=lambda c: len(classes[c])), min(classes, key=lambda c: len(classes[c]))
    if classes[small] and (ratio := len(classes[large]) / len(classes[small])) >= MAX_RATIO:
        yield f"imbalance: {ratio:.0f} images of {large!r} for each of {small!r}; judge by balanced accuracy"


def _names(labels: Sequence[str]) -> Iterator[str]:
    plain: dict[str, str] = {}
    for label in labels:
        form = re.sub(r"[\W_]+", "", label.casefold())
        if form in _NO_CLASSES:
            yield f"is {label!r} a class? If not, move that folder away"
        stem = re.sub(r"(?<=...)e?s$", "", form)
        if plain.setdefault(stem, label) != label:
            yield f"are {plain[stem]!r} and {label!r} the same class? If so, join their folders"


def _looks(look: FirstLook, size: int) -> Iterator[str]:
    width, height = look.typical
    short, ratio = min(width, height), max(width, height) / min(width, height)
    if short < _SMALL:
        yield f"very small images: {width} x {height} pixels, enlarged to {size} x {size}; take larger ones if you can"
    if ratio > 2:
        yield (
            f"long images: {width} x {height} pixels become a strip of {size} x {round(size / ratio)}; if that is too "
            "little, cut them into tiles or raise [image] size"
        )
    elif short > _LARGE:
        yield (
            f"large images: {width} x {height} pixels are reduced to {size} x {size}; if what matters is too small to "
            "be seen there (look at the preview), cut it out or raise [image] size"
        )
    if look.bits:
        yield (
            f"images of 16 bits that use {look.bits} would be seen almost black: the recipe has bits = {look.bits}; 16 "
            "if they are meant to be so dark"
        )
    yield from (f"of a sample, {line}" for line in look.stored)
    if look.unreadable:
        yield f"{len(look.unreadable)} of a sample cannot be read, e.g. {look.unreadable[0]}"
    if look.pairs and look.alike / look.pairs > 0.2:
        yield (
            f"{look.alike} of {look.pairs} neighbouring images look nearly the same (bursts, frames of a video, one "
            "fixed camera?); where several show the same part, give them a group in a table"
        )


def _listed(counts: Mapping[str, int]) -> str:
    shown = ", ".join(f"{label} {count}" for label, count in list(counts.items())[:_SHOWN])
    return shown + (f" and {len(counts) - _SHOWN} more classes" if len(counts) > _SHOWN else "")
