"""The command line called inside the test's own process: nothing heavy is imported again."""

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
    """How a command ended."""

    code: int
    out: str
    err: str


def eyas(place: Path, *words: object) -> Done:
    """Run `eyas WORDS` in the folder `place`."""
    out, err, before, threads = io.StringIO(), io.StringIO(), Path.cwd(), torch.get_num_threads()
    os.chdir(place)
    try:
        with (
            mock.patch.object(sys, "argv", ["eyas", *map(str, words)]),
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
        torch.set_num_threads(threads)  # the stages choose their own
    return Done(code, out.getvalue(), err.getvalue())
