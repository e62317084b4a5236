"""A flash of a board whose service is live: another model, one that is refused, an agent that crashes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.bundles import edit, record_settings

from .flashing import crashing_wheels, flash, steps
from .machine import Computer
from .service import CONFIG, SERVICE, Messages, answering, longest_gap, wait_for


@pytest.fixture
def other_bundle(two_bundles: tuple[Path, Path], tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Make a bundle of version 3.0.0 with other fields in its manifest."""

    def make(**fields: object) -> Path:
        copy = Path(shutil.copytree(two_bundles[1], tmp_path / "bundle"))
        edit(copy, version="3.0.0", **fields)
        record_settings(copy)
        return copy

    yield make


def add_user(board: Computer, name: str) -> None:
    """Add a user who comes in by root's key; the account has no password, and is not locked."""
    board.run(f"useradd --create-home --shell /bin/sh --password '*' {name} && cp -r /root/.ssh /home/{name}/")
    board.run(f"chown -R {name}: /home/{name}/.ssh")


def test_a_second_flash_leaves_seconds_of_dark_and_the_same_again_changes_nothing(
    live_board: Computer,
    two_bundles: tuple[Path, Path],
    kind_wheels: Path,
    messages: Messages,
    report: Callable[[str], None],
) -> None:
    """By a user who may become root without a password."""
    before = answering(live_board)
    assert before.model.name == "tiny-shapes 1.0.0"
    add_user(live_board, "pi")
    live_board.run("echo 'pi ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/pi")
    since = time.monotonic()
    done = flash(live_board, two_bundles[1], wheels=kind_wheels, user="pi")
    report(f"second flash, another bundle: {time.monotonic() - since:.0f} s ({steps(done)})")
    assert "flashed: tiny-shapes 2.0.0 in slot b; new: model" in done.stdout, done.stdout
    answering(live_board)
    wait_for("its windows", lambda: messages.windows[-1].model == "tiny-shapes 2.0.0" and messages.windows[-1].frames)
    windows = messages.since_boot(live_board)
    old = [window for window in windows if window.model == "tiny-shapes 1.0.0"]
    change = [old[-1], *(window for window in windows if window.uptime_s > old[-1].uptime_s)]
    report(f"the camera was without predictions for {longest_gap(change):.0f} s of that")
    assert longest_gap(change) < time.monotonic() - since
    since = time.monotonic()
    again = flash(live_board, two_bundles[1], wheels=kind_wheels)
    report(f"the same flash again: {time.monotonic() - since:.0f} s")
    assert "unchanged" in again.stdout, again.stdout + again.stderr


def test_a_user_who_may_not_become_root_is_refused_before_anything_is_changed(
    live_board: Computer, two_bundles: tuple[Path, Path], kind_wheels: Path
) -> None:
    """Nothing but what the agent notes about its model once that has answered for a while."""
    before = answering(live_board)
    add_user(live_board, "visitor")
    live_board.run("touch /run/before")
    done = flash(live_board, two_bundles[0], wheels=kind_wheels, user="visitor", check=False)
    assert done.returncode == 1
    assert "visitor cannot write to /; log in as root or allow password-less sudo" in done.stdout, done.stdout
    changed = "find /opt /etc /home /root /tmp /var/tmp /usr/local /var/lib/eyas/slots -xdev -newer /run/before"
    changed += " ! -name '*.attempts'"
    left = set(live_board.run(changed).stdout.split())
    assert not left - {"/tmp", "/var/tmp", "/var/lib/eyas/slots"}  # a file there that has gone again
    after = answering(live_board, before)
    assert (after.pid, after.model.digest) == (before.pid, before.model.digest)


def test_a_refused_flash_leaves_the_model_answering(
    live_board: Computer,
    two_bundles: tuple[Path, Path],
    kind_wheels: Path,
    other_bundle: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Damaged, for a newer agent, and with golden images that the board does not reproduce."""
    before = answering(live_board)
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
        done = flash(live_board, bundle, wheels=kind_wheels, check=False)
        assert done.returncode and reason in done.stdout + done.stderr, done.stdout + done.stderr
    after = answering(live_board, before)
    assert (after.pid, after.model.digest, after.restarts) == (before.pid, before.model.digest, {})


def test_a_model_that_is_too_slow_is_refused_and_the_configuration_that_says_so_does_not_come(
    live_board: Computer, kind_wheels: Path, other_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    before, content = answering(live_board), live_board.run(f"cat {CONFIG}").stdout
    (config := tmp_path / "device.toml").write_text(f"{content}[model]\nmax_latency_ms = 0.001\n")
    done = flash(live_board, other_bundle(), "--config", str(config), wheels=kind_wheels, check=False)
    assert done.returncode and "0.001 ms" in done.stdout + done.stderr, done.stdout + done.stderr
    after = answering(live_board, before)
    assert (after.pid, after.model.digest) == (before.pid, before.model.digest)
    assert live_board.run(f"cat {CONFIG}").stdout == content


def test_an_agent_that_crashes_is_rolled_back_with_the_model_that_came_with_it(
    live_board: Computer,
    kind_wheels: Path,
    other_bundle: Callable[..., Path],
    tmp_path: Path,
    report: Callable[[str], None],
) -> None:
    """It passes the golden check, and the kernel ends it when the service opens the same model."""
    before, environment = answering(live_board), live_board.run("readlink /opt/eyas/venv").stdout
    crashing, since = crashing_wheels(kind_wheels, tmp_path / "wheels"), time.monotonic()
    done = flash(live_board, other_bundle(), wheels=crashing, check=False)
    report(f"a flash that is rolled back, of an agent that crashes: {time.monotonic() - since:.0f} s ({steps(done)})")
    assert done.returncode and "rolled back" in done.stdout, done.stdout + done.stderr
    assert "golden check passed" in done.stderr and "the service does not start" in done.stdout, done.stderr
    assert "status=11/SEGV" in live_board.run(f"journalctl --unit {SERVICE} --no-pager").stdout
    assert live_board.run("readlink /opt/eyas/venv").stdout == environment
    after = answering(live_board)
    assert after.model.digest == before.model.digest and not after.model.refused
    assert SERVICE in live_board.run("systemctl list-units --state=active --plain 'eyas*'").stdout
