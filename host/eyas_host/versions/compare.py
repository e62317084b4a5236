"""What differs between two versions: recipe, images, tools, figures."""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeVar

import msgspec

from eyas_host.data.manifest import SPLITS, SplitManifest
from eyas_host.pipeline.runner import LINEAGE_RECIPE, LINEAGE_SPLIT
from eyas_host.versions.record import RegistryError, VersionRecord
from eyas_host.versions.registry import Registry

_Kind = TypeVar("_Kind")
_SHOWN_FIGURES = ("balanced_accuracy", "f1", "auc", "classwise_ece")


class ImageChanges(msgspec.Struct, frozen=True, kw_only=True):
    """How the second version's images differ from the first one's."""

    same: int
    """Images with the same label in the same split."""
    new: dict[str, int]
    """Split -> images that the first did not have."""
    gone: dict[str, int]
    """Split -> images that the second does not have any more."""
    moved: dict[str, int]
    """`train to test` -> images in another split than before."""
    relabelled: int

    @property
    def leaked(self) -> int:
        """Images that the first version was tested on, and the second one trained on: their figures are no match."""
        return sum(count for move, count in self.moved.items() if move in ("test to train", "test to validation"))


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Two versions side by side."""

    first: str
    second: str
    images: ImageChanges
    recipe: dict[str, tuple[str, str]]
    """`section.key` -> value of the first, of the second."""
    tools: dict[str, tuple[str, str]]
    """Eyas, libraries, and stages whose code is another."""
    figures: dict[str, dict[str, tuple[float, float]]]
    """Variant that both have -> figure -> value of the first, of the second; on the test set of each."""
    same_test: bool
    """Whether both were tested on the same images with the same labels."""


def compare(registry: Registry, first: VersionRecord, second: VersionRecord) -> Comparison:
    """What differs. Raises `RegistryError` if the files of one were removed."""
    before, after = (_split(registry, record) for record in (first, second))
    figures = {
        name: {
            figure: (getattr(first.figures[name], figure), getattr(second.figures[name], figure))
            for figure in _SHOWN_FIGURES
            if None not in (getattr(first.figures[name], figure), getattr(second.figures[name], figure))
        }
        for name in first.figures
        if name in second.figures
    }
    return Comparison(
        first=first.name,
        second=second.name,
        images=_image_changes(before, after),
        recipe=_changes(_settings(recipe_of(registry, first)), _settings(recipe_of(registry, second))),
        tools=_changes(
            {"eyas": first.tools.eyas, **first.tools.libraries, **_code(first)},
            {"eyas": second.tools.eyas, **second.tools.libraries, **_code(second)},
        ),
        figures=figures,
        same_test={(one.sha256, one.label) for one in before.test} == {(one.sha256, one.label) for one in after.test},
    )


def _image_changes(before: SplitManifest, after: SplitManifest) -> ImageChanges:
    places = [
        {image.sha256: (name, image.label) for name in SPLITS for image in getattr(manifest, name)}
        for manifest in (before, after)
    ]
    first, second = places
    both = [(first[digest], second[digest]) for digest in first.keys() & second.keys()]
    return ImageChanges(
        same=sum(old == new for old, new in both),
        new=dict(Counter(split for digest, (split, _) in second.items() if digest not in first)),
        gone=dict(Counter(split for digest, (split, _) in first.items() if digest not in second)),
        moved=dict(Counter(f"{old[0]} to {new[0]}" for old, new in both if old[0] != new[0])),
        relabelled=sum(old[1] != new[1] for old, new in both),
    )


def _split(registry: Registry, record: VersionRecord) -> SplitManifest:
    return _decoded(registry, record, str(LINEAGE_SPLIT), SplitManifest)


def recipe_of(registry: Registry, record: VersionRecord) -> dict[str, Any]:
    """The recipe that a version was packed with. Raises `RegistryError` if it has none."""
    return _decoded(registry, record, str(LINEAGE_RECIPE), dict[str, Any])


def _decoded(registry: Registry, record: VersionRecord, name: str, kind: type[_Kind]) -> _Kind:
    data = registry.open_file(record, name)
    if data is None:
        raise RegistryError(f"{record.name}: it has no {name}")
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise RegistryError(f"{record.name}: {name} cannot be read ({error})") from None


def _settings(recipe: dict[str, Any]) -> dict[str, str]:
    """`section.key` -> value as text."""
    return {
        f"{section}.{key}": msgspec.json.encode(value).decode()
        for section, values in recipe.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }


def _code(record: VersionRecord) -> dict[str, str]:
    return {f"code of {stage}": digest[:12] for stage, digest in record.tools.code.items()}


def _changes(before: dict[str, str], after: dict[str, str]) -> dict[str, tuple[str, str]]:
    return {
        name: (before.get(name, ""), after.get(name, ""))
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    }
