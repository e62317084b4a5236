"""How a module of the agent is started in a process of its own."""

from __future__ import annotations

import json
import sys

_START = """
import importlib, json, sys
sys.path[:] = json.loads(sys.argv.pop(1))
importlib.import_module(sys.argv.pop(1)).main(sys.argv[1:])
"""


def command(module: str, *arguments: str) -> list[str]:
    """The command that calls `main(arguments)` of `module` in another interpreter.

    It imports what this process imports: `python -m` would import from whatever folder the agent was started in.
    """
    return [sys.executable, "-c", _START, json.dumps(sys.path), module, *arguments]
