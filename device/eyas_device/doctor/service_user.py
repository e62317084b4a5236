"""The doctor run by root sees what the service sees: it becomes the service's user before it checks anything."""

from __future__ import annotations

import grp
import os
import pwd
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from eyas_device.config import CONFIG, SERVICE_USER
from eyas_device.doctor.finding import Context, Finding, Judge, green, grey, red, yellow

_GROUPS = ("video",)
"""Supplementary groups of the unit."""
_TEST_S = 10.0


def become_service_user(needed: Sequence[Path]) -> Judge:
    """Become the service's user for good if this is root and there is such a user.

    Not if one of the paths `needed` for the checks, or Eyas itself, is closed to it.
    """
    own = _name(os.geteuid())
    try:
        account = pwd.getpwnam(SERVICE_USER)
    except KeyError:
        return Judge(own)
    if os.geteuid() != 0:
        return Judge(own)
    groups = _groups(account)
    package = Path(__file__).resolve().parent.parent
    for path in (Path(sys.executable), package, *needed):
        name = str(path.absolute())
        command = ["test", "-r", name, *(("-a", "-x", name) if path.is_dir() else ())]
        done = subprocess.run(
            command, user=account.pw_uid, group=account.pw_gid, extra_groups=groups, timeout=_TEST_S, check=False
        )
        if done.returncode != 0 and path.exists():
            return Judge(own, closed=str(path))
    os.setgroups(groups)
    os.setgid(account.pw_gid)
    os.setuid(account.pw_uid)
    os.environ.update(HOME=account.pw_dir, USER=account.pw_name, LOGNAME=account.pw_name)
    return Judge(account.pw_name)


def user(context: Context) -> Finding:
    """Check that what follows is what the service's user sees."""
    judge = context.judge or Judge(_name(os.geteuid()))
    if judge.is_service:
        return _closed_configuration(context.config_path) or green(f"judged as {SERVICE_USER}, as the service runs")
    if not _exists(SERVICE_USER):
        return grey(f"judged as {judge.user}; there is no user {SERVICE_USER}, as which the service would run")
    if judge.closed:
        text = f"judged as {judge.user}: {judge.closed} is closed to {SERVICE_USER}, as which the service runs"
        return yellow(text, f"put it where all may read it, e.g. below /opt or /tmp: chmod -R a+rX {judge.closed}")
    return yellow(f"judged as {judge.user}; the service runs as {SERVICE_USER}", "sudo eyas-device doctor")


def _closed_configuration(path: Path | None) -> Finding | None:
    if path is None or not path.is_relative_to(CONFIG.parent) or os.access(path, os.R_OK):
        return None
    group = grp.getgrgid(os.getegid()).gr_name
    return red(
        f"{path}: the service's user {SERVICE_USER} may not read it",
        f"chgrp {group} {path.parent} {path} && chmod g+rx {path.parent} && chmod g+r {path}",
    )


def _groups(account: pwd.struct_passwd) -> list[int]:
    """The user's groups, and those that the unit adds."""
    added = [group.gr_gid for group in grp.getgrall() if group.gr_name in _GROUPS]
    return [*os.getgrouplist(account.pw_name, account.pw_gid), *added]


def _exists(name: str) -> bool:
    return any(account.pw_name == name for account in pwd.getpwall())


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
