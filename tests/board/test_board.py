"""The board itself: a real processor's instructions, a real kernel, systemd, ssh and a camera."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

from .machine import Board, base_of


def test_it_is_a_raspberry_pis_processor_under_debian(bare_board: Board, report: Callable[[str], None]) -> None:
    assert bare_board.run("uname -m").stdout == "aarch64\n"
    assert "Cortex-A72" in bare_board.run("lscpu").stdout
    assert "VERSION_CODENAME=bookworm\n" in bare_board.run("cat /etc/os-release").stdout
    assert bare_board.run("python3 -c 'import sys; print(sys.version_info[:2])'").stdout == "(3, 11)\n"
    assert bare_board.wait_running() == "running", bare_board.run("systemctl --failed").stdout
    report(bare_board.run("systemd-analyze").stdout.splitlines()[0])


def test_its_packages_are_configured(bare_board: Board) -> None:
    assert bare_board.run("dpkg --audit").stdout == ""
    assert (
        bare_board.run("dpkg-query -W -f '${Package} ${Status}\\n' | grep -v 'install ok installed'; true").stdout == ""
    )
    assert bare_board.run("apt-get check --quiet=2").stdout == ""


def test_its_camera_delivers_images(bare_board: Board) -> None:
    assert "vivid" in bare_board.run("v4l2-ctl --device /dev/video0 --info").stdout
    grab = "v4l2-ctl --device /dev/video0 --stream-mmap --stream-count 3 --stream-to - | wc --bytes"
    assert int(bare_board.run(grab).stdout) > 3 * 100_000


def test_nobody_comes_in_without_the_key(bare_board: Board) -> None:
    words = ["ssh", "-F", "none", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "IdentityFile=none"]
    words += ["-o", f"UserKnownHostsFile={bare_board.image.known_hosts}", "-p", str(bare_board.port)]
    done = subprocess.run([*words, "root@127.0.0.1", "true"], capture_output=True, text=True, timeout=60, check=False)
    assert "Permission denied (publickey)" in done.stderr


def test_its_disk_is_a_layer_above_an_image_that_stays(bare_board: Board) -> None:
    """A boot of a copy is what the power cuts begin with; here nothing has to start."""
    built = bare_board.image.disk.stat()
    bare_board.run("head -c 8M /dev/urandom >/root/written && sync")
    after = bare_board.image.disk.stat()
    assert (built.st_mtime_ns, built.st_blocks) == (after.st_mtime_ns, after.st_blocks)
    assert base_of(base_of(bare_board.disk)) == bare_board.image.disk  # a copy's is that of what it was copied from
    assert bare_board.disk.stat().st_blocks * 512 > 8 << 20
