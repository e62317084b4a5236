"""The name of the emulated board's image, which says whether it is built already."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.board.machine import HERE, Image

TOOLS = ("bash", "cut", "dirname", "env", "find", "id", "sha256sum", "sort", "xargs")
"""All that is needed to name an image; without the others a recipe of another name ends before it builds anything."""


def test_the_image_lies_where_its_script_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tools").mkdir()
    for tool in TOOLS:
        (tmp_path / "tools" / tool).symlink_to(str(shutil.which(tool)))
    image = Image.of_the_recipe()
    image.folder.mkdir(parents=True)
    image.disk.touch()
    environment = os.environ | {"PATH": str(tmp_path / "tools")}
    named = subprocess.run([HERE / "image.sh"], env=environment, capture_output=True, text=True, check=False)
    assert (named.returncode, named.stdout.strip()) == (0, str(image.folder)), named.stderr
