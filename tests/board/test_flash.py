"""A flash of a board whose service is live: another model, one that is refused, one that the service fails with."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.bundles import edit, record_settings

from .flashing import flash
from .machine import Board
from .service import CONFIG, DROP_INS, SERVICE, Messages, answering, longest_gap, wait_for


@pytest.fixture
def other_bundle(two_bundles: tuple[Path, Path], tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Make a bundle of version 3.0.0 with other fields in its manifest."""

    def make(**fields: object) -> Path:
        copy = Path(shutil.copytree(two_bundles[1], tmp_path / "bundle"))
        edit(copy, version="3.0.0", **fields)
        record_settings(copy)
        return copy

    yield make


def test_a_second_flash_leaves_seconds_of_dark_and_the_same_again_changes_nothing(
    service_board: Board,
    two_bundles: tuple[Path, Path],
    wheels: Path,
    messages: Messages,
    report: Callable[[str], None],
) -> None:
    before = answering(service_board)
    assert before.model.name == "tiny-shapes 1.0.0"
    since = time.monotonic()
    done = flash(service_board, two_bundles[1], wheels=wheels)
    report(f"second flash, another bundle: {time.monotonic() - since:.0f} s")
    assert "flashed: tiny-shapes 2.0.0 in slot b; new: model" in done.stdout, done.stdout
    answering(service_board)
    wait_for("its windows", lambda: messages.windows[-1].model == "tiny-shapes 2.0.0" and messages.windows[-1].frames)
    windows = messages.since_boot(service_board)
    old = [window for window in windows if window.model == "tiny-shapes 1.0.0"]
    change = [old[-1], *(window for window in windows if window.uptime_s > old[-1].uptime_s)]
    report(f"the camera was without predictions for {longest_gap(change):.0f} s of that")
    assert longest_gap(change) < time.monotonic() - since
    since = time.monotonic()
    again = flash(service_board, two_bundles[1], wheels=wheels)
    report(f"the same flash again: {time.monotonic() - since:.0f} s")
    assert "unchanged" in again.stdout, again.stdout + again.stderr


def test_a_refused_flash_leaves_the_model_answering(
    service_board: Board,
    two_bundles: tuple[Path, Path],
    wheels: Path,
    other_bundle: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Damaged, for a newer agent, and with golden images that the board does not reproduce."""
    before = answering(service_board)
    tampered = Path(shutil.copytree(two_bundles[1], tmp_path / "tampered"))
    with (tampered / "litert-int8.tflite").open("ab") as stream:
        stream.write(b"x")
    newer = Path(shutil.copytree(two_bundles[1], tmp_path / "newer"))
    edit(newer, min_agent_version="99.0.0")
    for bundle, reason in (
        (tampered, "litert-int8.tflite"),
        (newer, "99.0.0"),
        (other_bundle(golden_tolerance=0.0), "its current bundle stays"),
    ):
        done = flash(service_board, bundle, wheels=wheels, check=False)
        assert done.returncode and reason in done.stdout + done.stderr, done.stdout + done.stderr
    after = answering(service_board, before)
    assert (after.pid, after.model.digest, after.restarts) == (before.pid, before.model.digest, {})


def test_a_model_that_is_too_slow_is_refused_and_the_configuration_that_says_so_does_not_come(
    service_board: Board, wheels: Path, other_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    before, content = answering(service_board), service_board.run(f"cat {CONFIG}").stdout
    (config := tmp_path / "device.toml").write_text(f"{content}[model]\nmax_latency_ms = 0.001\n")
    done = flash(service_board, other_bundle(), "--config", str(config), wheels=wheels, check=False)
    assert done.returncode and "0.001 ms" in done.stdout + done.stderr, done.stdout + done.stderr
    after = answering(service_board, before)
    assert (after.pid, after.model.digest) == (before.pid, before.model.digest)
    assert service_board.run(f"cat {CONFIG}").stdout == content


def test_a_model_that_the_service_fails_with_is_rolled_back(
    service_board: Board, wheels: Path, other_bundle: Callable[..., Path], report: Callable[[str], None]
) -> None:
    before = answering(service_board)
    fails = 'ExecStartPre=/bin/sh -c "! grep -q 3.0.0 /var/lib/eyas/slots/current/manifest.json"'
    service_board.run(f"cat >{DROP_INS}/fails.conf && systemctl daemon-reload", stdin=f"[Service]\n{fails}\n")
    try:
        since = time.monotonic()
        done = flash(service_board, other_bundle(), wheels=wheels, check=False)
        report(f"a flash that is rolled back: {time.monotonic() - since:.0f} s")
    finally:
        service_board.run(f"rm {DROP_INS}/fails.conf && systemctl daemon-reload")
    assert done.returncode and "rolled back" in done.stdout, done.stdout + done.stderr
    assert "the service does not start" in done.stdout, done.stdout
    after = answering(service_board)
    assert after.model.digest == before.model.digest and not after.model.refused
    assert SERVICE in service_board.run("systemctl list-units --state=active --plain 'eyas*'").stdout
