"""Runs on a device, not here: unpack wheels into a virtual environment without pip.

The wheels are resolved and downloaded by the host. pip would take minutes on a small board to unpack itself and to find
the same out. Standard library only, Python 3.10 or newer. Run by the environment's own interpreter:

    ENVIRONMENT/bin/python unpack.py WHEEL...
"""

from __future__ import annotations

import configparser
import os
import shutil
import sys
import sysconfig
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_SCRIPT = "import sys\nfrom {module} import {function}\nsys.exit({function}())\n"


def unpack(wheel: Path, site: Path, scripts: Path, prefix: Path) -> None:
    """Unpack one wheel, with its console scripts. Raises `zipfile.BadZipFile` for a damaged one."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)  # checks the CRC of each file; never writes outside of the folder
        names = archive.namelist()
    for data in {name.partition("/")[0] for name in names if name.partition("/")[0].endswith(".data")}:
        for kind, target in (("purelib", site), ("platlib", site), ("scripts", scripts), ("data", prefix)):
            if (site / data / kind).is_dir():
                shutil.copytree(site / data / kind, target, dirs_exist_ok=True)
        shutil.rmtree(site / data)
    for name in names:
        if name.endswith(".dist-info/entry_points.txt"):
            _write_scripts(site / name, scripts)


def _write_scripts(entry_points: Path, scripts: Path) -> None:
    found = configparser.ConfigParser(delimiters=("=",))
    found.optionxform = str  # type: ignore[assignment,method-assign]
    found.read(entry_points, encoding="utf-8")
    if not found.has_section("console_scripts"):
        return
    for name, entry in found["console_scripts"].items():
        module, _, function = entry.partition("[")[0].strip().partition(":")
        path = scripts / Path(name).name
        path.write_text(_first_lines() + _SCRIPT.format(module=module, function=function), encoding="utf-8")
        path.chmod(0o755)


def _first_lines() -> str:
    """How a script names its interpreter; the kernel takes neither blanks nor long paths."""
    if " " not in sys.executable and len(os.fsencode(sys.executable)) < 120:
        return f"#!{sys.executable}\n"
    return f"#!/bin/sh\n'''exec' \"{sys.executable}\" \"$0\" \"$@\"\n' '''\n"


def main() -> None:
    """Unpack the wheels that are named on the command line."""
    paths = sysconfig.get_paths()
    folders = Path(paths["platlib"]), Path(paths["scripts"]), Path(sys.prefix)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # zlib works outside of the interpreter's lock
        list(pool.map(lambda wheel: unpack(Path(wheel), *folders), sys.argv[1:]))


if __name__ == "__main__":
    main()
