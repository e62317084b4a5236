"""A very large data set on this machine: `python benchmarks/scale.py [--quick] [--form tar|folder] [--json FILE]`.

Small JPEGs are drawn into one tar shard with their labels, or into class folders, and `eyas split` lists, hashes and
divides them, searches near-duplicates among them, and writes the manifest, in a process of its own and those that it
starts. One image in a hundred is drawn twice, the second time stored at another quality: these pairs must be found and
kept in one split, and no other. Memory is what all of these processes use together (shared pages count once), looked at
every second.

A million images, or 50,000 with `--quick`. What is drawn stays in `--work` for the next time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import resource
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

import quiet_first  # noqa: F401 - before the heavy imports
from common import Figure, finish
from eyas_host.data.manifest import SPLITS, load_manifest
from eyas_host.support.machine import cpu_pressure
from eyas_host.support.progress import track

FULL, QUICK = 1_000_000, 50_000
CLASSES = 20
TWINS = 100
"""One image in so many has a near-duplicate, the next one."""
BOUND_S, BOUND_MB = 1200, 4000
WORK = Path("runs/benchmark/scale")
RECIPE = """
[run]
name = "{name}"
device = "cpu"
[data]
source = "{source}"
path = "{path}"
"""


def main() -> None:
    """Draw, split, check, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK:,} images instead of {FULL:,} (minutes)")
    parser.add_argument("--images", type=int, metavar="N", help="another number of images")
    parser.add_argument("--form", choices=("tar", "folder"), default="tar", help="one tar shard (default), or files")
    parser.add_argument("--work", type=Path, default=WORK, metavar="DIR", help=f"default {WORK}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    count = arguments.images or (QUICK if arguments.quick else FULL)
    source = (draw_tar if arguments.form == "tar" else draw_folder)(arguments.work, count)
    before = cpu_pressure()
    finish(figures(arguments.work, arguments.form, source, count), before, arguments.json)


def figures(work: Path, form: str, source: Path, count: int) -> dict[str, Figure]:
    """Split twice, the second time without a change, and check the first."""
    name = f"{form}-{count}"
    recipe = work / f"{name}.toml"
    recipe.write_text(RECIPE.format(name=name, source=form, path=source.resolve()), encoding="utf-8")
    shutil.rmtree(work / "runs" / name, ignore_errors=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    first_s, peak_mb = split(work, recipe)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor_s = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    again_s, _ = split(work, recipe)
    manifest = load_manifest(work / "runs" / name / "split" / "manifest.json")
    images = sum(len(getattr(manifest, part)) for part in SPLITS)
    full = count >= FULL
    note = f"{count:,} JPEGs of 64 x 64 pixels in {'one tar shard' if form == 'tar' else 'class folders'}"
    pairs = count // TWINS
    found = sum(len(cluster) == 2 for cluster in manifest.clusters)
    return {
        f"{form}_seconds": Figure(
            value=first_s, unit="s", bound=BOUND_S if full else None, better="lower", note=f"{note}: the whole command"
        ),
        f"{form}_processor_seconds": Figure(
            value=processor_s, unit="s", better="lower", note="of all processes: other work on the machine adds little"
        ),
        f"{form}_memory": Figure(
            value=peak_mb, unit="MB", bound=BOUND_MB if full else None, better="lower", note="all processes together"
        ),
        f"{form}_rate": Figure(value=count / first_s, unit="images/s", note="listed, hashed, searched and split"),
        f"{form}_again_seconds": Figure(value=again_s, unit="s", better="lower", note="the same command, unchanged"),
        f"{form}_lost_images": Figure(value=count - images, unit="", bound=0, better="lower"),
        f"{form}_missed_pairs": Figure(
            value=pairs - found, unit="", bound=0, better="lower", note=f"of {pairs:,} near-duplicates"
        ),
        f"{form}_wrong_clusters": Figure(
            value=len(manifest.clusters) - found, unit="", bound=0, better="lower", note="clusters of others"
        ),
    }


def split(work: Path, recipe: Path) -> tuple[float, float]:
    """Seconds and peak memory (MB) of `eyas split`."""
    command = [sys.executable, "-m", "eyas_host", "split", str(recipe), "--runs", str(work / "runs")]
    started = time.perf_counter()
    with subprocess.Popen(command) as process:
        peak = Peak(process.pid)
        thread = threading.Thread(target=peak.watch, daemon=True)
        thread.start()
        code = process.wait()
        seconds = time.perf_counter() - started
        peak.ended.set()
        thread.join()
    if code:
        sys.exit(f"eyas split ended with {code}")
    return seconds, peak.mb


class Peak:
    """The most memory that a process and those that it started use together."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.mb = 0.0
        self.ended = threading.Event()

    def watch(self) -> None:
        """Look every second."""
        while not self.ended.wait(1.0):
            self.mb = max(self.mb, sum(_proportional_mb(pid) for pid in _tree(self._pid)))


def _tree(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text(encoding="ascii").split():
                yield from _tree(int(child))


def _proportional_mb(pid: int) -> float:
    """Resident memory in which a page of several processes counts in parts: `Pss` of proc(5)."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1000
    return 0.0


def jpegs(count: int) -> Iterator[tuple[int, bytes, int]]:
    """Number, JPEG and class of each image; near-duplicates follow their first and have its class."""
    pixels = None
    for number in track(range(count), "drawing images"):
        twin = number % TWINS == 1
        if not twin:
            coarse = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            pixels = cv2.resize(coarse, (64, 64), interpolation=cv2.INTER_CUBIC)
        data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 75 if twin else 95])[1].tobytes()
        yield number, data, (number - twin) % CLASSES


def draw_tar(work: Path, count: int) -> Path:
    """One shard as WebDataset writes it."""
    path = work / f"{count}.tar"
    if path.exists():
        return path
    work.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with tarfile.open(part, "w") as archive:
        for number, data, label in jpegs(count):
            for suffix, content in (("jpg", data), ("cls", f"class {label}".encode())):
                member = tarfile.TarInfo(f"{number:07d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            archive.getmembers().clear()  # else it keeps a million of them
    part.replace(path)
    return path


def draw_folder(work: Path, count: int) -> Path:
    """Class folders."""
    root = work / f"{count}"
    done = root.with_suffix(".done")
    if not done.exists():
        for label in range(CLASSES):
            (root / f"class {label}").mkdir(parents=True, exist_ok=True)
        for number, data, label in jpegs(count):
            (root / f"class {label}" / f"{number:07d}.jpg").write_bytes(data)
        done.touch()
    return root


if __name__ == "__main__":
    main()
