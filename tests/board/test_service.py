"""The hardened unit under a real systemd."""

from __future__ import annotations

import time
from collections.abc import Callable

from .machine import Board
from .service import CONFIG, SERVICE, WAIT_S, WATCHDOG_S, Messages, answering, ask, shown, wait_for


def journal(board: Board) -> list[str]:
    """What the service and systemd have written since its last start."""
    start = f"journalctl --unit {SERVICE} --output cat --no-pager | tac | sed '/^Starting/q' | tac"
    return board.run(start).stdout.splitlines()


def test_it_is_hardened_ready_when_it_is_initialised_and_says_what_it_does(
    service_board: Board, report: Callable[[str], None]
) -> None:
    answering(service_board)
    lines = journal(service_board)
    order = ["was selected", "camera opening", "Started eyas-device.service", "camera delivering"]
    places = [next(number for number, line in enumerate(lines) if word in line) for word in order]
    assert places[:3] == sorted(places[:3]), lines
    security = service_board.run(f"systemd-analyze security --no-pager {SERVICE}", timeout=WAIT_S).stdout
    exposure = security.splitlines()[-1].strip()
    report(exposure)
    assert float(exposure.split("service:")[1].split()[0]) <= 2.0
    text = wait_for(
        "figures in the status line",
        lambda: next((text for text in [shown(service_board, "StatusText")] if "fps, p50" in text), None),
    )
    report(f"systemctl status: {text}")
    assert text.startswith("tiny-shapes ") and ": litert-int8 on litert" in text and "camera delivering" in text
    assert text in service_board.run(f"systemctl status --no-pager --full {SERVICE}").stdout


def test_its_user_can_write_to_its_state_and_nowhere_else(service_board: Board) -> None:
    inside = f"nsenter --target {shown(service_board, 'MainPID')} --mount runuser -u eyas --"
    find = "find / ( -path /proc -o -path /sys ) -prune -o -type d -writable -print".replace("(", r"\(").replace(
        ")", r"\)"
    )
    folders = service_board.run(f"{inside} {find} 2>/dev/null; true", timeout=WAIT_S).stdout.splitlines()
    allowed = ("/var/lib/eyas", "/run/eyas", "/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue")
    assert "/var/lib/eyas/spool" in folders and "/run/eyas" in folders
    assert [folder for folder in folders if not folder.startswith(allowed)] == []
    assert "Permission denied" in service_board.run(f"{inside} ls /root", check=False).stderr


def test_a_reload_takes_a_new_value_and_keeps_the_old_one_of_a_refused_file(
    service_board: Board, messages: Messages
) -> None:
    process = answering(service_board).pid
    service_board.run(f"cp {CONFIG} /root/kept.toml && sed -i 's/^fps = .*/fps = 1.0/' {CONFIG}")
    try:
        service_board.run(f"systemctl reload {SERVICE}", timeout=WAIT_S)
        before = len(messages.windows)
        wait_for("one frame a second", lambda: any(0 < w.frames <= 1.5 * w.seconds for w in messages.windows[before:]))
        slow = len(messages.windows)  # windows of before the reload may have been under way until now
        service_board.run(f"sed -i 's/^fps = .*/fps = \"many\"/' {CONFIG}")
        assert service_board.run(f"systemctl reload {SERVICE}", check=False, timeout=WAIT_S).returncode
        status = answering(service_board)
        assert status.pid == process and shown(service_board, "ActiveState") == "active"
        assert any("fps" in line for line in journal(service_board))
        wait_for("another window", lambda: len(messages.windows) > slow)
        assert not any(w.frames > 1.5 * w.seconds for w in messages.windows[slow:])
    finally:
        service_board.run(f"cp /root/kept.toml {CONFIG} && systemctl reload {SERVICE}", timeout=WAIT_S)
    assert ask(service_board).model.problem == ""  # type: ignore[union-attr]


def test_the_kernel_ends_the_cameras_process_first_for_memory_and_it_comes_back(service_board: Board) -> None:
    before = answering(service_board)
    service_board.run("echo f >/proc/sysrq-trigger")
    assert "eyas_device.camera" in service_board.run("tr '\\0' ' ' </proc/$(pgrep -n -u eyas)/cmdline").stdout
    after = wait_for(
        "the camera is lost and delivers again",
        lambda: next(
            (
                s
                for s in [ask(service_board)]
                if s and s.camera.losses > before.camera.losses and s.camera.state == "delivering"
            ),
            None,
        ),
    )
    assert after.pid == before.pid and after.frames >= before.frames
    assert "Out of memory: Killed process" in service_board.run("dmesg").stdout
    service_board.run(f"kill -KILL $(pgrep -P {before.pid})")
    wait_for("lost once more", lambda: (s := ask(service_board)) is not None and s.camera.losses > after.camera.losses)
    assert answering(service_board).pid == before.pid and shown(service_board, "NRestarts") == "0"


def test_it_stops_in_order_refuses_a_wrong_file_for_good_and_is_ended_when_it_hangs(
    service_board: Board, messages: Messages, report: Callable[[str], None]
) -> None:
    """Three starts of an emulated service are what this costs, hence one test."""
    answering(service_board)
    arrived, since = len(messages.windows), time.monotonic()
    service_board.run(f"systemctl stop {SERVICE}")
    report(f"systemctl stop: {time.monotonic() - since:.1f} s")
    assert time.monotonic() - since < 30
    assert (shown(service_board, "Result"), shown(service_board, "ExecMainStatus")) == ("success", "0")
    wait_for("the final window", lambda: len(messages.windows) > arrived and messages.states[-1] == "offline")

    service_board.run(f"cp {CONFIG} /root/kept.toml && sed -i 's/^fps = .*/fps = \"many\"/' {CONFIG}")
    assert service_board.run(f"systemctl start {SERVICE}", check=False, timeout=WAIT_S).returncode
    time.sleep(5)
    names = ("ActiveState", "ExecMainStatus", "NRestarts")
    assert [shown(service_board, name) for name in names] == ["failed", "78", "0"]
    assert any("fps" in line for line in journal(service_board))

    service_board.run(f"cp /root/kept.toml {CONFIG} && systemctl start {SERVICE}", timeout=WAIT_S)
    before = answering(service_board)
    since = time.monotonic()
    service_board.run(f"kill -STOP {before.pid}")
    wait_for("another process", lambda: shown(service_board, "MainPID") not in ("0", str(before.pid)))
    assert answering(service_board).pid != before.pid
    report(f"a stopped loop answers again after {time.monotonic() - since:.1f} s, with a watchdog of {WATCHDOG_S} s")
    assert "Watchdog timeout" in service_board.run(f"journalctl --unit {SERVICE} --no-pager").stdout
    service_board.run(f"systemctl reset-failed {SERVICE}")
