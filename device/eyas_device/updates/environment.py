"""The virtual environment of an agent: the scripts that build it beside the one in use, and switch to it.

`python -m venv` with pip takes a minute and a half on an emulated Cortex-A72 and `pip install` as long again: all
wheels are there where they can be, and are unpacked. Where the device has to ask its package index, pip runs from the
wheel that every Python has for `ensurepip`, without being installed first. `eyas flash` and an update of the agent do
the same.
"""

from __future__ import annotations

from eyas_device.updates import unpack

UNPACK = unpack.__file__
"""Script that has to be `unpack.py` in the folder that holds the folder `wheels`."""
LINK = 'cd "$1"; ln -sfn "$2" .venv.new; mv -T .venv.new venv'
"""Makes an environment, by its name below `$1`, the one in use."""

BUILD = """
umask 022; cd /
env=$1; python=$2; files=$3; site=$4; extras=$5; how=$6
rm -rf "$env"
trap '[ -f "$env/eyas.stamp" ] || rm -rf "$env"' EXIT
"$python" -m venv --without-pip $site "$env"
if [ "$how" = unpack ]; then
  "$env/bin/python" "$files/unpack.py" "$files"/wheels/*.whl
else
  pip=$("$python" -c '
import ensurepip, glob
folders = (ensurepip.__path__[0] + "/_bundled", "/usr/share/python-wheels")
print(next((found for folder in folders for found in sorted(glob.glob(folder + "/pip-*.whl"))), ""))')
  if [ -n "$pip" ]; then pip=$pip/pip; else "$env/bin/python" -m ensurepip >/dev/null; pip=-mpip; fi
  "$env/bin/python" "$pip" install --quiet --disable-pip-version-check --no-input --no-compile \\
    --constraint "$files/constraints.txt" --find-links "$files/wheels" \\
    "$(echo "$files"/wheels/eyas_device-*.whl)$extras"
fi
"$env/bin/python" -c '
import compileall, contextlib, os, sys
import eyas_device, eyas_device.agent.app
from eyas_device.runtimes import RUNTIMES, load
for name in RUNTIMES:
    with contextlib.suppress(Exception):
        load(name)
compileall.compile_dir(os.path.dirname(eyas_device.__file__), quiet=2)' >/dev/null 2>&1 || true
"$env/bin/eyas-device" --version >/dev/null
sync -f "$env" 2>/dev/null || sync
: > "$env/eyas.stamp"
sync -f "$env" 2>/dev/null || sync
"""
"""Builds an environment beside that in use. The service's user cannot write bytecode into it: what the agent imports is
compiled here. The stamp says that all of it is on the disk; one that failed, of a full disk for example, is removed.

Arguments: the environment's folder, the interpreter, the folder of files, an option for `venv` or nothing, extras in
brackets or nothing, and `unpack` or `index`.
"""
