"""`eyas-device` and `python -m eyas_device`."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def main() -> int:
    """Run the command line; Ctrl-C ends it in one line also while it is imported."""
    try:
        from eyas_device.cli import main as run
    except KeyboardInterrupt:
        with suppress(OSError):
            os.write(2, b"eyas-device: interrupted\n")
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
