"""What a device had before a flash: kept on the device until a flash has finished or is rolled back.

An entry is written once, before the first change: after an interrupted flash it is still that of the last state that
was known to work, whatever later flashes try.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

from eyas_host.fleet.connect.ssh import CommandResult

_BEGIN = """
[ "$2" = yes ] || rm -rf "$1"
mkdir -p "$1"; chmod 700 "$1"; cd "$1"
for f in *; do case "$f" in
  *.new|"*") ;;
  *.value) echo "$f=$(cat "$f")" ;;
  *) echo "$f=" ;;
esac; done
"""
_ON_DISK = 'on_disk() { sync "$1" 2>/dev/null || sync; }; '
"""Waits for one file or folder; a `sync` that takes no arguments waits for all of them."""
_NOTE = _ON_DISK + '[ -e "$1" ] || { printf %s "$2" > "$1.new"; on_disk "$1.new"; mv "$1.new" "$1"; }'
_PUT = (
    _ON_DISK
    + """
umask 022
new=$1; target=$2; backup=$3; mode=$4; group=$5
cmp -s "$new" "$target" && case "$(stat -c %a:%G "$target")" in "$mode:${group:-}"*) echo same; exit 0 ;; esac
mkdir -p "$(dirname "$target")"
did=changed; [ -f "$target" ] || did=created
if [ ! -e "$backup" ] && [ ! -e "$backup.absent" ]; then
  if [ "$did" = changed ]; then cp -p "$target" "$backup.new"; else backup=$backup.absent; : > "$backup.new"; fi
  on_disk "$backup.new"; mv "$backup.new" "$backup"; on_disk "$(dirname "$backup")"
fi
cp "$new" "$target.new"; chmod "$mode" "$target.new"
[ -z "$group" ] || chgrp "$group" "$target.new"
on_disk "$target.new"; mv "$target.new" "$target"; on_disk "$(dirname "$target")"
echo "$did"
"""
)
_RESTORE = (
    _ON_DISK
    + """
if [ -e "$2" ]; then cp -p "$2" "$1.new"; on_disk "$1.new"; mv "$1.new" "$1"; on_disk "$(dirname "$1")"
elif [ -e "$2.absent" ]; then rm -f "$1"
fi
"""
)

_SWAP = (
    _ON_DISK
    + """
swap() {
  if [ ! -e "$2" ] && [ ! -L "$2" ]; then mv -T "$1" "$2"
  elif ! "$3" -c '
import ctypes, os, sys
sys.exit(ctypes.CDLL(None).renameat2(-100, os.fsencode(sys.argv[1]), -100, os.fsencode(sys.argv[2]), 2) and 1)
' "$1" "$2" 2>/dev/null; then rm -rf "$2.old"; mv -T "$2" "$2.old"; mv -T "$1" "$2"; rm -rf "$2.old"
  fi
  rm -rf "$1"; on_disk "$(dirname "$2")"
}
"""
)
"""Exchanges two folders in one step (RENAME_EXCHANGE); in two where the file system cannot."""
_PUT_FOLDER = (
    _SWAP
    + """
umask 077
new=$1; target=$2; backup=$3; group=$4; private=$5; python=$6
did=changed; [ -d "$target" ] || did=created
if [ ! -e "$backup" ] && [ ! -e "$backup.absent" ]; then
  rm -rf "$backup.new"
  if [ "$did" = changed ]; then cp -a "$target/." "$backup.new"; else backup=$backup.absent; : > "$backup.new"; fi
  sync; mv -T "$backup.new" "$backup"; on_disk "$(dirname "$backup")"
fi
(umask 022; mkdir -p "$(dirname "$target")")
rm -rf "$target.new"; mkdir "$target.new"
[ "$did" = created ] || cp -a "$target/." "$target.new"
chmod 700 "$target.new"
for f in "$new"/*; do
  own=$target.new/${f##*/}; mode=644
  case " $private " in *" ${f##*/} "*) mode=640 ;; esac
  rm -f "$own"; cp "$f" "$own"
  [ -z "$group" ] || chgrp "$group" "$own"
  chmod "$mode" "$own"
done
[ -z "$group" ] || chgrp "$group" "$target.new"
chmod 750 "$target.new"
sync; swap "$target.new" "$target" "$python"
echo "$did"
"""
)
"""Other files of the folder stay."""
_RESTORE_FOLDER = (
    _SWAP
    + """
if [ -e "$2" ]; then rm -rf "$1.new"; cp -a "$2" "$1.new"; sync; swap "$1.new" "$1" "$3"
elif [ -e "$2.absent" ]; then rm -rf "$1"
fi
"""
)

Script = Callable[..., CommandResult]
"""Runs a shell script with arguments on the device."""


class Journal:
    """Backups of files, and values such as the slot in use, in one folder of the device."""

    def __init__(self, script: Script, folder: str) -> None:
        self.folder = folder
        self._script = script
        self._entries: dict[str, str] = {}

    def begin(self, *, resumed: bool) -> CommandResult:
        """Read what an interrupted flash left; without one, begin an empty journal."""
        result = self._script(_BEGIN, self.folder, "yes" if resumed else "")
        self._entries = dict(line.split("=", 1) for line in result.out.splitlines() if "=" in line)
        return result

    def note(self, name: str, value: str) -> CommandResult:
        """Store a value, unless an interrupted flash has stored an earlier one."""
        self._entries.setdefault(f"{name}.value", value)
        return self._script(_NOTE, f"{self.folder}/{name}.value", value)

    def value(self, name: str) -> str:
        """A stored value; empty if there is none."""
        return self._entries.get(f"{name}.value", "")

    def put(self, new: str, path: str, *, mode: str, group: str) -> CommandResult:
        """Replace the file `path` by `new`, after a backup of the first one; prints `same`, `changed` or `created`."""
        return self._placed(path, self._script(_PUT, new, path, self._backup(path), mode, group))

    def put_folder(self, new: str, path: str, *, private: Sequence[str], group: str, python: str) -> CommandResult:
        """Replace files of the folder `path` by those in `new`, all at once and after a backup.

        Everybody may read them but the `private` ones, which are for their owner and `group`. `python` is an
        interpreter there. Prints `changed` or `created`.
        """
        arguments = (new, path, self._backup(path), group, " ".join(private), python)
        return self._placed(path, self._script(_PUT_FOLDER, *arguments))

    def _placed(self, path: str, result: CommandResult) -> CommandResult:
        if not (self.holds(path) or self.was_absent(path)) and result.out.strip() in ("changed", "created"):
            suffix = ".absent" if result.out.strip() == "created" else ""
            self._entries[PurePosixPath(path).name + suffix] = ""
        return result

    def holds(self, path: str) -> bool:
        """Whether there is a backup of the file."""
        return PurePosixPath(path).name in self._entries

    def was_absent(self, path: str) -> bool:
        """Whether there was no such file before."""
        return f"{PurePosixPath(path).name}.absent" in self._entries

    def restore(self, path: str) -> CommandResult:
        """Put the file back, or remove it if there was none; the backup stays."""
        return self._script(_RESTORE, path, self._backup(path))

    def restore_folder(self, path: str, *, python: str) -> CommandResult:
        """Put the folder back, or remove it if there was none; the backup stays."""
        return self._script(_RESTORE_FOLDER, path, self._backup(path), python)

    def _backup(self, path: str) -> str:
        return f"{self.folder}/{PurePosixPath(path).name}"
