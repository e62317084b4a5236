"""The recipe of the next version: that of its parent, with more images, the parent's weights, and a few epochs.

Every image that the parent knew stays in its split, so that both are tested on the same images; only new ones are
assigned. The old images are trained on again beside the new ones (replay): a network that sees only what is new
forgets what is old.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from eyas_host.pipeline.runner import LINEAGE_RECIPE, LINEAGE_SPLIT
from eyas_host.recipe import Recipe
from eyas_host.recipe.checks import combination_errors
from eyas_host.recipe.data import Source
from eyas_host.support.errors import RecipeError
from eyas_host.support.files import write_bytes
from eyas_host.versions.record import RegistryError, VersionRecord
from eyas_host.versions.registry import Registry

PARENT = "parent"
"""Folder of the parent's files, below the run's."""
_TEACHER, _STUDENT = "teach/teacher.pt", "distill/student.pt"


def derive(
    registry: Registry, parent: VersionRecord, root: Path, sources: Sequence[Source], *, version: str, epochs: int
) -> Recipe:
    """The recipe of the next version; the parent's weights and split are written below `root`.

    Args:
        registry: Where the parent's files are.
        parent: The version to go on from.
        root: The run's folder.
        sources: New labelled images, beside those of the parent.
        version: The next version.
        epochs: Of the teacher's and of the student's training, at most.

    Raises:
        RegistryError: the parent's files were removed, or its recipe is of another version of Eyas.

    """
    content = {
        name: registry.open_file(parent, name) for name in (str(LINEAGE_RECIPE), str(LINEAGE_SPLIT), _TEACHER, _STUDENT)
    }
    text, split = content.pop(str(LINEAGE_RECIPE)), content[str(LINEAGE_SPLIT)]
    if text is None or split is None:
        raise RegistryError(f"{parent.name}: recipe or split is not among its files")
    places = {}
    for name, data in content.items():
        if data is not None:
            places[name] = root / PARENT / Path(name).name
            write_bytes(places[name], data)
    try:
        recipe = msgspec.json.decode(text, type=Recipe)
    except (msgspec.MsgspecError, RecipeError) as error:
        raise RegistryError(f"{parent.name}: its recipe is of another version of Eyas ({error})") from None
    replace = msgspec.structs.replace
    changed = replace(
        recipe,
        data=replace(
            recipe.data,
            keep=str(places[str(LINEAGE_SPLIT)].resolve()),
            more=(*recipe.data.more, *(one for one in sources if one not in recipe.data.more)),
            corrections=True,
        ),
        pack=replace(recipe.pack, version=version),
        teacher=replace(recipe.teacher, **_from_parent(recipe.teacher, places.get(_TEACHER), epochs)),
        student=replace(recipe.student, **_from_parent(recipe.student, places.get(_STUDENT), epochs)),
    )
    if errors := list(combination_errors(changed)):
        raise RegistryError(f"{parent.name}: its recipe cannot be gone on with: {'; '.join(errors)}")
    return changed


def fit_heads(root: Path, before: Sequence[str], labels: Sequence[str]) -> None:
    """Let the parent's networks know the labels of the next version, in their order.

    A class that the parent knew keeps its part of the last layer; a new one begins as the mean of the others.
    """
    import torch
    from torch import Tensor

    for path in (root / PARENT / Path(name).name for name in (_TEACHER, _STUDENT)):
        if not path.exists():
            continue
        state: dict[str, Tensor] = torch.load(path, weights_only=True)
        head = _head(state, len(before))
        if not head:
            raise RegistryError(f"{path}: no last layer of {len(before)} classes was found; the labels changed")
        for key in head:
            rows = state[key]
            known = [rows[before.index(label)] if label in before else rows.mean(dim=0) for label in labels]
            state[key] = torch.stack(known)
        torch.save(state, part := path.with_suffix(".part"))
        part.replace(path)


def _head(state: Mapping[str, Any], classes: int) -> list[str]:
    """Names of the tensors of the last layer: a matrix with a row for each class, and its bias."""
    matrices = [key for key, value in state.items() if value.ndim == 2 and value.shape[0] == classes]
    biases = [key.removesuffix("weight") + "bias" for key in matrices]
    return [*matrices, *(bias for bias in biases if bias in state)]


def _from_parent(section: Any, weights: Path | None, epochs: int) -> dict[str, Any]:
    """The settings of a training that goes on from the parent's weights; from its own without any."""
    changes: dict[str, Any] = {"epochs": min(section.epochs, epochs)}
    if weights is not None and not getattr(section, "checkpoint", ""):
        changes |= {"weights": "file", "weights_file": str(weights.resolve())}
    if hasattr(section, "head_epochs"):
        changes["head_epochs"] = min(section.head_epochs, epochs)
    return changes
