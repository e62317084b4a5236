"""A device that has all that a flash would bring and runs it: found out by one more command, without the agent's start.

Starting the agent's program takes seconds on a small board, and a service that has run for a while needs no watching.
Whatever is not as it should be is left to the steps of a whole flash, which say what.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from eyas_device.bundle import MANIFEST, read_manifest
from eyas_device.telemetry.local import SOCKET, AgentStatus
from eyas_device.updates.records import RUN
from eyas_host.fleet.connect.preflight import DeviceFacts
from eyas_host.fleet.connect.ssh import CommandResult
from eyas_host.fleet.deploy.health import SERVICE
from eyas_host.fleet.deploy.plan import InstallPlan
from eyas_host.fleet.deploy.report import Report, judge_status

_ASK = """
cd "$1"
printf '%s\\n' "$2" | sha256sum --status --check - && echo files=same
systemctl show --property=ActiveState,UnitFileState,ActiveEnterTimestampMonotonic "$3"
echo "uptime=$(cut -d ' ' -f 1 /proc/uptime)"
cd "$4"
"$5" -c '
import glob, socket, sys
with socket.socket(socket.AF_UNIX) as agent:
    agent.settimeout(5)
    agent.connect((glob.glob(sys.argv[2]) + sys.argv[1:])[0])
    print("status=" + agent.makefile(encoding="utf-8").readline().strip())' "$6" "$7"
"""


def see_unchanged(plan: InstallPlan, facts: DeviceFacts, script: Callable[..., CommandResult]) -> Report | None:
    """What the agent says of camera and broker, if it runs the planned bundle from intact files; None if not.

    `script` runs a shell script on the device. The caller has compared environment, configuration, credentials and
    unit.
    """
    if not plan.serves(facts) or facts.slot_sha256 not in plan.accepted:
        return None
    state = plan.layout.state
    arguments = (f"{state}/slots/{facts.slot}", _hashes(plan.bundle, facts.slot_sha256), SERVICE, state)
    result = script(_ASK, *arguments, facts.python, SOCKET, f"{RUN}/eyas/*/{SOCKET}")
    said = dict(line.split("=", 1) for line in result.out.splitlines() if "=" in line)
    if result.code or said.get("files") != "same" or not _stays_up(said, plan.settle_s):
        return None
    try:
        status = msgspec.json.decode(said.get("status", ""), type=AgentStatus)
    except msgspec.DecodeError:
        return None
    if status.model.slot != facts.slot or status.model.problem or status.model.refused:
        return None
    works, troubles = judge_status(status)
    return None if troubles else Report(works)


def _hashes(bundle: Path, manifest_sha256: str) -> str:
    """The files that the device must have, as `sha256sum` reads them; its manifest may be the whole bundle's."""
    files = {file.path: file.sha256 for file in read_manifest(bundle).files()} | {MANIFEST: manifest_sha256}
    return "\n".join(f"{digest}  {path}" for path, digest in files.items())


def _stays_up(said: dict[str, str], settle_s: float) -> bool:
    """Whether the service is enabled, and active for as long as a started one is watched."""
    try:
        up = float(said["uptime"]) - int(said["ActiveEnterTimestampMonotonic"]) / 1e6
    except (KeyError, ValueError):
        return False
    return (said.get("ActiveState"), said.get("UnitFileState")) == ("active", "enabled") and up >= settle_s
