"""docs/architecture.md lists the rooms of both packages in the order of the layering contracts."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", ["eyas_device", "eyas_host"])
def test_the_rooms_of_the_page_are_those_of_the_contract(package: str) -> None:
    contracts = msgspec.toml.decode((ROOT / "pyproject.toml").read_bytes())["tool"]["importlinter"]["contracts"]
    (layers,) = [c["layers"] for c in contracts if c["type"] == "layers" and c["containers"] == [package]]
    rooms = [room for layer in layers for room in layer.split(" : ")]
    assert len(rooms) > 10
    (block,) = re.findall(rf"^\w+/{package}/ .*\n((?:  .*\n)+)", PAGE, flags=re.MULTILINE)
    listed = [name.rstrip("/") for line in block.splitlines() for name in re.findall(r"\S+", line[:26])]
    assert _by_layer(listed, layers) == _by_layer(rooms, layers)


def _by_layer(rooms: list[str], layers: list[str]) -> list[tuple[int, str]]:
    """Rooms with the number of their layer, in order; those of one layer sorted."""
    number = {room: n for n, layer in enumerate(layers) for room in layer.split(" : ")}
    placed = [(number.get(room, -1), room) for room in rooms]
    assert [n for n, _ in placed] == sorted(n for n, _ in placed), "not in the order of the contract"
    return sorted(placed)


@pytest.mark.parametrize(
    "page", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"], ids=lambda path: path.name
)
def test_modules_named_in_the_pages_exist(page: Path) -> None:
    names = set(re.findall(r"\beyas_(?:host|device)(?:\.[a-zA-Z]\w*)+", page.read_text(encoding="utf-8")))
    assert [name for name in names if not _exists(name)] == []


def _exists(name: str) -> bool:
    """Whether a dotted name is a module, or a name that its module's source mentions."""
    folder = "device" if name.startswith("eyas_device") else "host"
    *parents, last = name.split(".")
    for parts, member in (([*parents, last], None), (parents, last)):
        base = ROOT / folder / Path(*parts)
        for file in (base / "__init__.py", base.with_suffix(".py")):
            if file.is_file() and (member is None or re.search(rf"\b{member}\b", file.read_text(encoding="utf-8"))):
                return True
    return False
