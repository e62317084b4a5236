"""Whether the wall clock was set: yes, no or unknown, and never a guess."""

from __future__ import annotations

from pathlib import Path

import pytest

from eyas_device.support import clock

_EPERM, _OK, _UNSYNCHRONISED = -1, 0, 5


@pytest.mark.parametrize(
    ("kernel", "timesyncd", "expected"),
    [
        (_OK, "not there", True),
        (_OK, "not yet", True),
        (_UNSYNCHRONISED, "not there", None),  # chrony without rtcsync may have set it
        (_UNSYNCHRONISED, "not yet", False),
        (_UNSYNCHRONISED, "has set it", True),  # hours ago: the kernel's error bound has grown since
        (_EPERM, "not there", None),  # in the hardened unit
        (_EPERM, "not yet", False),
        (_EPERM, "has set it", True),
    ],
)
def test_who_says_that_the_clock_was_set(
    kernel: int, timesyncd: str, expected: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "timesync"
    if timesyncd != "not there":
        folder.mkdir()
    if timesyncd == "has set it":
        (folder / "synchronized").touch()
    monkeypatch.setattr(clock, "_TIMESYNCD", str(folder))
    monkeypatch.setattr(clock, "_adjtimex", lambda: lambda buffer: kernel)
    assert clock.is_synchronised() is expected


def test_a_system_without_adjtimex_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_TIMESYNCD", str(tmp_path / "timesync"))
    monkeypatch.setattr(clock, "_adjtimex", lambda: None)
    assert clock.is_synchronised() is None


def test_the_kernel_is_only_asked() -> None:
    """A buffer of zeros reads; the answer is a state from 0 to 5, or -1 where a sandbox forbids it."""
    adjtimex = clock._adjtimex()
    assert adjtimex is not None
    assert -1 <= adjtimex(clock.ctypes.create_string_buffer(512)) <= 5
    assert clock.is_synchronised() in (True, False, None)
