"""The split: which pictures train, which validate, and which stay sealed until the end.

The manifest names every picture by its sha256. Training and validation are open to all stages; `Split.open_test` is the
one way to the sealed part, and every opening is written into a ledger that outlives the split.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from eyas_device.bundle import sha256
from eyas_device.preprocess import Pixels, Preprocessing, read_picture
from eyas_host.data.index import Index, Picture
from eyas_host.errors import DataError
from eyas_host.files import write_bytes

PARTS = ("train", "validation", "test")
MANIFEST = Path("split") / "manifest.json"
"""Below the run's folder."""
LEDGER = Path("sealed") / "ledger.jsonl"
"""Below the run's folder."""


class SplitManifest(msgspec.Struct, frozen=True):
    """`split/manifest.json`."""

    strategy: str
    seed: int
    parts: tuple[float, float, float]
    labels: tuple[str, ...]
    train: tuple[Picture, ...]
    validation: tuple[Picture, ...]
    test: tuple[Picture, ...]
    counts: dict[str, dict[str, int]]
    unreadable: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()


class Opening(msgspec.Struct, frozen=True):
    """A line of the ledger: who opened the sealed test part, when and why."""

    time: float
    reason: str


class Part:
    """The pictures of one part, in a fixed order.

    `pixels` are decoded once, on first use, as the device would for the model of `spec`, and stay in memory (uint8,
    each in its own size).
    """

    def __init__(self, pictures: Sequence[Picture], labels: Sequence[str], spec: Preprocessing | None = None) -> None:
        self.spec = spec
        self.pictures = tuple(pictures)
        self.labels = tuple(labels)
        place = {label: number for number, label in enumerate(labels)}
        self.targets = np.array([place[p.label] for p in pictures], dtype=np.int64)
        self._pixels: list[Pixels] | None = None

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def pixels(self) -> list[Pixels]:
        """Decoded pictures. Raises `DataError` if a file changed since the split was made."""
        if self._pixels is None:
            self._pixels = [self._read(picture) for picture in self.pictures]
        return self._pixels

    def forget(self) -> None:
        """Let go of the decoded pictures; they are read again when needed."""
        self._pixels = None

    def _read(self, picture: Picture) -> Pixels:
        path = Path(picture.path)
        if not path.is_file() or sha256(path) != picture.sha256:
            raise DataError(f"{path}: missing or changed since the split was made; run again with --from split")
        return read_picture(path, self.spec)


class Split:
    """An opened split."""

    def __init__(self, manifest: SplitManifest, ledger: Path, spec: Preprocessing | None = None) -> None:
        self.manifest = manifest
        self.ledger = ledger
        self.labels = manifest.labels
        self.spec = spec
        self.train = Part(manifest.train, manifest.labels, spec)
        self.validation = Part(manifest.validation, manifest.labels, spec)

    @classmethod
    def load(cls, root: Path, spec: Preprocessing | None = None) -> Split:
        """Read the split of the run at `root`, its pictures to be decoded for the model of `spec`.

        Raises `DataError` if it is missing or malformed.
        """
        path = root / MANIFEST
        try:
            return cls(msgspec.json.decode(path.read_bytes(), type=SplitManifest), root / LEDGER, spec)
        except (OSError, msgspec.DecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}); run again with --from split") from None

    def open_test(self, reason: str) -> Part:
        """Open the sealed test part and write the opening into the ledger."""
        self.ledger.parent.mkdir(parents=True, exist_ok=True)
        with self.ledger.open("ab") as ledger:
            ledger.write(msgspec.json.encode(Opening(time=time.time(), reason=reason)) + b"\n")
        return Part(self.manifest.test, self.labels, self.spec)

    def openings(self) -> list[Opening]:
        """The ledger so far."""
        lines = self.ledger.read_bytes().splitlines() if self.ledger.exists() else []
        return [msgspec.json.decode(line, type=Opening) for line in lines]


def split_index(
    index: Index, parts: tuple[float, float, float], seed: int, fold: tuple[int, int] = (0, 0)
) -> SplitManifest:
    """Divide the pictures, stratified by label x stratum.

    Within a stratum the order is a seeded permutation and the cut follows largest remainders, so that every part gets
    its share to within one picture a stratum. With `fold` = (k, n) the test part is every n-th picture of that order,
    from the k-th on: the n folds are disjoint and cover everything; the rest is divided as training is to validation.
    Raises `DataError` if a part would lack a class.
    """
    rng = np.random.default_rng(seed)
    chosen: dict[str, list[Picture]] = {part: [] for part in PARTS}
    strata: dict[tuple[str, str], list[Picture]] = {}
    for picture in sorted(index.pictures, key=lambda p: p.sha256):  # not by path: the same data anywhere splits alike
        strata.setdefault((picture.label, picture.stratum), []).append(picture)
    for key in sorted(strata):
        members = strata[key]
        order = [members[i] for i in rng.permutation(len(members))]
        if fold[1]:
            chosen["test"] += order[fold[0] :: fold[1]]
            order = [picture for place, picture in enumerate(order) if place % fold[1] != fold[0]]
            sizes = _shares(len(order), (parts[0] / (parts[0] + parts[1]), parts[1] / (parts[0] + parts[1]), 0.0))
        else:
            sizes = _shares(len(order), parts)
        start = 0
        for part, size in zip(PARTS, sizes, strict=True):
            chosen[part] += order[start : start + size]
            start += size
    counts = {part: dict(sorted(Counter(p.label for p in chosen[part]).items())) for part in PARTS}
    for part in PARTS:
        missing = [label for label in index.labels if not counts[part].get(label)]
        if missing:
            raise DataError(
                f"too few pictures: the {part} part would have none of {', '.join(missing)} "
                f"(pictures a class: {dict(index.counts())}); add pictures or change [data] split"
            )
    return SplitManifest(
        strategy="stratified by label x stratum" + (f", fold {fold[0]} of {fold[1]}" if fold[1] else ""),
        seed=seed,
        parts=parts,
        labels=index.labels,
        train=tuple(chosen["train"]),
        validation=tuple(chosen["validation"]),
        test=tuple(chosen["test"]),
        counts=counts,
        unreadable=index.unreadable,
        notices=index.notices,
    )


def _shares(total: int, parts: tuple[float, float, float]) -> list[int]:
    """Whole numbers that add up to `total`, nearest to the parts (largest remainders first)."""
    exact = [total * part for part in parts]
    sizes = [int(value) for value in exact]
    for place in sorted(range(3), key=lambda i: exact[i] - sizes[i], reverse=True)[: total - sum(sizes)]:
        sizes[place] += 1
    return sizes


def save_split(manifest: SplitManifest, root: Path) -> Path:
    """Write the manifest of the run at `root`."""
    path = root / MANIFEST
    write_bytes(path, msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    return path


def data_hash(manifest: SplitManifest) -> str:
    """One sha256 over all pictures and labels, whatever the split."""
    digest = hashlib.sha256()
    everything = manifest.train + manifest.validation + manifest.test
    for line in sorted(f"{p.sha256} {p.label}\n" for p in everything):
        digest.update(line.encode())
    return digest.hexdigest()
