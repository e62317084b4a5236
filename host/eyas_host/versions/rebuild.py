"""A version built again from its recipe and its images: the same split, and figures within a tolerance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from eyas_host.data.manifest import SPLITS, SplitManifest
from eyas_host.pipeline.runner import LINEAGE_RECIPE, LINEAGE_SPLIT, RunContext, run_chain
from eyas_host.recipe import Recipe
from eyas_host.stages.chain import STAGES
from eyas_host.stages.plan import show_plan
from eyas_host.support.errors import RecipeError
from eyas_host.support.files import write_bytes
from eyas_host.versions.collect import read_run
from eyas_host.versions.record import RegistryError, VersionRecord
from eyas_host.versions.registry import Registry


class Rebuilt(msgspec.Struct, frozen=True, kw_only=True):
    """How a version that was built again compares with the recorded one."""

    version: str
    run: str
    """Folder of the new run."""
    same_data: bool
    same_split: bool
    """Whether every image is in the split that it was in."""
    same_weights: bool
    """Whether the networks are the same, bit for bit."""
    figures: dict[str, tuple[float, float]]
    """Variant -> balanced accuracy on test as recorded, and now."""
    tolerance: float
    """How far they may differ."""
    tools: tuple[str, ...] = ()
    """Libraries of another version than recorded."""

    @property
    def ok(self) -> bool:
        """Whether it is the same version by the promise of the registry."""
        near = all(abs(now - before) <= self.tolerance for before, now in self.figures.values())
        return self.same_data and self.same_split and bool(self.figures) and near


def rebuild(
    registry: Registry, record: VersionRecord, runs: Path, *, tolerance: float, now: float, data: str = ""
) -> Rebuilt:
    """Run the recipe of a version in a run of its own, with every image in its recorded split.

    Args:
        registry: Where its files are.
        record: The version.
        runs: Folder of the new run, `rebuilt-MODEL-VERSION`; an interrupted one goes on where it was.
        tolerance: Largest difference of a balanced accuracy.
        now: The time, seconds since 1970.
        data: Where the images lie now; where the recipe says by default.

    Raises:
        RegistryError: its files were removed, or its recipe is not one that this version of Eyas reads.
        EyasError: of the stages.

    """
    text = registry.open_file(record, str(LINEAGE_RECIPE))
    split = registry.open_file(record, str(LINEAGE_SPLIT))
    if text is None or split is None:
        raise RegistryError(f"{record.name}: recipe or split is not among its files")
    root = runs / f"rebuilt-{record.model}-{record.version}"
    write_bytes(kept := root / "kept-split.json", split)
    recipe = _recipe(record, text, kept, data)
    run_chain(STAGES, RunContext(recipe, root), plan=show_plan)
    again = read_run(root, now=now)
    figures = {
        name: (one.balanced_accuracy, again.figures[name].balanced_accuracy)
        for name, one in record.figures.items()
        if name in again.figures
    }
    libraries = {**record.tools.libraries, **again.tools.libraries}
    weights = [
        {name: file.sha256 for name, file in one.files.items() if name.endswith((".pt", ".safetensors"))}
        for one in (record, again)
    ]
    return Rebuilt(
        version=record.name,
        run=str(root),
        same_data=again.data.data == record.data.data,
        same_split=_assignment(root, record, registry),
        same_weights=weights[0] == weights[1],
        figures=figures,
        tolerance=tolerance,
        tools=tuple(
            f"{name} {record.tools.libraries.get(name, 'none')} -> {again.tools.libraries.get(name, 'none')}"
            for name in libraries
            if record.tools.libraries.get(name) != again.tools.libraries.get(name)
        ),
    )


def _recipe(record: VersionRecord, text: bytes, kept: Path, data: str) -> Recipe:
    """Its recipe, which keeps the recorded split."""
    try:
        recipe = msgspec.json.decode(text, type=Recipe)
    except (msgspec.MsgspecError, RecipeError) as error:
        raise RegistryError(f"{record.name}: its recipe is of another version of Eyas ({error})") from None
    changes: dict[str, Any] = {"keep": str(kept.resolve()), "keep_missing": False}
    if data:
        changes["path"] = data
    return msgspec.structs.replace(recipe, data=msgspec.structs.replace(recipe.data, **changes))


def _assignment(root: Path, record: VersionRecord, registry: Registry) -> bool:
    """Whether every image is in the split that was recorded."""
    places = []
    for data in ((root / LINEAGE_SPLIT).read_bytes(), registry.open_file(record, str(LINEAGE_SPLIT)) or b"{}"):
        manifest = msgspec.json.decode(data, type=SplitManifest)
        places.append({(one.sha256, one.label): name for name in SPLITS for one in getattr(manifest, name)})
    return places[0] == places[1]
