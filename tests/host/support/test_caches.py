"""Libraries cache below the user's cache folder, or in a private folder where there is none."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from eyas_host.support.caches import has_home, place_caches

VARIABLES = ("XDG_CACHE_HOME", "MPLCONFIGDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def placed() -> dict[str, str]:
    place_caches()
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def test_a_usual_home_gets_one_folder_and_nothing_is_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    assert placed() == {"MPLCONFIGDIR": str(home / ".cache/eyas/matplotlib")}
    assert not list(home.iterdir())


def test_what_the_user_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setenv("MPLCONFIGDIR", "/mine")
    assert placed() == {"XDG_CACHE_HOME": str(tmp_path / "caches"), "MPLCONFIGDIR": "/mine"}


def test_without_a_home_all_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/dev/null")
    found = placed()
    assert set(found) == set(VARIABLES)
    (private,) = (tmp_path / "tmp").iterdir()
    assert all(Path(path).is_relative_to(private) for path in found.values())
    assert private.stat().st_mode & 0o077 == 0


def test_without_any_home_there_is_a_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NNCF asks for the home when it is imported."""
    real = Path.expanduser

    def as_for_an_unknown_user(self: Path) -> Path:
        if "HOME" not in os.environ:
            raise RuntimeError("Could not determine home directory.")
        return real(self)

    monkeypatch.setattr(Path, "expanduser", as_for_an_unknown_user)
    monkeypatch.setenv("HOME", "")  # restored after the test
    monkeypatch.delenv("HOME")
    assert not has_home()
    assert set(placed()) == set(VARIABLES)
    assert Path.home().is_relative_to(tmp_path / "tmp") and Path.home().is_dir()
    assert not has_home()


def test_a_private_folder_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/dev/null")
    (tmp_path / "tmp" / f"eyas-cache-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / "tmp" / f"eyas-cache-{os.getuid()}").chmod(0o777)
    assert placed() == {}
