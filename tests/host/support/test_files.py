"""Files that survive a power cut, every writer of the host, and where caches go."""

from __future__ import annotations

import ast
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

import eyas_host
from eyas_host.support.errors import StageError
from eyas_host.support.files import atomic_write, cache_folder, sync_files, write_bytes

# Power cuts


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str]]:
    """(`sync` or `rename`, path below `tmp_path`) of each call to the system, in order."""
    seen: list[tuple[str, str]] = []
    sync, rename = os.fsync, os.replace

    def note(call: str, path: str) -> None:
        seen.append((call, os.path.relpath(path, tmp_path)))

    def observed_sync(descriptor: int) -> None:
        note("sync", str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        sync(descriptor)

    def observed_rename(old: str, new: str) -> None:
        note("rename", os.fspath(new))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", observed_sync)
    monkeypatch.setattr(os, "replace", observed_rename)
    return seen


def test_content_is_synced_before_the_name_and_the_name_before_the_return(
    calls: list[tuple[str, str]], tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    with atomic_write(tmp_path / "runs" / "x" / "teach" / "a.ckpt") as temporary:
        temporary.write_bytes(b"weights")
        part = os.path.relpath(temporary, tmp_path)
        assert calls == [("sync", "runs/x"), ("sync", "runs")]  # the names of the new folders
        calls.clear()
    assert calls == [("sync", part), ("rename", "runs/x/teach/a.ckpt"), ("sync", "runs/x/teach")]
    calls.clear()
    write_bytes(tmp_path / "runs" / "file", b"")
    assert [call for call, _ in calls] == ["sync", "rename", "sync"]


def test_what_others_wrote_is_synced_with_all_its_names(calls: list[tuple[str, str]], tmp_path: Path) -> None:
    for name in ("a/b/one", "a/two"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(b"")
    sync_files([tmp_path / "run" / "a/b/one", tmp_path / "run" / "a/two"], tmp_path / "run")
    assert [path for _, path in calls] == ["run/a/b/one", "run/a/two", "run/a/b", "run/a", "run"]


@pytest.mark.parametrize("code", ["EINVAL", "ENOTSUP"])
def test_a_file_system_that_cannot_sync_still_takes_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(os, "fsync", refuse)
    write_bytes(tmp_path / "file", b"x")
    assert (tmp_path / "file").read_bytes() == b"x"


def test_a_disk_that_fails_while_it_syncs_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Delayed allocation: a full disk may show only then."""
    write_bytes(tmp_path / "file", b"old")

    def full(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StageError, match=r"file: cannot be written \(No space left"):
        write_bytes(tmp_path / "file", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


# Writers

_DIRECT = {
    "export/golden.py": "synced by bundle.pack before the bundle moves into place",
    "bundle/reference.py": "synced by bundle.pack",
    "bundle/pack.py": "synced by bundle.pack",
    "export/manifest.py": "an output of verify, synced by the runner before the stage counts as finished",
    "evaluation/latency.py": "a temporary folder",
    "pipeline/lock.py": "a lock",
    "pipeline/memory.py": "a file of /proc",
    "quant/kernels.py": "a lock",
    "data/access_log.py": "a log that is appended to and synced",
    "bundle/demonstrate.py": "copies for a demonstration, made again each time",
    "report/drawing.py": "a stream in memory",
    "retrain/state.py": "a lock",
    "search/result.py": "a stream in memory",
    "support/progress.py": "standard error",
    "support/files.py": "atomic_write itself, and locks",
    "fleet/broker/enroll.py": "not part of a run",
    "fleet/connect/ssh.py": "a temporary folder",
    "fleet/connect/wheels.py": "a temporary folder",
    "fleet/deploy/installer.py": "a temporary folder",
    "fleet/deploy/credentials.py": "a temporary folder",
    "fleet/updates/verify.py": "a temporary folder",
    "versions/registry.py": "a log that is appended to and synced; copies that are verified before they get their name",
    "versions/mlflow_export.py": "a temporary folder",
    "bundle/reduce.py": "synced before the reduced bundle moves into place",
}
"""Files that write by other means than `atomic_write` -> why they may."""


_WRITERS = ("write_bytes", "write_text", "savefig", "copy", "copyfile", "copytree")


def _direct_writes(node: ast.AST, *, guarded: bool = False) -> Iterator[int]:
    """Lines of calls that write a file outside of a `with atomic_write(...)`."""
    if isinstance(node, ast.With):
        guarded = guarded or any("atomic_write" in ast.dump(item.context_expr) for item in node.items)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        guarded = guarded or "atomic_write" in ast.dump(node.func)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not guarded:
        name = node.func.attr
        texts = [value.value for value in (*node.args, *(key.value for key in node.keywords)) if _is_text(value)]
        modes = [text for text in texts if name in ("open", "fdopen") and set(text) <= set("rwaxbt+")]
        opened = any(set(mode) & set("wax") for mode in modes)
        if opened or (name in _WRITERS and _of_a_file(node.func)):
            yield node.lineno
    for child in ast.iter_child_nodes(node):
        yield from _direct_writes(child, guarded=guarded)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _of_a_file(function: ast.Attribute) -> bool:
    owner = function.value.id if isinstance(function.value, ast.Name) else ""
    return not function.attr.startswith("copy") or owner == "shutil"


def test_every_writer_of_the_host_is_atomic_and_durable_or_has_a_reason() -> None:
    root = Path(eyas_host.__file__).parent
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    direct = {name for name, path in files.items() if [*_direct_writes(ast.parse(path.read_text(encoding="utf-8")))]}
    assert len(files) > 150
    assert direct == set(_DIRECT)


# Caches


@pytest.fixture
def _places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", "/proc/nobody")


@pytest.mark.usefixtures("_places")
def test_a_home_that_can_be_written_holds_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("uv") == tmp_path / "home" / ".cache" / "uv"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache_folder("uv") == tmp_path / "caches" / "uv"


@pytest.mark.usefixtures("_places")
def test_else_a_private_folder_does(tmp_path: Path) -> None:
    for _ in range(2):
        folder = cache_folder("uv")
        assert folder.is_dir() and folder.parent.parent == tmp_path
        assert folder.parent.stat().st_mode & 0o077 == 0


@pytest.mark.usefixtures("_places")
def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    private = cache_folder("uv").parent
    private.chmod(0o777)
    with pytest.raises(StageError, match="not a private folder"):
        cache_folder("uv")
    private.rename(tmp_path / "elsewhere")
    private.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StageError, match="not a private folder"):
        cache_folder("uv")
