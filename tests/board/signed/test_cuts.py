"""What needs a kernel of its own: a power cut in a signed update, and a stick that is plugged in."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ..flashing import DEVICE
from ..machine import Board
from ..service import answering, ask, wait_for
from .publishing import (
    SLOW_S,
    UPDATE,
    Publisher,
    committed,
    look,
    manifest_of,
    next_number,
    record_of,
    stick_files,
    update_log,
    wrong_files,
)

PORT = ("-device", "pcie-root-port,id=socket,chassis=1")
"""Where a stick is plugged in: this kernel has no driver for USB disks, and to udev a disk is a disk."""


@pytest.mark.parametrize("kind", ["emulated"], indirect=True)
@pytest.mark.parametrize("moment", ["downloading", "probation"])
def test_a_power_cut_in_an_update_leaves_a_verified_model_and_the_update_goes_on(
    moment: str,
    board: Board,
    publisher: Publisher,
    versions: Callable[[str], Path],
    report: Callable[[str], None],
) -> None:
    earlier = manifest_of(board)["version"]
    version = next_number(board)
    publisher.publish(versions(version), "--channel", "stable")
    asked = len(publisher.server.requests)
    look(board)
    if moment == "downloading":
        blobs = lambda: any(path.startswith("/blobs/") for path, _ in publisher.server.requests[asked:])  # noqa: E731
        wait_for("a blob is asked for", blobs, SLOW_S)
        time.sleep(2)
    else:
        wait_for("its probation", lambda: record_of(board).get("state") == moment, SLOW_S)
    board.power_cut()
    board.start(devices=PORT).wait_ssh(SLOW_S)
    assert wrong_files(board, publisher.repository) == ""
    assert manifest_of(board)["version"] in (earlier, version)
    answers = answering(board).model.name
    assert answers in (f"tiny-shapes {earlier}", f"tiny-shapes {version}")
    committed(board, version)
    assert wrong_files(board, publisher.repository) == ""
    publisher.reported(DEVICE, version, "committed")
    resumed = [start for path, start in publisher.server.requests[asked:] if path.startswith("/blobs/") and start]
    report(f"power cut while {moment}: {answers} answers, then {version} is committed; resumed at {resumed} bytes")


@pytest.mark.parametrize("kind", ["emulated"], indirect=True)
def test_a_stick_is_installed_by_the_documented_rule(
    board: Board,
    publisher: Publisher,
    versions: Callable[[str], Path],
    tmp_path: Path,
    report: Callable[[str], None],
) -> None:
    """A FAT stick, as people have them, and a camera that looks at no server."""
    version = next_number(board)
    board.run(f"systemctl stop {UPDATE}")
    publisher.publish(versions(version), "--channel", "stable", "--to", str(tmp_path / "eyas"))
    for path, content in stick_files().items():
        board.run(f"cat >{path}", stdin=content)
    board.run("systemctl daemon-reload && udevadm control --reload")
    disk = tmp_path / "stick.img"
    with disk.open("wb") as stream:
        stream.truncate(64 << 20)
    plug(board, disk)
    wait_for("the disk", lambda: board.run("test -b /dev/vdb", check=False).returncode == 0)
    board.run("busybox mkdosfs -n EYAS /dev/vdb && mount -t vfat /dev/vdb /mnt")
    board.put(tmp_path / "eyas", "/mnt/eyas")
    board.run("umount /mnt && sync")
    unplug(board)
    since = time.monotonic()
    plug(board, disk)
    wait_for("the new model", lambda: manifest_of(board)["version"] == version, SLOW_S)
    wait_for("it runs", lambda: (s := ask(board)) and s.model.name.endswith(version))
    report(f"a stick with FAT: plugged in, and {version} answers {time.monotonic() - since:.0f} s later")
    assert wrong_files(board, publisher.repository) == ""
    log = update_log(board, "eyas-stick@*")
    assert f"installing tiny-shapes {version}" in log, log
    publisher.reported(DEVICE, version, "committed")
    assert "eyas-stick" not in board.run("cat /proc/mounts").stdout, "nobody else sees the stick"
    unplug(board)
    look(board)


def plug(board: Board, disk: Path) -> None:
    """Plug a disk in."""
    board.monitor(f"drive_add 0 if=none,id=stick,format=raw,file={disk}")
    answer = board.monitor("device_add virtio-blk-pci,bus=socket,drive=stick,id=stick")
    assert "Error" not in answer, answer


def unplug(board: Board) -> None:
    """Pull it out, and wait until the board has let go of it."""
    board.monitor("device_del stick")
    wait_for("it is gone", lambda: board.run("test -b /dev/vdb", check=False).returncode != 0)
    wait_for("the emulator closes it", lambda: "stick" not in board.monitor("info block"))
