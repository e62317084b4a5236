"""Whether a device is healthy after a flash, and what of its camera and its broker works."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable

from eyas_device.updates.slots import SlotState
from eyas_host.fleet.connect.preflight import DeviceFacts
from eyas_host.fleet.connect.ssh import CommandResult
from eyas_host.fleet.deploy.plan import InstallPlan
from eyas_host.fleet.deploy.report import Report, doctor_report, service_report

SERVICE = "eyas-device"
START_S = 600
"""Time limit of a restart: the service is ready when its model is loaded and checked."""
_TIMED_OUT = 124
"""Exit code of `timeout` when the limit is exceeded."""


class Health:
    """Asks a device with an installed plan; `agent` and `script` run commands there, `slots` lists its slots."""

    def __init__(
        self,
        plan: InstallPlan,
        facts: DeviceFacts,
        *,
        agent: Callable[..., CommandResult],
        script: Callable[..., CommandResult],
        slots: Callable[[], list[SlotState]],
    ) -> None:
        self._plan, self._facts, self._serves = plan, facts, plan.serves(facts)
        self._agent, self._script, self._slots = agent, script, slots

    def problem(self, slot: SlotState | None, *, restart: bool) -> str:
        """Describe what is wrong with the device; empty if it is healthy.

        With a service: after a restart it must be ready, stay up, and run the model of the current slot; whether its
        camera delivers now is no matter. Without one: the bundle in the current slot must classify three synthetic
        frames.
        """
        if not self._serves:
            if slot is None:
                return "no verified slot"
            arguments = ("run", "--bundle", slot.path, "--camera", "fake:?frames=3", "--frames", "3")
            result = self._agent(*arguments, timeout_s=120)
            return f"three test frames were not classified: {result.last_line}" if result.code else ""
        active = f"systemctl is-active --quiet {SERVICE}"
        if restart or self._script(active).code:
            command = f"timeout {START_S} systemctl restart {SERVICE}"
            started = self._script(command, timeout_s=START_S + 60)
            if started.code == _TIMED_OUT:
                return f"not ready within {START_S} s; run eyas-device doctor there"
            if started.code:
                return f"the service does not start: {started.last_line}"
        count = f"systemctl show --property=NRestarts --value {SERVICE}"
        before = self._script(count).out
        time.sleep(self._plan.settle_s)
        if self._script(active).code or self._script(count).out != before:
            return f"the service does not stay up; see journalctl -u {SERVICE}"
        return self._wrong_model(slot)

    def report(self, slot: SlotState | None) -> Report:
        """Whether camera and broker work with the device's configuration; where no service runs, how to start it."""
        layout = self._plan.layout
        if self._serves:
            return service_report(self._agent, layout.state, f"on the device, as root: {self._program} doctor")
        configured = bool(self._facts.config or self._plan.config)
        seen = doctor_report(self._agent, layout.config) if configured else Report()
        why = "no systemd runs there, so no service"
        if layout.root != "/":
            why = f"no service is installed below {layout.root}"
        options = f"--bundle {shlex.quote(slot.path)} --camera SPEC" if slot is not None else ""
        options = f"--config {shlex.quote(layout.config)}" if configured else options
        return Report(seen.works, (*seen.warnings, f"{why}: start it by hand: {self._program} run {options}"))

    @property
    def _program(self) -> str:
        """The agent's command, to show."""
        if self._plan.wheel is None:
            return shlex.join([self._facts.python, "-m", "eyas_device"])
        return shlex.quote(f"{self._plan.layout.opt}/venv/bin/eyas-device")

    def _wrong_model(self, slot: SlotState | None) -> str:
        """Which other model than that of the current slot the service runs, and why; empty if it runs the right one."""
        if slot is None:
            return ""
        slots = self._slots()
        wanted = next((one for one in slots if one.slot == slot.slot), slot)
        running = next((one for one in slots if one.running), None)
        if running is not None and running.slot == wanted.slot:
            return ""
        actual = f"{running.name} {running.version}" if running is not None else "no model from a slot"
        reason = wanted.refused or f"see eyas-device slots, and model.bundle in {self._plan.layout.config}"
        return f"the service runs {actual} in place of {wanted.name} {wanted.version}: {reason}"
