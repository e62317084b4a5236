"""File names in UTF-8, whatever the locale is."""

from __future__ import annotations

import os
import sys


def use_utf8() -> None:
    """Start this program again in Python's UTF-8 mode where file names would be ASCII (PEP 540); else do nothing.

    Python does so itself for the locale C, unless PYTHONUTF8 or another ASCII locale keeps it from that. Then a folder
    named `Größe` is a name that can be neither written nor sent.
    """
    if sys.getfilesystemencoding() == "ascii" and os.environ.get("PYTHONUTF8") != "1" and sys.executable:
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
