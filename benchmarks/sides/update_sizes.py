"""What an update costs over the air, and what a repository costs its host and its devices."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from common import Figure
from eyas_device.config import UpdateSection
from eyas_device.updates.fetch import Staging
from eyas_device.updates.release import Channel, Variant, release_target
from eyas_device.updates.slots import Slots
from eyas_device.updates.trust import TrustedRepository
from eyas_host.fleet.updates.repository import Repository
from eyas_host.support.machine import cpu_pressure
from tests.support.publishing import blob_names, retrained, with_card, with_threshold, write_large_bundle
from tests.support.repositories import make_repository, served

MODEL = "tiny-shapes"
_DAY_S = 86_400.0
_SITES = 50
_MAX_WAITING = 10.0
"""Percent of a minute that processes may wait for a core where durations are measured."""


class _Device:
    """A device that follows a served repository and keeps its slots."""

    def __init__(self, folder: Path, repository: Repository, url: str, site: str = "hall-1") -> None:
        folder.mkdir(parents=True)
        (folder / "root.json").write_bytes(repository.root())
        self._section = UpdateSection(url=url, root=str(folder / "root.json"))
        self._site, self._state = site, folder / "state"
        self.slots = Slots(self._state)

    def poll(self) -> None:
        """One look, as far as it is the same for every device."""
        with TrustedRepository(self._section, self._site, self._state) as repository:
            repository.refresh()
            repository.policy()
            channel = repository.channel(MODEL)
            assert channel is not None
            repository.release(channel.target)

    def update(self, runtime: str = "litert") -> Variant:
        """Fetch and install what the channel wants."""
        with TrustedRepository(self._section, self._site, self._state) as repository:
            repository.refresh()
            channel = repository.channel(MODEL)
            assert channel is not None
            release, signed = repository.release(channel.target)
            variant = next(variant for variant in release.variants if runtime in variant.runtimes)
            have = (path for name in ("a", "b") for path in sorted((self.slots.folder / name).rglob("*")))
            bundle = Staging(self._state / "updates").assemble(variant, repository.fetcher, have)
            self.slots.install(bundle, release=signed)
        return variant


def over_the_air(scratch: Path) -> dict[str, Figure]:
    """Bytes that a device fetches for changes of a bundle of 10 MB, and the time of an installation."""
    first = write_large_bundle(scratch / "first")
    repository = make_repository(scratch / "fleet")
    changes: dict[str, Callable[[Path, Path], Path]] = {
        "card": lambda bundle, folder: with_card(bundle, folder, "1.1.0"),
        "threshold": lambda bundle, folder: with_threshold(bundle, folder, "1.2.0", 0.8),
        "retrained": lambda bundle, folder: retrained(bundle, folder, "2.0.0"),
    }
    shares, details = {}, {}
    with served(repository.folder) as (url, server):
        device = _Device(scratch / "device", repository, url)
        repository.publish(first, channel="stable")
        size = sum(file.size_bytes for file in device.update().files)
        current = first
        for name, change in changes.items():
            current = change(current, scratch / name)
            release = repository.publish(current, channel="stable")
            server.requested.clear()  # type: ignore[attr-defined]
            device.update()
            paths = [unquote(path.lstrip("/")) for path in server.requested]  # type: ignore[attr-defined]
            files = {path: (repository.folder / path) for path in paths}
            sizes = [(path, file.stat().st_size) for path, file in files.items() if file.is_file()]
            names = blob_names(release)
            blobs = {path: count for path, count in sizes if path.startswith("blobs/")}
            parts = [f"{names[path]} {count / 1e3:.1f}" for path, count in sorted(blobs.items(), key=lambda b: -b[1])]
            rest = sum(count for _, count in sizes) - sum(blobs.values())
            shares[name] = 100 * sum(count for _, count in sizes) / size
            details[name] = f"kB: {', '.join(parts)}, metadata and documents {rest / 1e3:.1f}"
        seconds, processor_s = _install_times(device.slots, [scratch / "card", scratch / "threshold"])
    note = f"of the {size / 1e6:.1f} MB that a device with LiteRT has"
    return {
        "changed_card_percent": Figure(
            value=shares["card"], unit="%", bound=3, better="lower", note=note, spread=details["card"]
        ),
        "changed_threshold_percent": Figure(
            value=shares["threshold"], unit="%", bound=3, better="lower", note=note, spread=details["threshold"]
        ),
        "retrained_int8_percent": Figure(
            value=shares["retrained"], unit="%", note=f"{note}; no weight is as it was", spread=details["retrained"]
        ),
        "install_s": _timed(
            float(np.median(seconds)),
            bound=1.0,
            spread=f"{min(seconds):.2f}..{max(seconds):.2f}",
            note="copy, sync, hashes, golden check and switch of 10 MB, programs loaded",
        ),
        "install_processor_s": Figure(
            value=processor_s, unit="s", note="the same, the processor's time alone: that does not depend on others"
        ),
    }


def _timed(value: float, *, bound: float | None = None, spread: str = "", note: str = "") -> Figure:
    """A duration in seconds, which is only known where other processes leave the processor alone."""
    waiting = float(next(word[6:] for word in cpu_pressure().split() if word.startswith("avg60=")))
    if waiting <= _MAX_WAITING:
        return Figure(value=value, unit="s", bound=bound, better="lower", spread=spread, note=note)
    note = f"{note}; other processes were using the machine"
    return Figure(value=None, unit="s", bound=bound, better="lower", note=note)


def _install_times(slots: Slots, bundles: list[Path]) -> tuple[list[float], float]:
    """Seconds of each installation, and the mean processor time of one."""
    seconds, began_s, times = [], time.process_time(), 6
    for number in range(times):
        began = time.perf_counter()
        slots.install(bundles[number % 2])
        seconds.append(time.perf_counter() - began)
    return seconds, (time.process_time() - began_s) / times


def large_fleet(scratch: Path, devices: int = 10_000, *, releases: int = 20, polls: int = 20) -> dict[str, Figure]:
    """What a repository for `devices` devices weighs, and what it costs one of them to follow it."""
    repository = make_repository(scratch / "fleet")
    bundle = write_large_bundle(scratch / "first", litert_mb=0.1)
    for number in range(releases):
        version = f"1.{number + 1}.0"
        repository.publish(with_card(bundle, scratch / version, version), channel="stable")
    for number in range(_SITES):
        own = with_card(bundle, scratch / f"site-{number}", f"3.{number}.0")
        repository.publish(own, channel="stable", site=f"hall-{number}")
    control = tuple(f"cam-{number:05}" for number in range(devices // 100))
    began = time.perf_counter()
    previous, target = release_target(MODEL, f"1.{releases - 1}.0"), release_target(MODEL, f"1.{releases}.0")
    wave = Channel(
        model=MODEL, target=target, previous=previous, rollout="r1", shares={"*": 0.1}, refresh=control, issued=1.0
    )
    repository.set_channel("stable", wave)
    wave_s = time.perf_counter() - began
    files = [path for path in repository.folder.rglob("*") if path.is_file()]
    blobs = [path for path in files if path.is_relative_to(repository.folder / "blobs")]
    with served(repository.folder) as (url, server):
        device = _Device(scratch / "device", repository, url, site="elsewhere")
        first, _ = _cost(server, repository, device, 1)
        quiet, cpu_ms = _cost(server, repository, device, polls)
        repository.renew(everything=True)
        renewed, _ = _cost(server, repository, device, 1)
    polls_a_day = _DAY_S / UpdateSection().poll_s
    size = sum(path.stat().st_size for path in files) - sum(path.stat().st_size for path in blobs)
    a_day = quiet * (polls_a_day - 1) + renewed
    note = f"{releases} releases for all, {_SITES} sites with one of their own, a control group of {len(control)}"
    return {
        "repository_mb": Figure(
            value=size / 1e6, unit="MB", note=f"metadata and documents, without blobs; {note}; old metadata included"
        ),
        "metadata_first_kb": Figure(value=first / 1e3, unit="kB", note="a device's first look"),
        "metadata_day_kb": Figure(
            value=a_day / 1e3,
            unit="kB",
            note=f"a device a day: {polls_a_day:.0f} looks, one of them after all was signed again",
            spread=f"{quiet / 1e3:.1f} kB if nothing changed, {renewed / 1e3:.1f} kB after a renewal",
        ),
        "fleet_day_gb": Figure(value=devices * a_day / 1e9, unit="GB", note=f"{devices:,} devices a day"),
        "poll_cpu_ms": Figure(
            value=cpu_ms, unit="ms", note="processor time of a look, one x86-64 core, programs loaded"
        ),
        "wave_s": _timed(wave_s, note="the host signs and writes a wave"),
    }


def _cost(server: object, repository: Repository, device: _Device, polls: int) -> tuple[float, float]:
    """Bytes of files that a look fetches, and its processor time in milliseconds, of this thread alone."""
    requested: list[str] = server.requested  # type: ignore[attr-defined]
    requested.clear()
    began = time.thread_time()
    for _ in range(polls):
        device.poll()
    spent = time.thread_time() - began
    files = [repository.folder / unquote(path.lstrip("/")) for path in requested]
    return sum(file.stat().st_size for file in files if file.is_file()) / polls, 1e3 * spent / polls
