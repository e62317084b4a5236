"""What `eyas_host.pipeline.team` starts: a process that trains along in the stages that run together."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from importlib import import_module
from pathlib import Path

import msgspec

from eyas_device.errors import EXIT_USER_ERROR, EyasError
from eyas_host.pipeline import distributed
from eyas_host.pipeline.runner import RECIPE, RunContext, follow
from eyas_host.pipeline.team import arguments, ready_file
from eyas_host.recipe import Recipe
from eyas_host.stages.chain import STAGES
from eyas_host.support.progress import console
from eyas_host.support.quiet import quiet_libraries, quiet_warnings


def main() -> None:
    """Follow the main process through the stages of its run."""
    root, rank, count, folder = arguments(sys.argv[1:])
    threading.Thread(target=_end_with_main, args=(folder,), name="end-with-main", daemon=True).start()
    console.quiet = True
    quiet_libraries()
    quiet_warnings()
    recipe = msgspec.json.decode((root / RECIPE).read_bytes(), type=Recipe)
    for stage in STAGES:
        if stage.together:
            import_module(stage.module)  # while the main process is still busy with other stages
    try:
        ready_file(folder, rank).touch()
        distributed.join_team(rank, count, folder)
        follow(STAGES, RunContext(recipe, root))
    except EyasError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def _end_with_main(folder: Path) -> None:
    """End when the main process does: it holds the other end of the standard input, and writes nothing.

    One that was killed leaves the folder behind.
    """
    os.read(sys.stdin.fileno(), 1)  # no buffered read: its lock would abort an interpreter that ends meanwhile
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    main()
