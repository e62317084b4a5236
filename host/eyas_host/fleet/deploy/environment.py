"""The virtual environment of a device: which script builds it, and with what.

`python -m venv` with pip takes a minute and a half on an emulated Cortex-A72 and `pip install` as long again: the host
sends all wheels where it can, and the device unpacks them. Where the device has to ask its package index, pip runs from
the wheel that every Python has for `ensurepip`, without being installed first.
"""

from __future__ import annotations

from eyas_host.fleet.connect.preflight import DeviceFacts
from eyas_host.fleet.deploy import unpack
from eyas_host.fleet.deploy.plan import InstallPlan

UNPACK = unpack.__file__
"""Script that is sent beside the wheels."""

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
  [ "$how" = offline ] && index=--no-index || index=
  "$env/bin/python" "$pip" install --quiet --disable-pip-version-check --no-input --no-compile $index \\
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
compiled here. The stamp says that all of it is on the disk; one that failed, of a full disk for example, is removed."""


def build_arguments(plan: InstallPlan, facts: DeviceFacts, incoming: str) -> list[str]:
    """Arguments of `BUILD`."""
    site = "--system-site-packages" if facts.picamera2 == "yes" else ""
    extras = f"[{','.join(plan.extras)}]" if plan.extras else ""
    how = "unpack" if all_sent(plan) else "offline" if plan.offline else "index"
    return [f"{plan.layout.opt}/{plan.environment(facts)}", facts.python, f"{incoming}/files", site, extras, how]


def all_sent(plan: InstallPlan) -> bool:
    """Whether exactly the wheels that the device needs are sent."""
    return plan.offline and plan.wheel_dir is None
