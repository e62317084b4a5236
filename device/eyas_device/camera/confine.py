"""What a camera's process may do: less than the agent, because it decodes what strangers send.

It inherits no environment variable that may hold a secret, gains no privileges, and is the first process that the
kernel ends when memory is short. An agent that runs as root gives it another user. An agent that runs as a user of its
own, as the service does, cannot: the process has that user's files then. It is not a sandbox.
"""

from __future__ import annotations

import contextlib
import ctypes
import grp
import os
import pwd
import stat
from collections.abc import Mapping
from pathlib import Path

USER = "EYAS_CAMERA_USER"
"""Environment variable: the user that the process becomes if the agent is root. `root` keeps it as it is."""
OOM_SCORE = 500
"""Added to the process's badness for the kernel's out-of-memory killer, of 1000."""
_DEFAULT_USER = "nobody"
_GROUPS = ("video", "render")
_NAMES = frozenset(
    {"PATH", "HOME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "DISPLAY", "WAYLAND_DISPLAY", "XDG_RUNTIME_DIR", USER}
)
_PREFIXES = (
    *("LC_", "LD_", "PYTHON", "OPENCV_", "OPENBLAS_", "OMP_", "GST_", "LIBCAMERA_", "LIBV4L", "LIBVA_"),
    *("CUDA_", "NVIDIA_", "EGL_", "__EGL_", "MESA_", "COVERAGE_"),
)
_NO_NEW_PRIVS = 38  # source: linux/prctl.h


def filter_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a camera's libraries need; others may hold tokens or passwords."""
    return {name: value for name, value in environment.items() if name in _NAMES or name.startswith(_PREFIXES)}


def confine(device: str = "") -> str:
    """Give up what the process does not need, in all its threads; `device` is the node that it will open, if any.

    Returns why it keeps the rights of root, empty if it does not have them.
    """
    raise_oom_score()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    name = os.environ.get(USER, _DEFAULT_USER)
    if os.geteuid() != 0 or name == "root":
        return ""
    try:
        user = pwd.getpwnam(name)
    except KeyError:
        return f"there is no user {name!r} (see {USER})"
    groups = {user.pw_gid, *os.getgrouplist(name, user.pw_gid), *_existing_groups(), *_device_group(device)}
    if problem := _inaccessible(device, user.pw_uid, groups):
        return problem
    try:
        os.setgroups(sorted(groups))
        os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
        os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
    except OSError as error:
        return f"it cannot become {name} ({error.strerror})"
    os.environ["HOME"] = user.pw_dir
    return ""


def raise_oom_score() -> None:
    """Let the kernel end this process before others of its control group."""
    path = Path("/proc/self/oom_score_adj")
    with contextlib.suppress(OSError, ValueError):
        if int(path.read_text()) < OOM_SCORE:
            path.write_text(str(OOM_SCORE))


def _existing_groups() -> set[int]:
    found = set()
    for name in _GROUPS:
        with contextlib.suppress(KeyError):
            found.add(grp.getgrnam(name).gr_gid)
    return found


def _device_group(device: str) -> set[int]:
    """The group of a device node, which may be named otherwise than `video`."""
    with contextlib.suppress(OSError, ValueError):
        status = Path(device).stat()
        if stat.S_ISCHR(status.st_mode) and status.st_gid != 0:
            return {status.st_gid}
    return set()


def _inaccessible(device: str, user: int, groups: set[int]) -> str:
    """Why a device node could not be opened by the user; empty if it could."""
    with contextlib.suppress(OSError, ValueError):
        status = Path(device).stat()
        needed = 0o006
        if status.st_uid == user:
            needed = 0o600
        elif status.st_gid in groups:
            needed = 0o060
        if stat.S_ISCHR(status.st_mode) and status.st_mode & needed != needed:
            return f"only root may open {device}; give it the group video"
    return ""
