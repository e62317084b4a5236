"""What of a bundle a device gets: the artefacts of the runtimes that it has, or that its configuration names."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec

from eyas_device.bundle import MANIFEST, Bundle, sha256
from eyas_device.config import ModelSection, read_config
from eyas_device.runtimes import RUNTIMES, artefact_runtime
from eyas_host.bundle.reduce import needed_artefacts, reduce_bundle, runtimes_of
from eyas_host.fleet.connect.preflight import DeviceFacts
from eyas_host.fleet.connect.ssh import FleetError
from eyas_host.fleet.deploy.plan import InstallPlan

DEFAULT = ("litert",)
"""What the wheel of eyas-device brings with it."""
_EXTRAS = ("openvino", "onnx", "tflite")
"""Runtimes that an extra of eyas-device installs."""


class Choice(msgspec.Struct, frozen=True):
    """Runtimes that a device gets, and why."""

    runtimes: tuple[str, ...] | None
    """None: whatever the bundle has."""
    why: str
    artefact: str = ""
    """Artefact that the configuration names."""


class Sending:
    """The bundle and its reduced copies, each made once for all devices; thread-safe."""

    def __init__(self, root: Path, folder: Path, asked: Sequence[str] = ()) -> None:
        self._bundle = Bundle.open(root)
        self._folder = folder
        self._asked = runtimes_of(asked) if asked else ()
        if self._asked:
            needed_artefacts(self._bundle, self._asked)  # an error of all devices, before any is touched
        self._lock = threading.Lock()
        self._made: dict[tuple[str, ...], Path] = {}

    def for_device(self, plan: InstallPlan, facts: DeviceFacts) -> tuple[InstallPlan, str]:
        """The plan with what this device gets of the bundle, and a line that says what and why.

        Raises `BundleError` if the bundle has nothing for a runtime that was asked for.
        """
        choice = self._choice(plan, facts)
        if choice.runtimes is None:
            return plan, f"all {len(self._bundle.manifest.artefacts)} artefacts ({choice.why})"
        kept = needed_artefacts(self._bundle, choice.runtimes, choice.artefact)
        names = tuple(artefact.name for artefact in kept)
        with self._lock:
            if names not in self._made:
                self._made[names] = reduce_bundle(self._bundle, self._folder / "-".join(names), kept)
            root = self._made[names]
        reduced = msgspec.structs.replace(
            plan,
            bundle=root,
            manifest_sha256=sha256(root / MANIFEST),
            bundle_bytes=sum(path.stat().st_size for path in root.rglob("*") if path.is_file()),
            extras=() if plan.python else (*(name for name in choice.runtimes if name in _EXTRAS), *_outputs(plan)),
        )
        return reduced, f"{', '.join(names)} ({choice.why})"

    def _choice(self, plan: InstallPlan, facts: DeviceFacts) -> Choice:
        if self._asked is None:
            return Choice(None, "--runtime all")
        if plan.config is None:
            where, model = plan.layout.config, ModelSection(runtime=facts.model_runtime, artefact=facts.model_artefact)
        else:
            where, model = str(plan.config), read_config(plan.config).model
        artefacts = {artefact.name: artefact.runtime for artefact in self._bundle.manifest.artefacts}
        if self._asked:
            if model.runtime and model.runtime not in self._asked:
                raise FleetError(f"--runtime {', '.join(self._asked)}: [model] runtime is {model.runtime} in {where}")
            return Choice(self._asked, "--runtime", model.artefact)
        if model.runtime in RUNTIMES:
            return Choice((model.runtime,), "[model] runtime", model.artefact)
        if model.artefact in artefacts:
            return Choice((artefacts[model.artefact],), "[model] artefact", model.artefact)
        there = DEFAULT if plan.python is None else facts.runtimes.split()
        why = "installed with eyas-device" if plan.python is None else f"installed for {plan.python}"
        found = self._available(there)
        return Choice(found, why, model.artefact) if found else Choice(None, "no runtime of its artefacts was found")

    def _available(self, runtimes: Sequence[str]) -> tuple[str, ...]:
        """Those for which the bundle has an artefact, one for each kind of artefact."""
        here = self._bundle.runtimes()
        return tuple({artefact_runtime(r): r for r in reversed(runtimes) if artefact_runtime(r) in here}.values())


def _outputs(plan: InstallPlan) -> tuple[str, ...]:
    """Extras for the outputs of a configuration that is brought."""
    outputs = () if plan.config is None else read_config(plan.config).output
    return ("gpio",) if any(output.kind == "gpio" for output in outputs) else ()
