"""`eyas-device` and `python -m eyas_device`."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from eyas_device.support.encoding import use_utf8


def main() -> int:
    """Run the command line; Ctrl-C ends it in one line also while it is imported."""
    use_utf8()
    try:
        from eyas_device.cli import main as run
    except KeyboardInterrupt:
        with suppress(OSError):
            os.write(2, b"eyas-device: interrupted\n")
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
