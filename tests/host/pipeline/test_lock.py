"""Two commands on one run: who may work beside whom, what is said, and file systems without locks."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from eyas_host.pipeline.lock import RunLock
from eyas_host.pipeline.runner import RunContext, Stage, StageResult, prepared_run, run_chain
from eyas_host.quant import kernels
from eyas_host.recipe import Recipe
from eyas_host.recipe.run import RunSection
from eyas_host.support import files
from eyas_host.support.errors import StageError
from eyas_host.support.files import exclusive_lock, write_bytes
from tests.support import inside

BUSY = "another eyas command uses this folder"


def writes(name: str, needs: tuple[str, ...] = ()) -> Stage:
    def run(context: RunContext) -> StageResult:
        write_bytes(context.folder(name) / "out", name.encode())
        return StageResult(name)

    return Stage(name, (), needs, run)


STAGES = (writes("split"), writes("teach", ("split",)), writes("distill"), writes("prune"), writes("qat"))


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    return RunContext(Recipe(run=RunSection(name="toy")), tmp_path / "runs" / "toy")


def test_one_writes_or_many_read(tmp_path: Path) -> None:
    with RunLock(tmp_path) as one, RunLock(tmp_path) as other:
        assert one.acquire() and not other.acquire() and not other.acquire(shared=True)
        assert one.acquire(shared=True) and other.acquire(shared=True)
        assert not one.acquire() and other.acquire(shared=True)
    with RunLock(tmp_path) as later:
        later.require()


def test_a_killed_command_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from eyas_host.pipeline.lock import RunLock\n"
        "with RunLock(Path(sys.argv[1])) as lock: lock.require(); print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"held\n"
    with RunLock(tmp_path) as lock:
        assert not lock.acquire()
        with pytest.raises(StageError, match=rf"\(it is process {other.pid} on {socket.gethostname()}, since 20"):
            lock.require(shared=True)
        other.kill()
        other.communicate()
        assert "process" not in str(lock.busy()), "who is dead holds nothing"
        assert lock.acquire()
        assert (tmp_path / ".lock").read_text().split()[0] == str(os.getpid())
    assert (tmp_path / ".lock").read_text() == ""


def test_a_full_disk_keeps_no_lock_from_being_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with RunLock(tmp_path) as one, RunLock(tmp_path) as other:
        assert one.acquire() and not other.acquire()
        assert str(other.busy()).endswith("another name")
    with RunLock(tmp_path) as later:
        assert later.acquire()


def test_readers_are_not_named_as_writers(tmp_path: Path) -> None:
    with RunLock(tmp_path) as one, RunLock(tmp_path) as other:
        assert one.acquire()
        assert one.acquire(shared=True) and other.acquire(shared=True)
        assert "process" not in str(other.busy())
        (tmp_path / ".lock").write_text("7 somebody's notes")
        assert str(other.busy()).endswith("another name")


def test_a_reader_leaves_a_folder_as_it_is(tmp_path: Path) -> None:
    with RunLock(tmp_path, create=False) as lock:
        assert lock.acquire(shared=True)
    assert not list(tmp_path.iterdir())
    with RunLock(tmp_path) as writer, RunLock(tmp_path, create=False) as lock:
        writer.require()
        assert not lock.acquire(shared=True)


def test_nobody_clears_what_a_reader_uses(context: RunContext) -> None:
    """Two workers of a search, and an `eyas distill` beside them."""
    with prepared_run(STAGES, context, until="split", shared=True):
        with pytest.raises(StageError, match=BUSY):
            run_chain(STAGES, context, start="split")
        with prepared_run(STAGES, context, until="split", shared=True):
            pass
        with (
            pytest.raises(StageError, match=rf"{BUSY}, and teach must run first; wait for it"),
            prepared_run(STAGES, context, until="teach", shared=True),
        ):
            pass
    run_chain(STAGES, context, start="split")


def test_a_reader_waits_for_no_writer(context: RunContext) -> None:
    run_chain(STAGES, context)
    with (
        prepared_run(STAGES, context),
        pytest.raises(StageError, match=BUSY),
        prepared_run(STAGES, context, until="split", shared=True),
    ):
        pass


@pytest.mark.parametrize(
    ("words", "work", "may_read"),
    [
        (["preview"], "eyas_host.data.preview.write_preview", True),
        (["tune"], "eyas_host.search.tune.tune", True),
        (["tune", "--what", "student"], "eyas_host.search.tune.tune", True),
        (["sensitivity"], "eyas_host.compress.quantize.sensitivity.measure_sensitivity", False),
        (["distill"], "eyas_host.bundle.demonstrate.demonstrate", False),
    ],
)
def test_the_verbs_hold_the_run_while_they_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], work: str, may_read: bool
) -> None:
    """Behind the chain too: nothing that they read can be cleared meanwhile."""
    (tmp_path / "images").mkdir()
    (tmp_path / "recipe.toml").write_text('[run]\nname = "toy"\n[data]\nsource = "folder"\npath = "images"\n')
    monkeypatch.setattr("eyas_host.stages.chain.STAGES", STAGES)
    monkeypatch.setattr("eyas_host.stages.plan.show_plan", lambda *_: None)
    seen: list[bool] = []

    def look(context: RunContext, *arguments: object, **options: object) -> None:
        with RunLock(context.root) as lock:
            seen.extend((lock.acquire(), lock.acquire(shared=True)))
        raise StageError("enough")

    monkeypatch.setattr(work, look)
    done = inside.eyas(tmp_path, words[0], "recipe.toml", *words[1:])
    assert (done.code, done.err.splitlines()[-1]) == (2, "eyas: enough"), done.err
    assert seen == [False, may_read]
    with RunLock(tmp_path / "runs/toy") as lock:
        assert lock.acquire()


@pytest.mark.parametrize("code", ["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_reported_and_the_work_goes_on(
    context: RunContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: str,
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(fcntl, "flock", refuse)
    files._report_missing_locks.cache_clear()
    run_chain(STAGES, context)
    lines = [line for line in capsys.readouterr().err.splitlines() if "no locks" in line]
    assert len(lines) == 1 and os.strerror(getattr(errno, code)) in lines[0] and str(context.root) in lines[0]
    run_chain(STAGES, context, start="split")
    assert "no locks" not in capsys.readouterr().err
    locks: list[Callable[[], object]] = [
        lambda: exclusive_lock(tmp_path / "one" / ".lock"),
        lambda: kernels._one_process(tmp_path),
    ]
    for lock in locks:
        with lock():  # type: ignore[attr-defined]
            assert "no locks" in capsys.readouterr().err


def test_a_forked_worker_does_not_keep_the_lock(tmp_path: Path) -> None:
    stop = os.pipe()
    with RunLock(tmp_path) as lock:
        lock.require()
        worker = os.fork()
        if not worker:
            os.close(stop[1])
            os.read(stop[0], 1)  # until the parent closes its end
            os._exit(0)
        os.close(stop[0])
    try:
        with RunLock(tmp_path) as lock:
            deadline = time.monotonic() + 10  # the worker closes its copy a moment after the fork
            while not lock.acquire():
                assert time.monotonic() < deadline
                time.sleep(0.01)
    finally:
        os.close(stop[1])
        os.waitpid(worker, 0)
