"""`eyas` and `python -m eyas_host`; also what `torchrun -m eyas_host` starts."""

from __future__ import annotations

import os
import sys

from eyas_device.support.encoding import use_utf8


def main() -> None:
    """Run the command line; Ctrl-C ends it in one line also while it is imported."""
    use_utf8()
    try:
        from eyas_host.cli.app import main as run
    except KeyboardInterrupt:
        os.write(2, b"eyas: interrupted\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
