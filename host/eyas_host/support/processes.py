"""Child processes that do not outlive their parent."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time


def end_with_parent(seconds: float = 2.0) -> None:
    """End this child process at most `seconds` after its parent ended, for whatever reason."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        while parent.is_alive():
            time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
