"""How to install eyas-device: the one place of this half to change once it is published."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

WHEEL = "./eyas_device-*.whl"
"""What pip installs into a new environment: the wheel that lies there; `eyas-device` once it is published."""
NEW = f"pip install {WHEEL}"
"""The line for a new environment."""
BUILD = "uv build --wheel --out-dir dist device"
"""Makes that wheel in a checkout; not needed any more once it is published."""


def install_line(extra: str = "") -> str:
    """The line that completes the environment of this program: what is missing, or what an extra adds.

    pip takes the installed distribution's own list for it, so that neither a wheel nor a checkout need be at hand.
    """
    name = f"'eyas-device[{extra}]'" if extra else "eyas-device"
    try:
        metadata.distribution("pip")
    except metadata.PackageNotFoundError:  # as `eyas flash` makes environments
        return f"python3 -m pip --python {sys.prefix} install {name}"
    return f"{sys.executable} -m pip install {name}"


def program_path() -> str:
    """The command that runs this program, as it was installed."""
    script = Path(sys.executable).with_name("eyas-device")
    return str(script) if script.is_file() else f"{sys.executable} -m eyas_device"
