"""The first flash: from a machine with ssh to a device that answers, or that stays as it was.

Look first, change nothing that is in use until the new thing is proven beside it, switch atomically, watch, and go back
if it does not stay up. Doing it again changes nothing, and says so.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import msgspec

from eyas_device.agent.systemd import UNIT
from eyas_device.bundle import MANIFEST, Bundle, sha256
from eyas_device.config import EXAMPLE, read_config
from eyas_device.errors import ConfigError, EyasError
from eyas_host.fleet.connect.preflight import Facts, Layout, faults, look, warnings
from eyas_host.fleet.connect.ssh import Access, FleetError, Remote, Target
from eyas_host.fleet.connect.wheels import build_wheel
from eyas_host.fleet.deploy.device import Device, Plan
from eyas_host.support.progress import say as say_here

_AT_ONCE = 8


class Outcome(msgspec.Struct, frozen=True):
    """How it went on one device."""

    target: str
    status: Literal["flashed", "unchanged", "planned", "rolled back", "failed"]
    words: str
    """What was done, or why not, in one line."""
    seconds: float = 0.0
    sent_bytes: int = 0

    @property
    def ok(self) -> bool:
        """Whether the device has, or would get, what was asked for."""
        return self.status in ("flashed", "unchanged", "planned")


def flash(
    targets: Sequence[str],
    bundle: Path,
    *,
    config: Path | None = None,
    wheel_dir: Path | None = None,
    offline: bool = False,
    python: str | None = None,
    root: str = "/",
    service: bool | None = None,
    unit: Path | None = None,
    dry_run: bool = False,
    access: Access | None = None,
    settle_s: float = 5.0,
    say: Callable[[str], None] = say_here,
) -> list[Outcome]:
    """Bring `bundle` and everything that runs it to each of `targets` (`user@host[:port]`); an outcome for each.

    `config` replaces the device's configuration; without it, what is there stays. `wheel_dir` holds wheels to use;
    `offline`: the device fetches nothing by itself. `python`: an interpreter on the device that has eyas already, so
    that no environment is made. `root`: everything lies below this remote folder, and no service is installed unless
    `service` says so. `dry_run` looks at the devices and changes nothing.

    Raises `FleetError`, `BundleError` or `ConfigError` for a mistake that concerns all of them, before any is touched.
    """
    parsed = list(dict.fromkeys(Target.parse(text) for text in targets))
    if not parsed or not root.startswith("/") or (python is not None and not python.startswith("/")):
        raise FleetError("a device is needed, and absolute paths for --root and --python")
    if wheel_dir is not None and not wheel_dir.is_dir():
        raise FleetError(f"{wheel_dir}: no folder of wheels")
    manifest = Bundle.open(bundle).manifest
    layout = Layout(root)
    if config is not None and read_config(config).device.state != layout.state and root == "/":
        raise ConfigError(f"{config}: [device] state must be {layout.state}, where the service may write")
    if unit is None and service is not False and (service or root == "/"):
        unit = UNIT
    if unit is not None and not unit.is_file():
        raise FleetError(f"{unit}: there is no such unit file")
    with tempfile.TemporaryDirectory(prefix="eyas-flash-") as folder:
        plan = Plan(
            bundle=bundle,
            model=f"{manifest.name} {manifest.version}",
            manifest_sha256=sha256(bundle / MANIFEST),
            bundle_bytes=sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()),
            layout=layout,
            config=config,
            wheel=None if python is not None else build_wheel(Path(folder), wheel_dir),
            wheel_dir=wheel_dir,
            offline=offline,
            python=python,
            unit=unit,
            service=service,
            settle_s=settle_s,
        )

        def one(target: Target) -> Outcome:
            started = time.monotonic()
            try:
                with Remote(target, access or Access()) as remote:
                    outcome = _dry(remote, plan, say) if dry_run else _flash(remote, plan, say)
            except EyasError as error:
                told = str(error).removeprefix(f"{target}: ")
                outcome = Outcome(str(target), "failed", " ".join(told.split()))
            return msgspec.structs.replace(outcome, seconds=time.monotonic() - started)

        with ThreadPoolExecutor(min(_AT_ONCE, len(parsed))) as pool:
            return list(pool.map(one, parsed))


def _fit(remote: Remote, plan: Plan, say: Callable[[str], None]) -> Facts:
    """Look at the device. Raises `FleetError` with everything that has to be fixed there first."""
    facts = look(remote, plan.layout, plan.python)
    made = bool(facts.python) and plan.environment(facts) not in (*facts.environments, "")
    found = faults(facts, plan.layout, bundle_bytes=plan.bundle_bytes, environment=made, service=plan.serves(facts))
    if plan.serves(facts) and plan.config is None and facts.config != "yes":
        found.append(f"{plan.layout.config}: not there yet; --config FILE brings one ({EXAMPLE} explains the keys)")
    if found:
        raise FleetError(f"{remote.target}: {'; '.join(found)}")
    for warning in warnings(facts):
        say(f"{remote.target}: warning: {warning}")
    return facts


def _flash(remote: Remote, plan: Plan, say: Callable[[str], None]) -> Outcome:
    target = str(remote.target)
    facts = _fit(remote, plan, say)
    say(f"{target}: {facts.os}, {facts.machine}, Python {facts.python_version}, {facts.profile}")
    device = Device(remote, facts, plan, say)
    done = False
    try:
        with tempfile.TemporaryDirectory(prefix="eyas-files-") as folder:
            device.prepare(Path(folder))
        device.make_environment()
        changed = ["model"] if device.install(prove=device.changes_environment) else []
        changed += ["the rest of an interrupted flash"] if facts.unfinished else []
        fault = _settle(device, changed)
        if fault and device.can_roll_back:
            say(f"{target}: {fault}; going back")
            after = _go_back(device)
            done = not after
            words = f"{fault}; it is as it was before" + (f", and not well: {after}" if after else "")
            return Outcome(target, "rolled back", words, sent_bytes=device.sent_bytes)
        if fault:
            return Outcome(target, "failed", f"{fault}; nothing to go back to", sent_bytes=device.sent_bytes)
        done = True
        slot = f"{plan.model} in slot {device.slot.slot if device.slot else '-'}"
        if not changed:
            return Outcome(target, "unchanged", f"{slot}; nothing to do", sent_bytes=device.sent_bytes)
        return Outcome(target, "flashed", f"{slot}; new: {', '.join(changed)}", sent_bytes=device.sent_bytes)
    finally:
        device.tidy(done=done)


def _go_back(device: Device) -> str:
    """Roll back; what is wrong then, empty if all is well."""
    try:
        return device.roll_back()
    except FleetError as error:
        return str(error).removeprefix(f"{device.remote.target}: ")


def _settle(device: Device, changed: list[str]) -> str:
    """Switch everything but the model, add what changed to `changed`, and look how it goes; what is wrong then.

    A refusal on the way is a fault as well: the model may be new by now, so that the device has to go back.
    """
    try:
        for name, put in (
            ("environment", device.use_environment),
            ("configuration", device.put_config),
            ("service", device.put_unit),
        ):
            changed += [name] if put() else []
        with device.step("health"):
            return device.health(restart=bool(changed))
    except FleetError as error:
        return str(error).removeprefix(f"{device.remote.target}: ")


def _dry(remote: Remote, plan: Plan, say: Callable[[str], None]) -> Outcome:
    """What `_flash` would do, from what can be seen without changing anything."""
    facts = _fit(remote, plan, say)
    environment = plan.environment(facts)
    steps = []
    if environment and environment not in facts.environments:
        how = "wheels from here" if plan.offline else "wheels from the device's index"
        steps.append(f"make {plan.layout.opt}/{environment} ({facts.profile}, {how})")
    if environment and environment != facts.venv_link:
        steps.append("switch to that environment")
    if plan.config is not None:
        steps.append(f"write {plan.layout.config} if it differs")
    if facts.slot_sha256 != plan.manifest_sha256:
        steps.append(f"send {plan.model} ({plan.bundle_bytes / 1e6:.1f} MB at most), check it and switch to it")
    if plan.serves(facts):
        steps.append(f"write {plan.layout.unit} if it differs and start the service")
    for step in steps:
        say(f"{remote.target}: would {step}")
    return Outcome(str(remote.target), "planned", "; ".join(steps) or f"{plan.model} is there; nothing to do")
