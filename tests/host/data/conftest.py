"""The index of the demonstration's images, read once."""

from __future__ import annotations

import pytest

from eyas_host.data.index import Index, build_index
from eyas_host.recipe.data import DataSection


@pytest.fixture(scope="session")
def solar_cells() -> Index:
    """2,624 images."""
    return build_index(DataSection(source="elpv"))
