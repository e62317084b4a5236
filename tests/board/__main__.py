"""`python -m tests.board`: a board in the foreground, to try Eyas on without hardware; Ctrl-C switches it off."""

from __future__ import annotations

import argparse
import shutil
import socket
import sys
import time

from .machine import HOST_ADDRESS, Board, Image, base_of, cache, unavailable_programs

_PORTS = range(2222, 2322)


def free(port: int) -> bool:
    """Whether nobody listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def instructions(board: Board) -> str:
    """What can be done with it, as commands that can be typed."""
    key, known = board.image.key, f"UserKnownHostsFile={board.image.known_hosts}"
    return f"""
The board answers on 127.0.0.1, port {board.port}. Its camera is /dev/video0, `v4l2:0`. Ctrl-C switches it off.

log in:
  ssh -p {board.port} -i {key} -o {known} root@127.0.0.1

a camera in `eyas watch`; broker, collector and view go on, each in a terminal of its own, and `make board-bundle` makes
the bundle (for the board, this machine is {HOST_ADDRESS}):
  .venv/bin/eyas broker --name {HOST_ADDRESS}
  .venv/bin/eyas enroll cam-7 --camera v4l2:0
  make flash DEVICE={board.address} NAME=cam-7 BUNDLE=runs/shapes/bundle \\
    FLASH_FLAGS='--offline --identity {key} --ssh-option {known}'
  .venv/bin/eyas collect
  .venv/bin/eyas watch

its serial console:
  tail -f {board.console}
"""


def main() -> int:
    """Build the image if need be, start the board and stay until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="make board", description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="start from the image, not from the disk of last time")
    parser.add_argument("--memory", type=int, default=2048, metavar="MB", help="default 2048")
    chosen = parser.parse_args()
    if missing := unavailable_programs():
        print(f"board: not installed: {', '.join(missing)}; run: make system-deps", file=sys.stderr)
        return 1
    folder = cache() / "disk"
    image = Image.build()
    if (folder / "disk.qcow2").exists() and (chosen.fresh or base_of(folder / "disk.qcow2") != image.disk):
        shutil.rmtree(folder)
    port = next((port for port in _PORTS if free(port)), None)
    board = Board(folder, image, port=port, memory_mb=chosen.memory)
    try:
        print("board: starting, about half a minute ...", flush=True)
        board.start().wait_ssh().move_image()
        print(instructions(board), flush=True)
        while board.running:
            time.sleep(1)
        print("board: it was switched off")
    except KeyboardInterrupt:
        print("\nboard: switching off ...", flush=True)
        board.stop()
    finally:
        board.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
