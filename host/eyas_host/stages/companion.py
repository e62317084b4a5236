"""What `eyas_host.pipeline.team` starts: a process that trains along in the stages that run together."""

from __future__ import annotations

import os
import sys
import threading
from importlib import import_module

import msgspec

from eyas_device.errors import EyasError
from eyas_host.pipeline import distributed
from eyas_host.pipeline.runner import RECIPE, RunContext, follow
from eyas_host.pipeline.team import arguments
from eyas_host.recipe import Recipe
from eyas_host.stages.chain import STAGES
from eyas_host.support.progress import console
from eyas_host.support.quiet import quiet_libraries, quiet_warnings


def main() -> None:
    """Follow the main process through the stages of its run."""
    root, rank, count, place = arguments(sys.argv[1:])
    threading.Thread(target=_end_with_main, name="end-with-main", daemon=True).start()
    console.quiet = True
    quiet_libraries()
    quiet_warnings()
    recipe = msgspec.json.decode((root / RECIPE).read_bytes(), type=Recipe)
    for stage in STAGES:
        if stage.together:
            import_module(stage.module)  # while the main process is still busy with other stages
    try:
        distributed.join_team(rank, count, place)
        follow(STAGES, RunContext(recipe, root))
    except EyasError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def _end_with_main() -> None:
    """End when the main process does: it holds the other end of the standard input, and writes nothing."""
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
