"""The conditions that a board may start in, and its disk: no network, no clock, full, read-only, dark."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

from eyas_device.bundle import MANIFEST, sha256

from .machine import Board
from .service import (
    DROP_INS,
    SERVICE,
    WAIT_S,
    Messages,
    answering,
    ask,
    longest_gap,
    recovered,
    saying,
    shown,
    wait_for,
)

_SAYS = f"""[Service]
ExecStartPost=+/usr/bin/systemd-run /bin/sh -c '\\
    until systemctl show --property=StatusText {SERVICE} | grep -q "camera delivering"; do sleep 1; done; \\
    echo the camera delivers >/dev/console'
"""
"""On the serial console, where nobody can log in."""
_BLACK, _BARS = "test_pattern=5,osd_text_mode=2", "test_pattern=0,osd_text_mode=0"


def unplugged(board: Board) -> bool:
    """Pull the cable of a board that was just switched on."""
    try:
        board.network(False)
    except OSError:  # its emulator does not listen yet
        return False
    return True


def test_without_network_and_clock_it_answers_and_delivers_when_it_is_plugged_in(
    service_board: Board, messages: Messages, report: Callable[[str], None]
) -> None:
    """Nobody can log in before the cable is plugged in: all that is seen then happened by itself.

    The clock chip says 1970; systemd sets the clock to when it last knew the time.
    """
    service_board.run("rm -f /var/lib/systemd/timesync/clock")
    service_board.run(f"cat >{DROP_INS}/says.conf && sync", stdin=_SAYS)
    service_board.power_cut()
    service_board.start(clock="1970-01-01T00:00:00")
    wait_for("the monitor", lambda: unplugged(service_board), timeout=10)
    wait_for("images", lambda: "the camera delivers" in service_board.console.read_text(errors="replace"))
    time.sleep(5)  # two windows
    service_board.network(True)
    service_board.wait_ssh()
    plugged = float(service_board.run("cut -d ' ' -f 1 /proc/uptime").stdout)
    status = answering(service_board)
    assert status.frames > 0
    wait_for(
        "connected", lambda: (s := ask(service_board)) and s.link and s.link.state == "connected" and not s.link.on_disk
    )
    windows = messages.since_boot(service_board)
    alone = [window for window in windows if window.uptime_s < plugged - 5]
    assert sum(window.frames for window in alone) > 0 and longest_gap(windows) < 1.0, windows
    assert not any(window.synchronised for window in alone)
    service_board.run(f"rm {DROP_INS}/says.conf && systemctl daemon-reload")
    year = service_board.run("date +%Y").stdout.strip()
    report(
        f"no network, clock at {year}: first window {windows[0].uptime_s:.0f} s after "
        f"power on; {len(alone)} windows waited for the cable"
    )


def test_on_a_full_disk_it_answers_says_so_survives_a_power_cut_and_recovers(
    service_board: Board, messages: Messages, two_bundles: tuple[Path, Path]
) -> None:
    before = answering(service_board)
    [bundle] = [bundle for bundle in two_bundles if sha256(bundle / MANIFEST).startswith(before.model.digest)]
    available = "$(($(df --output=avail -B1 / | tail -n 1) - 1000000))"
    try:
        service_board.run(f"fallocate -l {available} /root/full; cat /dev/zero >>/root/full; sync /root/full")
        full = saying(service_board, "full")
        assert answering(service_board, full).pid == before.pid
        service_board.run(f"systemctl reload {SERVICE}", timeout=WAIT_S)
        assert shown(service_board, "NRestarts") == "0"

        service_board.power_cut()
        service_board.start().wait_ssh()
        saying(service_board, "full")
        assert answering(service_board).model.digest == before.model.digest
        held = service_board.run("cd /var/lib/eyas/slots/current/ && sha256sum *").stdout.splitlines()
        assert {path.name: sha256(path) for path in bundle.iterdir()}.items() <= {
            (name, digest) for digest, name in map(str.split, held)
        }
        slots = service_board.run("/opt/eyas/venv/bin/eyas-device slots", timeout=WAIT_S).stdout
        assert re.search(r"^\* . +tiny-shapes [0-9.]+ +good", slots, re.MULTILINE), slots
        assert shown(service_board, "NRestarts") == "0"
    finally:
        service_board.run("rm -f /root/full")
    wait_for("the disk works", lambda: recovered(service_board, "messages wait"))
    freed = float(service_board.run("cut -d ' ' -f 1 /proc/uptime").stdout)
    status = wait_for("the spool", lambda: (s := ask(service_board)) and s.link and s.link.spool == "on disk" and s)
    assert status.model.digest == before.model.digest
    wait_for("windows of later", lambda: messages.since_boot(service_board)[-1].uptime_s > freed)
    assert longest_gap(messages.since_boot(service_board)) < 1.0


def test_it_starts_on_a_read_only_root_in_the_dark(service_board: Board, messages: Messages) -> None:
    """READY is not held up; light comes later, and a disk that can be written with the next start."""
    service_board.run(f"printf '[Service]\\nExecStartPre=+/usr/bin/v4l2-ctl -c {_BLACK}\\n' >{DROP_INS}/dark.conf")
    service_board.run("sed -i 's/defaults/ro/' /etc/fstab && sync")
    service_board.power_cut()
    service_board.start().wait_ssh()
    try:
        assert " / ext4 ro," in service_board.run("cat /proc/mounts").stdout
        wait_for("it is ready", lambda: shown(service_board, "ActiveState") == "active")
        dark = saying(service_board, "black")
        assert dark.camera.state == "black" and dark.frames == 0
        assert any("Read-only" in problem for problem in dark.problems), dark.problems
        wait_for("systemd says it", lambda: "camera black" in shown(service_board, "StatusText"))
        service_board.run(f"v4l2-ctl -c {_BARS}")
        assert answering(service_board, dark).pid == dark.pid
        service_board.run(f"systemctl reload {SERVICE}", timeout=WAIT_S)
        wait_for("windows", lambda: any(window.frames for window in messages.since_boot(service_board)))
    finally:
        service_board.run("mount -o remount,rw / && sed -i 's/ro,noatime/defaults,noatime/' /etc/fstab")
        service_board.run(f"rm -f {DROP_INS}/dark.conf && systemctl daemon-reload && v4l2-ctl -c {_BARS}")
    service_board.run(f"systemctl restart {SERVICE}", timeout=WAIT_S)
    answering(service_board)
    wait_for("the disk works", lambda: recovered(service_board, "Read-only"))
