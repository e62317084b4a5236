"""Images of pages for the documentation: of a report of drawn images, and of the drift of a simulated fleet.

    python benchmarks/report_images.py            # runs the main job first, in a temporary folder (some minutes)
    python benchmarks/report_images.py --page runs/drawn-shapes/report.html
    python benchmarks/report_images.py --drift    # simulates a fleet for nine days (a minute)

Needs what the tests need (`make install system-deps`): their shapes, and Chromium.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from drift_streams import Scripts  # noqa: E402
from eyas_host.fleet.drift.fleet_state import Tuning  # noqa: E402
from eyas_host.fleet.drift.monitor import Monitor  # noqa: E402
from eyas_host.fleet.drift.page import write_page  # noqa: E402
from eyas_host.fleet.drift.profile import STEPS_OF_DAY  # noqa: E402
from eyas_host.fleet.store.database import Batch, Store  # noqa: E402
from tests.support.browser import chromium  # noqa: E402
from tests.support.drift_parts import BEGIN, DAY, batches  # noqa: E402
from tests.support.shapes import draw_folder  # noqa: E402

IMAGES = ROOT / "docs" / "images"
WIDTHS = {1280: 1180, 1920: 1180, 390: 1500}
"""Width of the window -> height of the image, pixels."""
RECIPE = """
[cost]           # a missed cross costs ten times as much as any other mistake
table = { cross = { circle = 10, ring = 10, square = 10, triangle = 10 } }
other = 1
currency = "EUR"

[accept]
min_balanced_accuracy = 0.8
min_recall = 0.8
"""
SETTINGS = {"image.size": 128, "data.split": [0.5, 0.2, 0.3], "student.views": 3, "student.epochs": 12}
SHORT = {"teacher.epochs": 2, "prune.epochs": 6, "quantize.epochs": 2}
_RARE = 60
"""Images of the rarest class; the others have 100."""
SITES = {"north": 8, "south": 9, "harbour": 7}
"""Site -> cameras of the simulated fleet."""
MISTAKES = "[aria-label^='Confusion matrix']"


def main() -> None:
    """Draw, run and take the screenshots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="a report that exists already")
    parser.add_argument("--into", type=Path, default=IMAGES, help="folder of the images")
    parser.add_argument("--drift", action="store_true", help="the page of drift instead")
    args = parser.parse_args()
    if args.drift:
        with tempfile.TemporaryDirectory() as folder:
            take_drift(drift(Path(folder)), args.into)
        return
    if args.page is not None:
        take(args.page, args.into)
        return
    with tempfile.TemporaryDirectory() as folder:
        take(run(Path(folder)), args.into)


def run(folder: Path) -> Path:
    """Run the main job on drawn shapes in `folder` and return the path of its page."""
    draw_folder(folder / "images", count=100)
    for path in sorted((folder / "images" / "cross").iterdir())[_RARE:]:
        path.unlink()
    _eyas(folder, "new", "images", "--name", "drawn-shapes")
    recipe = folder / "models" / "drawn-shapes" / "recipe.toml"
    recipe.write_text(recipe.read_text(encoding="utf-8") + RECIPE, encoding="utf-8")
    settings = [word for key, value in (SETTINGS | SHORT).items() for word in ("--set", f"{key}={value}")]
    _eyas(folder, "distill", recipe, *settings)
    return folder / "runs" / "drawn-shapes" / "report.html"


def drift(folder: Path) -> Path:
    """Simulate cameras of three sites and return the path of the page of their drift.

    A lens becomes dirty, the light of a site changes, a new object comes, a camera is dirty for hours, and one is new.
    """
    first = dict(zip(SITES, np.cumsum([0, *SITES.values()]), strict=False))
    names = [f"{site}-{number + 1}" for site, count in SITES.items() for number in range(count)]
    scripts = Scripts.stable(len(names))

    def happens(device: int, kind: str, strength: float, start: float, stop: float = np.inf) -> None:
        scripts.kind[device], scripts.strength[device] = kind, strength
        scripts.start[device], scripts.stop[device] = start * STEPS_OF_DAY, stop * STEPS_OF_DAY

    happens(first["north"] + 2, "dirt", 3.0, 7.3)
    for number in range(5):
        happens(first["south"] + number, "light", 3.5, 7.8)
    happens(first["harbour"] + 4, "new class", 2.5, 8.0)
    happens(first["harbour"] + 2, "dirt", 4.0, 5.9, 6.1)
    tuning, now = Tuning(profile_days=3, calibration_days=2), BEGIN + 9 * DAY + 600
    sites = [name.rpartition("-")[0] for name in names]
    with Store(f"sqlite:///{folder / 'fleet.db'}") as store:
        for arrival, batch in batches(names, scripts, 9, sites=sites):
            known = [one for one in batch if one.id.device != names[-1] or arrival > 7 * DAY]
            store.add(Batch(BEGIN + arrival, known))
        monitor = Monitor(store, tuning, clock=lambda: now)
        monitor.catch_up()
        write_page(store, monitor, folder / "drift.html", now)
    return folder / "drift.html"


def take_drift(page: Path, into: Path) -> None:
    """Write `drift-1280.png`: the top of the page, with its first plot."""
    into.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": 1280, "height": 1250})
        tab.goto(page.resolve().as_uri())
        _save(tab.screenshot(), into / "drift-1280.png")


def take(page: Path, into: Path) -> None:
    """Write `report-WIDTH.png`, the top of the page at each width, and `report-mistakes.png`, a section of it."""
    into.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for width, height in WIDTHS.items():
            tab = browser.new_page(viewport={"width": width, "height": height})
            tab.goto(page.resolve().as_uri())
            _save(tab.screenshot(), into / f"report-{width}.png")
            tab.close()
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.goto(page.resolve().as_uri())
        _save(tab.locator(f"section:has({MISTAKES})").screenshot(), into / "report-mistakes.png")


def _save(png: bytes, path: Path) -> None:
    screenshot = Image.open(io.BytesIO(png)).convert("RGB")
    screenshot.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def _eyas(folder: Path, *arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "eyas_host", *map(str, arguments)], cwd=folder, check=True)


if __name__ == "__main__":
    main()
