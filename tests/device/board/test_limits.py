"""What a process may use of the machine: control groups as kernels and container engines lay them out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from eyas_device.board.limits import usable_cores, usable_memory

V1 = "/docker/abc"
TREES: dict[str, tuple[dict[str, str], int, float]] = {
    "no groups": ({}, 8, 16e9),
    "version 2 in a container": (
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/memory.max": "2000000000\n",
            "sys/fs/cgroup/memory.current": "1500000000\n",
            "sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 1000000000\nactive_file 7\n",
        },
        2,
        1.5e9,
    ),
    "version 2, the tightest of several": (
        {
            "proc/self/cgroup": "0::/user.slice/job.scope\n",
            "sys/fs/cgroup/user.slice/cpu.max": "100000 100000\n",
            "sys/fs/cgroup/user.slice/job.scope/cpu.max": "max 100000\n",
            "sys/fs/cgroup/user.slice/memory.max": "max\n",
            "sys/fs/cgroup/user.slice/job.scope/memory.max": "3000000000\n",
        },
        1,
        3e9,
    ),
    "version 1, a container that sees its own group as the top": (
        {
            "proc/self/cgroup": f"4:memory:{V1}\n2:cpu,cpuacct:{V1}\n0::/\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "500000000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "600000000\n",
        },
        1,
        0,
    ),
    "version 1 without limits": (
        {
            "proc/self/cgroup": f"4:memory:{V1}\n2:cpu:{V1}\n",
            f"sys/fs/cgroup/cpu{V1}/cpu.cfs_quota_us": "-1\n",
            f"sys/fs/cgroup/cpu{V1}/cpu.cfs_period_us": "100000\n",
            f"sys/fs/cgroup/memory{V1}/memory.limit_in_bytes": "9223372036854771712\n",
        },
        8,
        16e9,
    ),
    "rubbish": (
        {"proc/self/cgroup": "::\n0\n", "sys/fs/cgroup/cpu.max": "fast\n", "sys/fs/cgroup/memory.max": "\n"},
        8,
        16e9,
    ),
}


def lay_out(root: Path, files: dict[str, str]) -> None:
    for name, text in {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 15625000 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize("tree", TREES)
def test_limits_of_containers(tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, cores, memory = TREES[tree]
    lay_out(tmp_path, files)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert (usable_cores(tmp_path), usable_memory(tmp_path)) == (cores, memory)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    assert usable_cores(tmp_path) == 1
