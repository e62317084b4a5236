"""Call the command line in the test's own process, which saves importing torch again."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from eyas_host.cli import app


class Done(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


def eyas(folder: Path, *arguments: object) -> Done:
    """Run `eyas ARGUMENTS` in `folder`."""
    out, err, before, threads = io.StringIO(), io.StringIO(), Path.cwd(), torch.get_num_threads()
    os.chdir(folder)
    try:
        with (
            mock.patch.object(sys, "argv", ["eyas", *map(str, arguments)]),
            mock.patch.object(sys, "excepthook", sys.excepthook),  # typer sets its own
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                app.main()
                code = 0
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)  # stages set their own
    return Done(code, out.getvalue(), err.getvalue())
