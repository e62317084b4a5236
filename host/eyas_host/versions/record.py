"""The record of a version: what a bundle was made from, with what, and how good it is. It is never changed."""

from __future__ import annotations

import msgspec

from eyas_device.errors import EyasError

SCHEMA = 1


class RegistryError(EyasError, ValueError):
    """There is no such version, it is there already, or what is stored of it is damaged."""


class StoredFile(msgspec.Struct, frozen=True):
    """A file of a version; its content lies below the hash."""

    sha256: str
    size_bytes: int


class DataRevision(msgspec.Struct, frozen=True, kw_only=True):
    """The images that a version was trained and tested on. `split/manifest.json` has the hash of each."""

    data: str
    """sha256 over all images and labels, independent of the split: the revision."""
    split: str
    """sha256 of the split manifest."""
    strategy: str
    """How the images were assigned, as a sentence."""
    counts: dict[str, dict[str, int]]
    """Split -> label -> images."""
    notices: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """How many there are in all splits."""
        return sum(sum(labels.values()) for labels in self.counts.values())


class Tools(msgspec.Struct, frozen=True, kw_only=True):
    """What made it."""

    eyas: str
    """Version of Eyas."""
    code: dict[str, str]
    """Stage -> hash of the code of Eyas that it ran."""
    libraries: dict[str, str]
    """Library -> version; several, separated by blanks, where stages ran with different ones."""
    machines: tuple[dict[str, str], ...] = ()
    seed: int = 0


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of one network or artefact on the held-out test set; null where it cannot be."""

    balanced_accuracy: float
    balanced_accuracy_ci: tuple[float, float]
    f1: float | None = None
    auc: float | None = None
    classwise_ece: float | None = None
    size_bytes: int | None = None


class VersionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One version."""

    schema: int = SCHEMA
    model: str
    version: str
    digest: str
    """sha256 of the bundle's manifest: what devices report, and what the store knows it by."""
    created: str
    added: float
    """Seconds since 1970."""
    added_by: str = ""
    note: str = ""
    parent: str = ""
    """Version of the same model that it follows; empty for a first one."""
    labels: tuple[str, ...]
    recipe: str
    """sha256 of the recipe as it was loaded."""
    data: DataRevision
    tools: Tools
    shipped: str
    """The artefact that the first runtime of the bundle runs."""
    figures: dict[str, Figures]
    """Variant -> figures; empty if the run had no report."""
    verdict: str = ""
    """`ship`, `look` or `do not ship`, by the recipe's `[accept]`; empty if the run had no report."""
    files: dict[str, StoredFile]
    """Path, as in the run's folder -> content."""

    @property
    def name(self) -> str:
        """`MODEL@VERSION`, as commands take it."""
        return f"{self.model}@{self.version}"

    @property
    def size_bytes(self) -> int:
        """All of its files."""
        return sum(file.size_bytes for file in self.files.values())
