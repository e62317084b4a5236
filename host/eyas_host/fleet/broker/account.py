"""The user as whom mosquitto runs when root starts it, and the files that this user needs."""

from __future__ import annotations

import os
import pwd
import subprocess
from pathlib import Path

from eyas_host.fleet.broker.pki import CredentialError

_USER = "mosquitto"
"""Debian's package creates it."""
_NOBODY = "nobody"


def broker_account() -> pwd.struct_passwd | None:
    """The user that mosquitto changes to: its own, else the one behind `sudo`, else nobody; None if we are not root."""
    if os.geteuid() != 0:
        return None
    accounts = {account.pw_name: account for account in pwd.getpwall()}
    by_id = {str(account.pw_uid): account for account in accounts.values()}
    for account in (accounts.get(_USER), by_id.get(os.environ.get("SUDO_UID", "")), accounts.get(_NOBODY)):
        if account is not None and account.pw_uid != 0:
            return account
    raise CredentialError(f"no user for mosquitto to run as: create one with `adduser --system --group {_USER}`")


def hand_over(folder: Path, account: pwd.struct_passwd) -> None:
    """Let the broker's user read the broker's files, keys included, and own its data; nobody else may read keys.

    Raises `CredentialError` if that fails.
    """
    try:
        os.chown(folder, -1, account.pw_gid)
        folder.chmod(0o750)
        for path in folder.iterdir():
            if path.is_file() and not path.is_symlink():
                os.chown(path, -1, account.pw_gid)
                path.chmod(0o640)
        data = folder / "data"
        data.chmod(0o700)
        # No link is followed: whoever took the broker over could have put it there, to be given the file behind it.
        for path in (data, *data.iterdir()):
            os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)
    except OSError as error:
        raise CredentialError(f"{folder}: cannot be handed to {account.pw_name} ({error.strerror})") from None


def check_access(folder: Path, account: pwd.struct_passwd) -> None:
    """Raise `CredentialError` if a folder above the broker's files is closed to the broker's user."""
    for path in (*reversed(folder.parents), folder):
        done = subprocess.run(
            ["test", "-x", path], user=account.pw_uid, group=account.pw_gid, extra_groups=[], check=False
        )
        if done.returncode != 0:
            raise CredentialError(
                f"{path}: closed to the user {account.pw_name}, as which the broker runs; use a --kit that all may "
                f"enter, e.g. below /var/lib, or chmod o+x {path}"
            )
