"""Watch what a command of ours, with all its child processes, looks up, connects to and writes.

A `sitecustomize` on the module path adds an audit hook to every Python process; it sees what Python code and its
sockets do. Where there is a C compiler, a preloaded library does the same for look-ups and connections of native code,
Python's or not. Files that native code writes are not seen: look into the home folder afterwards.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tests.support.paths import ROOT

_HOOK = """
import os, sys
_log = os.environ["EYAS_TEST_AUDIT"]
def _hook(event, args, _open=os.open, _write=os.write):
    if event == "socket.getaddrinfo":
        line = f"lookup {args[0]!r}"
    elif event == "socket.gethostbyname":
        line = f"lookup {args[0]!r}"
    elif event in ("socket.connect", "socket.sendto"):
        line = f"connect {args[1]!r}"
    elif event == "open" and isinstance(args[0], (str, bytes, os.PathLike)) and isinstance(args[2], int) \\
            and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        line = f"write {os.path.abspath(os.fsdecode(args[0]))}"
    elif event in ("os.mkdir", "os.rename", "shutil.copyfile"):
        line = f"write {os.path.abspath(os.fsdecode(args[1 if event != 'os.mkdir' else 0]))}"
    else:
        return
    if line != f"write {_log}":
        descriptor = _open(_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        _write(descriptor, (line.replace("\\n", " ") + "\\n").encode(errors="replace"))
        os.close(descriptor)
sys.addaudithook(_hook)
"""


_PRELOADED = r"""
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static void put(const char *format, const char *name) {
    char line[600];
    const char *path = getenv("EYAS_TEST_AUDIT");
    int length = snprintf(line, sizeof line, format, name);
    int file = path ? open(path, O_WRONLY | O_APPEND | O_CREAT, 0600) : -1;
    if (file >= 0 && write(file, line, length) >= 0) close(file);
}

typedef int (*Lookup)(const char *, const char *, const struct addrinfo *, struct addrinfo **);

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **result) {
    Lookup next = (Lookup)dlsym(RTLD_NEXT, "getaddrinfo");
    if (node) put("lookup '%s'\n", node);
    return next(node, service, hints, result);
}

struct hostent *gethostbyname(const char *name) {
    struct hostent *(*next)(const char *) = dlsym(RTLD_NEXT, "gethostbyname");
    put("lookup '%s'\n", name);
    return next(name);
}

int connect(int socket, const struct sockaddr *address, socklen_t length) {
    int (*next)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "connect");
    char text[INET6_ADDRSTRLEN] = "";
    if (address && address->sa_family == AF_INET)
        inet_ntop(AF_INET, &((const struct sockaddr_in *)address)->sin_addr, text, sizeof text);
    if (address && address->sa_family == AF_INET6)
        inet_ntop(AF_INET6, &((const struct sockaddr_in6 *)address)->sin6_addr, text, sizeof text);
    if (*text) put("connect ('%s',)\n", text);
    return next(socket, address, length);
}
"""
_INHERITED = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPYCACHEPREFIX")
"""Variables of this process that its commands get: what Eyas set here must not hide what it would not set there."""


class Audited(NamedTuple):
    """What a command did."""

    code: int
    output: str
    lookups: list[str]
    """Names looked up and addresses connected to, but for loopback and unix sockets."""
    written: list[Path]
    lines: list[str]
    """All of it, in order."""


class Audit:
    """Commands in `folder`, with `home` (which may be missing or no folder at all) as the home folder."""

    def __init__(self, folder: Path, home: Path, environment: Mapping[str, str] | None = None) -> None:
        self._folder, self._log = folder, folder / "audit.log"
        hooks = folder / "hooks"
        hooks.mkdir(exist_ok=True)
        (hooks / "sitecustomize.py").write_text(_HOOK)
        inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        self._environment = inherited | {
            "HOME": str(home),
            "PYTHONPATH": os.pathsep.join(map(str, (hooks, ROOT / "device", ROOT / "host", ROOT))),
            "PYTHONDONTWRITEBYTECODE": "1",
            "EYAS_TEST_AUDIT": str(self._log),
            "OMP_NUM_THREADS": "1",
            **self._preloaded(hooks),
            **(environment or {}),
        }

    def run(self, module: str, *arguments: object, timeout: float = 300.0) -> Audited:
        """Run `python -m MODULE ARGUMENTS` and return what happened meanwhile."""
        before = len(self.lines())
        done = subprocess.run(
            self._command(module, arguments),
            cwd=self._folder,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        lines = self.lines()[before:]
        return Audited(done.returncode, done.stdout + done.stderr, remote(lines), written(lines), lines)

    def start(self, module: str, *arguments: object) -> subprocess.Popen[bytes]:
        """Start `python -m MODULE ARGUMENTS` beside what is run next; the caller ends it."""
        with (self._folder / "beside.log").open("ab") as out:
            return subprocess.Popen(
                self._command(module, arguments), cwd=self._folder, env=self._environment, stdout=out, stderr=out
            )

    def _command(self, module: str, arguments: tuple[object, ...]) -> list[str]:
        return [sys.executable, "-m", module, *map(str, arguments)]

    def lines(self) -> list[str]:
        """All that was audited so far, one look-up, connection or write each."""
        return self._log.read_text().splitlines() if self._log.exists() else []

    def _preloaded(self, hooks: Path) -> dict[str, str]:
        if shutil.which("cc") is None:
            return {}
        source, library = hooks / "audit.c", hooks / "audit.so"
        source.write_text(_PRELOADED)
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
        return {"LD_PRELOAD": str(library)}


def audited(folder: Path, module: str, *arguments: object, home: Path, timeout: float = 300.0) -> Audited:
    """Run one command in `folder` under an `Audit`."""
    return Audit(folder, home).run(module, *arguments, timeout=timeout)


def remote(lines: list[str]) -> list[str]:
    """The look-ups and connections that are not on this machine."""
    return [line for line in lines if line.startswith(("lookup ", "connect ")) and not _is_local(line)]


def written(lines: list[str]) -> list[Path]:
    """The files and folders that were opened for writing, created or renamed."""
    return [Path(line.removeprefix("write ")) for line in lines if line.startswith("write ")]


def _is_local(line: str) -> bool:
    unix_socket = line.startswith(("connect '", "connect b'", "connect '\\x00"))
    unbound = line in (
        f"lookup {socket.gethostname()!r}",
        "lookup None",
        "lookup ''",
        "lookup '0.0.0.0'",
        "connect ('0.0.0.0',)",
        "connect ('::',)",
    )
    return (
        unix_socket
        or unbound
        or any(word in line for word in ("'127.", "b'127.", "'::1'", "'localhost'", "b'localhost'"))
    )
