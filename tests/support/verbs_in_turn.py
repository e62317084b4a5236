"""Run verbs of `eyas` one after the other in this process, each as if it were the first.

The argument is a JSON file: a list of `[name, seconds, verb, argument, ...]`; after so many seconds (0: never) the verb
gets a SIGTERM, and arguments of the form NAME=1 are environment variables. Before each verb, a line `verb NAME` goes to
the audit log and to standard error; the exit codes are in `codes.json` at the end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from unittest import mock

from eyas_host.cli import app
from eyas_host.support.quiet import quiet_libraries


def main(file: str) -> None:
    """Run the verbs of a file; latencies are measured for real, but not for long."""
    quiet_libraries()  # before the patches import a library
    with (
        mock.patch("eyas_host.evaluation.networks._ROUNDS", 3),
        mock.patch("eyas_host.evaluation.latency._SECONDS", 0.1),
    ):
        _run(file)


def _run(file: str) -> None:
    codes = {}
    for name, seconds, *words in json.loads(Path(file).read_text()):
        _mark(name)
        variables = [word for word in words if word.endswith("=1") and word.isupper()]
        os.environ |= {word.removesuffix("=1"): "1" for word in variables}
        _forget_the_hub()
        sys.argv = ["eyas", *(word for word in words if word not in variables)]
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
        if seconds:
            timer.start()
        try:
            app.main()
            codes[name] = 0
        except SystemExit as ended:
            codes[name] = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except Exception:
            traceback.print_exc()
            codes[name] = -1
        timer.cancel()
        for word in variables:
            del os.environ[word.removesuffix("=1")]
    Path("codes.json").write_text(json.dumps(codes))


def _mark(name: str) -> None:
    print(f"verb {name}", file=sys.stderr, flush=True)
    with Path(os.environ["EYAS_TEST_AUDIT"]).open("a") as log:
        log.write(f"verb {name}\n")


def _forget_the_hub() -> None:
    """A hub that did not answer is not asked again by the process: let the next verb ask it."""
    if "huggingface_hub.constants" in sys.modules:
        sys.modules["huggingface_hub.constants"].HF_HUB_OFFLINE = os.environ.get("HF_HUB_OFFLINE") == "1"


if __name__ == "__main__":
    main(sys.argv[1])
