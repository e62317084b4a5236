"""Soak test: half an hour at full rate with a camera that fails every twenty seconds (`make soak`).

    python benchmarks/soak.py [--quick] [--minutes 30] [--json FILE]

A real MJPEG server is killed and restarted while `eyas-device run` classifies its frames. Memory, threads and file
descriptors are read from /proc; the time to recover after each restart from the agent's log.
"""

from __future__ import annotations

import argparse
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from common import Figure, finish
from eyas_host.support.machine import cpu_pressure

BUNDLE = Path("runs/solar-cells/bundle")
SERVER = Path("tests/support/streams.py")
_UP_S, _DOWN_S, _SAMPLE_S = 20.0, 2.0, 5.0
_RECOVERY_S = 2.0
"""Time in which a camera that is well again delivers, seconds."""
_SETTLED = 0.2
"""Fraction of samples at the start that count as warm-up."""


class Agent:
    """`eyas-device run` on the server's stream, with its time-stamped log."""

    def __init__(self, bundle: Path, port: int) -> None:
        command = [sys.executable, "-m", "eyas_device", "run", "--bundle", str(bundle)]
        command += ["--log-level", "debug", "--camera", f"mjpeg:http://127.0.0.1:{port}/normal"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.log: list[tuple[float, str]] = []
        threading.Thread(target=self._read_log, daemon=True).start()

    def _read_log(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append((time.monotonic(), line.rstrip()))

    def sample(self) -> tuple[float, int, int]:
        """Resident memory in MB, threads, file descriptors."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        fields = {name: int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "Threads")}  # type: ignore[index]
        return fields["VmRSS"] / 1024, fields["Threads"], len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def stop(self) -> int:
        """Stop the agent as systemd would, and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def main() -> None:
    """Run the soak test and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four minutes")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if not arguments.bundle.is_dir():
        raise SystemExit(f"{arguments.bundle} does not exist: run make distill, or give --bundle DIR")
    minutes = 4.0 if arguments.quick else arguments.minutes
    before = cpu_pressure()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = _serve(port)
    agent = Agent(arguments.bundle, port)
    samples: list[tuple[float, float, int, int]] = []
    returns: list[float] = []
    ends = time.monotonic() + 60 * minutes
    try:
        next_kill, next_sample = time.monotonic() + _UP_S, time.monotonic() + _SAMPLE_S
        while time.monotonic() < ends:
            time.sleep(0.1)
            if agent.process.poll() is not None:
                raise SystemExit(f"the agent ended with {agent.process.returncode}: {agent.log[-3:]}")
            if time.monotonic() >= next_sample:
                samples.append((time.monotonic(), *agent.sample()))
                next_sample += _SAMPLE_S
                left = (ends - time.monotonic()) / 60
                if sys.stdout.isatty():
                    print(f"\r{samples[-1][1]:.1f} MB, {len(returns)} losses, {left:.1f} min left ", end="", flush=True)
            if time.monotonic() >= next_kill and ends - time.monotonic() > _UP_S:
                server.kill()
                server.wait()
                time.sleep(_DOWN_S)
                server = _serve(port)
                returns.append(time.monotonic())
                next_kill = time.monotonic() + _UP_S
        code = agent.stop()
    finally:
        print()
        server.kill()
        agent.process.kill()
    finish(figures(samples, returns, agent.log, code), before, arguments.json)


def figures(
    samples: list[tuple[float, float, int, int]], returns: list[float], log: list[tuple[float, str]], code: int
) -> dict[str, Figure]:
    """Compute the figures from the samples and the agent's log."""
    times, memory, threads, files = np.array(samples[int(len(samples) * _SETTLED) :]).T
    slope, noise = _slope((times - times[0]) / 3600, memory)
    back = [when for when, line in log if "camera delivering" in line]
    waits = [min((when - returned for when in back if when > returned), default=np.inf) for returned in returns]
    frames = [int(match[1]) for _, line in log if (match := re.search(r" debug   frames (\d+)", line))]
    return {
        "losses": Figure(value=len(returns), unit="", note=f"the server was killed every {_UP_S:.0f} s"),
        "recovered": Figure(
            value=float(np.isfinite(waits).mean()),
            unit="of losses",
            bound=1.0,
            note="frames arrived again",
        ),
        "slowest_recovery_s": Figure(
            value=float(max(waits)),
            unit="s",
            bound=_RECOVERY_S,
            better="lower",
            spread=f"median {np.median(waits):.2f}",
            note="after the server's return",
        ),
        "memory_slope_mb_h": Figure(
            value=slope,
            unit="MB/h",
            bound=max(1.0, 2 * noise),
            better="lower",
            spread=f"standard error {noise:.2f}",
            note=f"resident {np.median(memory):.1f} MB, at most {memory.max():.1f} MB",
        ),
        "threads_gained": Figure(value=float(threads[-1] - threads[0]), unit="", bound=0, better="lower"),
        "descriptors_gained": Figure(value=float(files[-1] - files[0]), unit="", bound=0, better="lower"),
        "frames": Figure(value=float(max(frames)), unit="", note=f"classified; exit code of the agent: {code}"),
    }


def _slope(hours: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Least-squares slope and its standard error."""
    (slope, _), covariance = np.polyfit(hours, values, 1, cov=True)
    return float(slope), float(np.sqrt(covariance[0, 0]))


def _serve(port: int) -> subprocess.Popen[str]:
    server = subprocess.Popen([sys.executable, str(SERVER), str(port)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    server.stdout.readline()
    return server


if __name__ == "__main__":
    main()
