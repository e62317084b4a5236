"""The first flash: from a machine with SSH to a device that runs the bundle, or that stays as it was.

Inspect first, verify the new parts beside those in use, switch atomically, watch, and roll back if the service does not
stay up. Flashing the same bundle again changes nothing.
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
from eyas_device.errors import EyasError
from eyas_device.support.redact import redact
from eyas_host.fleet.connect.preflight import (
    DeviceFacts,
    Layout,
    closed_python,
    inspect_device,
    missing_files,
    problems,
    warnings,
)
from eyas_host.fleet.connect.ssh import FleetError, Remote, SshAccess, Target
from eyas_host.fleet.connect.wheels import build_wheel
from eyas_host.fleet.deploy.credentials import device_files
from eyas_host.fleet.deploy.installer import Installer
from eyas_host.fleet.deploy.plan import InstallPlan
from eyas_host.fleet.deploy.sending import Sending
from eyas_host.support.progress import say as print_line


class FlashSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What to install beside the bundle, and how."""

    config: Path | None = None
    """Replaces the device's configuration; None keeps it, or brings that of `name`."""
    name: str | None = None
    """Name of an enrolled device, whose credentials and configuration are brought."""
    kit: Path = Path("fleet")
    """Folder of `eyas broker`, in which it was enrolled."""
    wheel_dir: Path | None = None
    """Folder of wheels to install from; with `offline` it has all that the device needs."""
    offline: bool = False
    """Whether the device has no network: its wheels are resolved and downloaded here."""
    python: str | None = None
    """Interpreter on the device that has eyas already; no environment is built then."""
    root: str = "/"
    """Folder of the device below which everything is installed; without a service unless it is `/`."""
    service: bool | None = None
    """Whether to install the service; None: where systemd runs and `root` is `/`."""
    unit: Path | None = None
    """Unit file of the service; the agent's own by default."""
    runtimes: tuple[str, ...] = ()
    """Runtimes whose artefacts are sent, `all` for all; by default that of the device's configuration, else what its
    environment has."""
    dry_run: bool = False
    """Inspect the devices and change nothing."""
    parallel: int = 8
    """Devices that are flashed at the same time."""
    settle_s: float = 5.0
    """How long a started service has to stay up, seconds."""


class FlashResult(msgspec.Struct, frozen=True):
    """Result of a flash on one device."""

    target: str
    status: Literal["flashed", "unchanged", "planned", "rolled back", "failed"]
    detail: str
    """What was done, or why not, in one line."""
    seconds: float = 0.0
    sent_bytes: int = 0
    """All that went over the wire."""
    dependency_bytes: int = 0
    """Size of the wheels among it that eyas-device depends on."""
    warnings: tuple[str, ...] = ()
    """What does not work although the bundle is installed, such as a camera that does not deliver."""

    @property
    def ok(self) -> bool:
        """Whether the device has, or would get, what was requested."""
        return self.status in ("flashed", "unchanged", "planned")


def flash(
    targets: Sequence[str],
    bundle: Path,
    settings: FlashSettings | None = None,
    *,
    access: SshAccess | None = None,
    say: Callable[[str], None] = print_line,
) -> list[FlashResult]:
    """Install `bundle` and everything that runs it on devices, several at once.

    Args:
        targets: Devices, each `user@host[:port]`.
        bundle: Folder of the bundle.
        settings: What else to install, and how.
        access: How to log in.
        say: Receives a line for each step.

    Returns:
        A result for each device.

    Raises:
        FleetError, BundleError, ConfigError: a mistake that concerns all devices; none was touched.

    """
    parsed = list(dict.fromkeys(Target.parse(text) for text in targets))
    if not parsed:
        raise FleetError("no device given; user@host or user@host:port is needed")
    if settings is not None and settings.name is not None and len(parsed) > 1:
        raise FleetError(f"--name {settings.name} is one device, but {len(parsed)} are given; flash each with its own")
    with tempfile.TemporaryDirectory(prefix="eyas-flash-") as folder:
        settings = settings or FlashSettings()
        plan = _plan(bundle, settings, Path(folder))
        sending = Sending(bundle, Path(folder), settings.runtimes)

        def flash_one(target: Target) -> FlashResult:
            started = time.monotonic()
            try:
                with Remote(target, access or SshAccess()) as remote:
                    result = (_dry_run if settings.dry_run else _flash)(remote, plan, sending, say)
            except EyasError as error:
                reason = error.reason if isinstance(error, FleetError) else str(error)
                result = FlashResult(str(target), "failed", " ".join(reason.split()))
            # An older agent's output on the device may quote its camera's address with the password.
            shown = {"detail": redact(result.detail), "warnings": tuple(map(redact, result.warnings))}
            return msgspec.structs.replace(result, **shown, seconds=time.monotonic() - started)

        with ThreadPoolExecutor(max(1, min(settings.parallel, len(parsed)))) as pool:
            return list(pool.map(flash_one, parsed))


def _plan(bundle: Path, settings: FlashSettings, folder: Path) -> InstallPlan:
    """Check the settings and build the wheel into `folder`."""
    for option, path in (("--root", settings.root), ("--python", settings.python or "/")):
        if not path.startswith("/"):
            raise FleetError(f"{option} {path}: an absolute path is needed")
    if settings.wheel_dir is not None and not settings.wheel_dir.is_dir():
        raise FleetError(f"{settings.wheel_dir}: no such folder; --wheel-dir needs a folder of wheels")
    manifest = Bundle.open(bundle).manifest
    layout, unit = Layout(settings.root), settings.unit
    files = device_files(settings.config, settings.name, settings.kit, layout, folder)
    if settings.python is not None and files.config is not None and read_config(files.config).update.agent:
        raise FleetError(f"{files.config}: [update] agent: --python's environment cannot be exchanged; leave it out")
    if unit is None and settings.service is not False and (settings.service or settings.root == "/"):
        unit = UNIT
    if unit is not None and not unit.is_file():
        raise FleetError(f"{unit}: no such unit file")
    return InstallPlan(
        bundle=bundle,
        model=f"{manifest.name} {manifest.version}",
        manifest_sha256=sha256(bundle / MANIFEST),
        whole_sha256=sha256(bundle / MANIFEST),
        bundle_bytes=sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()),
        layout=layout,
        config=files.config,
        credentials=files.credentials,
        needed=files.needed,
        wheel=None if settings.python is not None else build_wheel(folder, settings.wheel_dir),
        wheel_dir=settings.wheel_dir,
        offline=settings.offline,
        python=settings.python,
        unit=unit,
        service=settings.service,
        settle_s=settings.settle_s,
    )


def _preflight(
    remote: Remote, plan: InstallPlan, sending: Sending, say: Callable[[str], None]
) -> tuple[DeviceFacts, InstallPlan, str]:
    """Inspect the device; returns what it is, the plan for it, and what it gets of the bundle.

    Raises `FleetError` with everything that has to be fixed there first.
    """
    facts = inspect_device(remote, plan.layout, plan.python)
    plan, parts = sending.for_device(plan, facts)
    builds = bool(facts.python) and plan.environment(facts) not in (*facts.environments, "")
    serves = plan.serves(facts)
    blockers = problems(facts, plan.layout, bundle_bytes=plan.bundle_bytes, environment=builds, service=serves)
    if serves and plan.config is None and facts.config != "yes":
        blockers.append(
            f"{plan.layout.config}: missing; bring that of an enrolled device with --name NAME, or install one with "
            f"--config FILE ({EXAMPLE} explains the keys)"
        )
    if serves and (closed := closed_python(facts, plan.unit_user())):
        blockers.append(closed)
    if missing := missing_files(remote, facts, plan.layout, plan.needed, service=serves):
        blockers.append(missing)
    if blockers:
        raise FleetError("; ".join(blockers), remote.target)
    for warning in warnings(facts):
        say(f"{remote.target}: warning: {warning}")
    return facts, plan, parts


def _flash(remote: Remote, plan: InstallPlan, sending: Sending, say: Callable[[str], None]) -> FlashResult:
    target = str(remote.target)
    facts, plan, parts = _preflight(remote, plan, sending, say)
    say(f"{target}: {facts.os}, {facts.machine}, Python {facts.python_version}, {facts.profile}")
    say(f"{target}: of the bundle it gets {parts}")
    installer = Installer(remote, facts, plan, say)
    if (seen := installer.see_unchanged()) is not None:
        for line in seen.works:
            say(f"{target}: {line}")
        return FlashResult(target, "unchanged", f"{plan.model} in slot {facts.slot}; nothing to do")
    finished = False

    def result(status: Literal["flashed", "unchanged", "rolled back", "failed"], detail: str) -> FlashResult:
        sent, wheels = installer.sent_bytes, installer.dependency_bytes
        return FlashResult(target, status, detail, sent_bytes=sent, dependency_bytes=wheels)

    try:
        with tempfile.TemporaryDirectory(prefix="eyas-files-") as folder:
            installer.prepare(Path(folder))
        installer.make_environment()
        changed = ["model"] if installer.install(verify=installer.changes_environment) else []
        changed += ["the rest of an interrupted flash"] if facts.unfinished else []
        problem = _switch(installer, changed)
        if problem and installer.can_roll_back:
            say(f"{target}: {problem}; rolling back")
            try:
                remaining = installer.roll_back()
            except FleetError as error:
                return result("failed", f"{problem}; {error.reason}")
            finished = not remaining
            state = f"rolled back, but not healthy: {remaining}" if remaining else "rolled back"
            return result("rolled back", f"{problem}; {state}")
        if problem:
            return result("failed", f"{problem}; nothing to roll back to")
        finished = True
        if "environment" in changed:
            installer.restart_instances()
        if changed:
            installer.restart_updater()
        slot = f"{plan.model} in slot {installer.slot.slot if installer.slot else '-'}"
        with installer.step("camera and broker"):
            report = installer.report()
        for line in report.works:
            say(f"{target}: {line}")
        done = result("flashed", f"{slot}; new: {', '.join(changed)}")
        if not changed:
            done = result("unchanged", f"{slot}; nothing to do")
        return msgspec.structs.replace(done, warnings=report.warnings)
    finally:
        installer.clean_up(finished=finished)


def _switch(installer: Installer, changed: list[str]) -> str:
    """Switch everything but the model, append what changed to `changed`, and return what is wrong then.

    An error on the way counts as a problem, not an exception: the model may be new by now and has to be rolled back.
    """
    try:
        for name, switch in (
            ("environment", installer.use_environment),
            ("credentials", installer.put_credentials),
            ("configuration", installer.put_config),
            ("service", installer.put_unit),
        ):
            changed += [name] if switch() else []
        with installer.step("health"):
            return installer.health_problem(restart=bool(changed))
    except FleetError as error:
        return error.reason


def _dry_run(remote: Remote, plan: InstallPlan, sending: Sending, say: Callable[[str], None]) -> FlashResult:
    """List what `_flash` would do, as far as can be seen without changing anything."""
    facts, plan, parts = _preflight(remote, plan, sending, say)
    environment = plan.environment(facts)
    steps = []
    if environment and environment not in facts.environments:
        source = "wheels sent from here" if plan.offline else "wheels from the device's package index"
        steps.append(f"make {plan.layout.opt}/{environment} ({facts.profile}, {source})")
    if environment and environment != facts.venv_link:
        steps.append("switch to that environment")
    if plan.config is not None:
        steps.append(f"write {plan.layout.config} if it differs")
    if plan.credentials is not None:
        steps.append(f"write {plan.layout.credentials} if they differ")
    if facts.slot_sha256 not in plan.accepted:
        size = f"at most {plan.bundle_bytes / 1e6:.1f} MB"
        steps.append(f"send {plan.model}, {parts}, {size}, verify it and switch to it")
    if plan.serves(facts):
        agent = plan.layout.agent_units if plan.exchanges_agent(facts) else ()
        units = ", ".join((plan.layout.unit, plan.layout.updater, *agent))
        steps.append(f"write {units} if they differ and start the service")
    for step in steps:
        say(f"{remote.target}: would {step}")
    return FlashResult(str(remote.target), "planned", "; ".join(steps) or f"{plan.model} is installed; nothing to do")
