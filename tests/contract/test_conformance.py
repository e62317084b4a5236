"""The three commands of TUF's conformance tests, against a real repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eyas_host.fleet.updates.ceremony import rotate
from eyas_host.fleet.updates.repository import Repository
from tests.support.repositories import change, make_repository, open_repository, served

TARGET = "releases/tiny-shapes/1.2.3/release.json"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "eyas_device.updates.conformance", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def repository(tmp_path: Path, pristine_bundle: Path) -> Repository:
    repository = make_repository(tmp_path / "fleet")
    repository.publish(pristine_bundle, channel="stable")
    return repository


def test_init_refresh_and_download(repository: Repository, tmp_path: Path) -> None:
    metadata, targets, root = tmp_path / "metadata", tmp_path / "targets", tmp_path / "root.json"
    metadata.mkdir()
    targets.mkdir()
    root.write_bytes(repository.root())
    trusted = ("--metadata-dir", str(metadata))
    with served(repository.folder) as (url, server):
        assert run(*trusted, "init", str(root)).returncode == 0
        assert server.requested == []  # type: ignore[attr-defined]
        at = (*trusted, "--metadata-url", f"{url}/metadata")
        done = run(*at, "refresh")
        assert (done.returncode, done.stderr) == (0, "")
        assert {path.name for path in metadata.glob("*.json")} == {
            *("root.json", "timestamp.json", "snapshot.json", "targets.json")
        }
        where = ("--target-base-url", f"{url}/targets/", "--target-dir", str(targets))
        for _ in range(2):
            done = run(*at, "--target-name", TARGET, *where, "download")
            assert (done.returncode, done.stderr) == (0, "")
        [found] = targets.iterdir()
        assert found.name == TARGET.replace("/", "%2F")
        assert b'"version": "1.2.3"' in found.read_bytes()
        fetched = [path for path in server.requested if path.startswith("/targets/")]  # type: ignore[attr-defined]
        assert len(fetched) == 1, "what is there is not fetched again"
        rotate(open_repository(repository.kit), ["online"])
        assert run(*at, "refresh").returncode == 0
        assert b'"version":2' in (metadata / "root.json").read_bytes()
        done = run(*at, "--target-name", "absent", *where, "download")
        assert (done.returncode, "lists no such target" in done.stderr) == (1, True)
        change(repository.folder / "metadata/timestamp.json", lambda content: content["signed"].update(version=9))
        done = run(*at, "refresh")
        assert (done.returncode, done.stderr.startswith("TamperedError: timestamp.json")) == (1, True)


def test_a_folder_is_a_repository_too(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "metadata").mkdir()
    trusted = ("--metadata-dir", str(tmp_path / "metadata"))
    root = Path(shutil.copy(repository.folder / "metadata/1.root.json", tmp_path / "root.json"))
    assert run(*trusted, "init", str(root)).returncode == 0
    done = run(*trusted, "--metadata-url", str(repository.folder / "metadata"), "refresh")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_missing_option_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    done = run("--metadata-dir", str(tmp_path), "refresh")
    assert (done.returncode, "an option is missing" in done.stderr) == (2, True)
    done = run("--metadata-dir", str(tmp_path), "init", str(tmp_path / "absent"))
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
