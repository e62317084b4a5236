"""Commands as they can be typed here: quoted, and with the path of the program if it was called by one."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path


def command(program: str, *arguments: object) -> str:
    """A command line that starts `program`, "eyas" or "eyas-device", from the current folder."""
    return f"{_program(program)} {shlex.join(str(argument) for argument in arguments)}"


def called_again(*arguments: object) -> str:
    """The command line of this process with further arguments."""
    return command("eyas", *sys.argv[1:], *arguments)


def _program(name: str) -> str:
    """The name alone if the shell finds it, else the path of the one beside the running one."""
    beside = [Path(sys.argv[0]).parent / name, Path(sys.executable).parent / name]
    own = next((path for path in beside if os.access(path, os.X_OK) and path.is_file()), None)
    found = shutil.which(name)
    if own is None or (found is not None and Path(found).resolve() == own.resolve()):
        return name
    path = own.absolute()  # a link to a virtual environment stays as it is
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))
