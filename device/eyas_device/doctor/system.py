"""Checks of the machine: clock, disk, temperature, processor, memory, limits and service."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
import tempfile
from datetime import datetime, timezone
from pathlib import Path

from eyas_device.board import Throttle, read_pressure, read_vitals
from eyas_device.board.limits import usable_cores, usable_memory
from eyas_device.config import SERVICE_USER, STATE, instance_of
from eyas_device.doctor.finding import Context, Finding, green, grey, red, yellow
from eyas_device.support.clock import is_plausible
from eyas_device.support.packages import program_path
from eyas_device.telemetry.local import ask
from eyas_device.updates.records import read_agent

UNIT = "eyas-device.service"
TEMPLATE = "eyas-device@.service"
_DAY_S = 86400.0
_MB = 1e6
DISK_MB = (100.0, 500.0)
"""Free space: below the first red, below the second yellow. An update needs a second bundle, the spool some space."""
MEMORY_MB = (64.0, 200.0)
"""Available memory: below the first red, below the second yellow. The agent with LiteRT and OpenCV takes 150 MB."""
HOT_C = (85.0, 75.0)
"""From the first on red, from the second on yellow: a Raspberry Pi throttles from 80 °C, more at 85 °C."""
PRESSURE = 40.0
"""Percentage of the last minute in which a process waited for a core."""
DESCRIPTORS = 256
_COMMAND_S = 5.0
_UNSYNC = 0x40  # STA_UNSYNC of adjtimex(2)
_TIME_ERROR = 5


def clock(context: Context) -> Finding:
    """Check that the clock is plausible and synchronised."""
    now = context.now()
    date = _date(now)
    fix = "set it: timedatectl set-ntp true; in a closed network, set a time server in timesyncd.conf"
    if not is_plausible(now):
        return red(f"{date}: impossible; telemetry and certificates need the date", fix)
    installed_at = Path(__file__).stat().st_mtime
    if now < installed_at - _DAY_S:
        return yellow(f"{date}: before the agent was installed ({_date(installed_at)})", fix)
    if (context.root / "run/systemd/timesync/synchronized").exists() or is_kernel_clock_synchronised():
        return green(f"{date}, synchronised")
    answer = (context.run(["timedatectl", "show", "--property=NTPSynchronized", "--value"], _COMMAND_S) or "").strip()
    if answer == "yes":
        return green(f"{date}, synchronised")
    if not answer and _ask_kernel()[0] < 0:  # the service's sandbox forbids the question
        return grey(f"{date}; whether it is synchronised cannot be seen from here", "run the doctor in a shell")
    return yellow(f"{date}, not synchronised", fix)


def disk(context: Context) -> Finding:
    """Check that the state folder is writable and has free space."""
    folder = _existing(context.state)
    missing = "" if folder == context.state else f" (the folder does not exist yet; space in {folder})"
    free = _free(context, folder)
    text = f"{context.state}: {free:.0f} MB free{missing}"
    fix = "free some space: journalctl --vacuum-size=50M, apt-get clean"
    if free < DISK_MB[0]:
        return red(text, fix)
    if not missing and (error := _write_error(context.state)) is not None:
        if error.errno in (errno.EACCES, errno.EPERM):
            if context.judge is not None and context.judge.is_service:
                return red(f"{text}, closed to {SERVICE_USER}", f"chown -R {SERVICE_USER}: {context.state}")
            return yellow(f"{text}, not writable for this user", "sudo eyas-device doctor")
        return red(f"{text}, cannot be written: {error.strerror}", "a read-only card is often a dying one: replace it")
    if free < DISK_MB[1]:
        return yellow(text, fix)
    return green(text)


def inodes(context: Context) -> Finding:
    """Check that the state folder's file system can hold more files."""
    filesystem = context.statvfs(_existing(context.state))
    if filesystem.f_files == 0:
        return green("no limit on this file system")
    percent = 100 * filesystem.f_favail / filesystem.f_files
    text = f"{filesystem.f_favail} free ({percent:.0f} %)"
    fix = "many small files fill the file system: find / -xdev -type d -size +1M"
    if filesystem.f_favail < 1000:
        return red(text, fix)
    return yellow(text, fix) if percent < 5 else green(text)


def temperature(context: Context) -> Finding:
    """Check that the processor is not too hot and has not been throttled."""
    vitals = read_vitals(context.root, run=context.run)
    celsius = vitals.temperature_c or max(vitals.temperatures_c.values(), default=None)
    throttle = vitals.throttle or Throttle()
    before = [cause for cause in throttle.since_boot if cause not in throttle.now]
    parts = [] if celsius is None else [f"{celsius:.0f} °C"]
    parts += [f"now {', '.join(throttle.now)}"] * bool(throttle.now)
    parts += [f"since boot {', '.join(before)}"] * bool(before)
    if not parts:
        return grey("no sensor")
    undervoltage = "under-voltage" in (*throttle.now, *before)
    fix = "a stronger power supply" if undervoltage else "a heat sink, a fan or a lower loop.duty"
    if (celsius or 0) >= HOT_C[0] or throttle.now:
        return red("; ".join(parts), fix)
    return yellow("; ".join(parts), fix) if (celsius or 0) >= HOT_C[1] or before else green("; ".join(parts))


def processor(context: Context) -> Finding:
    """Check that other processes leave the processor to the agent."""
    cores, pressure = usable_cores(context.root), read_pressure(context.root)
    if pressure is None:
        return grey(f"{cores} usable cores; the kernel does not report CPU pressure", "boot with psi=1")
    text = f"{cores} usable cores, pressure {pressure.avg60:.0f} % of the last minute"
    if context.config.model.threads > cores:
        return yellow(f"{text}; {context.config.model.threads} inference threads", f"[model] threads = {cores}")
    return green(text) if pressure.avg60 < PRESSURE else yellow(text, "see what else runs: top")


def memory(context: Context) -> Finding:
    """Check that there is memory for the model."""
    lines = (context.read("proc/meminfo") or "").splitlines()
    match = next(
        (re.fullmatch(r"MemAvailable:\s+(\d{1,15}) kB", line, re.ASCII) for line in lines if "Avail" in line), None
    )
    if match is None:
        return grey("the kernel does not report it")
    available = usable_memory(context.root) / _MB
    text, fix = f"{available:.0f} MB available", "see what else runs, or use a smaller model"
    if available < MEMORY_MB[0]:
        return red(text, fix)
    return yellow(text, fix) if available < MEMORY_MB[1] else green(text)


def descriptors(context: Context) -> Finding:
    """Check that the process may open enough files."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    unlimited = limit == resource.RLIM_INFINITY
    text = f"{'any number of' if unlimited else limit} open files"
    return green(text) if unlimited or limit >= DESCRIPTORS else yellow(text, f"ulimit -n {DESCRIPTORS} or more")


def agent(context: Context) -> Finding:
    """Check what the running agent says of itself."""
    if read_agent(context.state) is None:
        return grey(f"none runs with {context.state}")
    status = ask(context.state)
    model = f"{status.model.name or 'no model'}, {status.recent.fps:.1f} fps, up {status.uptime_s / 3600:.1f} h"
    if status.healthy:
        return green(model)
    return yellow(f"{model}: {'; '.join(status.problems)}", "eyas-device status shows more")


def service(context: Context) -> Finding:
    """Check that the service is installed, running and enabled."""
    if not (context.root / "run/systemd/system").is_dir():
        return grey("systemd is not running")
    unit = _unit(context)
    names = ("LoadState", "ActiveState", "SubState", "UnitFileState", "NRestarts", "ReadWritePaths")
    output = context.run(["systemctl", "show", unit, *(f"--property={name}" for name in names)], _COMMAND_S)
    if output is None:
        return yellow("systemctl fails", "see `systemctl status`")
    state = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)
    if state.get("LoadState") != "loaded":
        instance = instance_of(context.config_path)
        name = f" --name {instance}" if instance else ""
        text, fix = f"{unit} is not installed", f"sudo {program_path()} service install{name}"
        return yellow(text, fix) if context.config_path is None else red(text, fix)
    folder = context.config.device.state
    if not _may_write(folder, state.get("ReadWritePaths", "")):
        text = f"the hardened service may not write to device.state, {folder}"
        return red(text, f"systemctl edit {unit}: [Service] and ReadWritePaths={folder}; the user eyas must own it")
    active, enabled = state.get("ActiveState", ""), state.get("UnitFileState", "")
    text = f"{active} ({state.get('SubState', '')}), {enabled or 'not enabled'}, {state.get('NRestarts', '0')} restarts"
    if active == "activating":
        return yellow(
            f"{text}: no frame has been classified yet", f"journalctl -u {unit} -n 20 shows what it waits for"
        )
    if active != "active":
        return red(text, f"systemctl start {unit}; journalctl -u {unit} -n 20 shows why it stopped")
    if enabled != "enabled":
        return yellow(f"{text}: it will not start at boot", f"systemctl enable {unit}")
    return green(text)


def _unit(context: Context) -> str:
    """The service of this configuration."""
    instance = instance_of(context.config_path)
    return TEMPLATE.replace("@", f"@{instance}") if instance else UNIT


def _may_write(folder: str, read_write_paths: str) -> bool:
    """Whether the service's read-only system leaves a folder writable: its own one, or one in a drop-in."""
    writable = [STATE, *(path.lstrip("-+") for path in read_write_paths.split())]
    return any(Path(folder).is_relative_to(path) for path in writable)


def service_is_active(context: Context) -> bool:
    """Whether the service is running, and so may use the camera."""
    return context.run(["systemctl", "is-active", "--quiet", _unit(context)], _COMMAND_S) is not None


class _Timex(ctypes.Structure):
    """The first fields of `struct timex` of adjtimex(2), and space for the others."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("frequency", ctypes.c_long),
        ("max_error", ctypes.c_long),
        ("estimated_error", ctypes.c_long),
        ("status", ctypes.c_int),
        ("tail", ctypes.c_char * 256),
    )


def is_kernel_clock_synchronised() -> bool:
    """Whether an NTP or PTP client keeps the kernel's clock synchronised (adjtimex without a change)."""
    state, status = _ask_kernel()
    return 0 <= state < _TIME_ERROR and not status & _UNSYNC


def _ask_kernel() -> tuple[int, int]:
    """State and status of the kernel's clock; the state is -1 if the question is forbidden or impossible."""
    timex = _Timex()
    try:
        return int(ctypes.CDLL(None).adjtimex(ctypes.byref(timex))), int(timex.status)
    except (OSError, AttributeError):
        return -1, 0


def _existing(folder: Path) -> Path:
    """The folder, or its nearest existing parent."""
    return next((path for path in (folder, *folder.parents) if path.is_dir()), Path("/"))


def _free(context: Context, folder: Path) -> float:
    filesystem = context.statvfs(folder)
    return filesystem.f_bavail * filesystem.f_frsize / _MB


def _write_error(folder: Path) -> OSError | None:
    """The error of writing and syncing a file in `folder`; None if it works."""
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(b"eyas")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return error
    return None


def _date(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return f"{seconds:.0f} s since 1970"
