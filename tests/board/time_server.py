"""A time server on the board's own loopback interface: `python3 time_server.py START`, as root.

START is the true time at which the board's uptime was zero, seconds since 1970: whatever its clock says.
"""

from __future__ import annotations

import socket
import struct
import sys
import time

_SINCE_1900 = 2_208_988_800
_SERVER, _STRATUM, _POLL, _PRECISION = 0x24, 1, 6, -20
"""Version 4 without a leap second, and what a server with a clock of its own says (RFC 5905, section 7.3)."""


def main() -> None:
    """Answer for ever."""
    start = float(sys.argv[1])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 123))
        while True:
            request, client = server.recvfrom(512)
            now = int((start + time.clock_gettime(time.CLOCK_BOOTTIME) + _SINCE_1900) * 2**32)
            head = struct.pack("!BBbbII4s", _SERVER, _STRATUM, _POLL, _PRECISION, 0, 0, b"LOCL")
            server.sendto(head + struct.pack("!Q", now) + request[40:48] + struct.pack("!QQ", now, now), client)


if __name__ == "__main__":
    main()
