"""Where caches go: below the home, or in a private folder where that cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from eyas_host.support.errors import StageError
from eyas_host.support.files import cache_folder


@pytest.fixture(autouse=True)
def _places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", "/proc/nobody")


def test_a_home_that_can_be_written_holds_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("uv") == tmp_path / "home" / ".cache" / "uv"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache_folder("uv") == tmp_path / "caches" / "uv"


def test_else_a_private_folder_does(tmp_path: Path) -> None:
    for _ in range(2):
        folder = cache_folder("uv")
        assert folder.is_dir() and folder.parent.parent == tmp_path
        assert folder.parent.stat().st_mode & 0o077 == 0


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    private = cache_folder("uv").parent
    private.chmod(0o777)
    with pytest.raises(StageError, match="not a private folder"):
        cache_folder("uv")
    private.rename(tmp_path / "elsewhere")
    private.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StageError, match="not a private folder"):
        cache_folder("uv")
