"""Pictures of a report of drawn images for the documentation: a run of the main job, then a browser at three widths.

    python benchmarks/report_images.py            # runs the main job first, in a temporary folder (some minutes)
    python benchmarks/report_images.py --page runs/drawn-shapes/report.html

Needs what the tests need (`make install system-deps`): their shapes, and Chromium.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.browser import chromium  # noqa: E402
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
MISTAKES = "[aria-label^='Confusion matrix']"


def main() -> None:
    """Draw, run and take the screenshots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="a report that exists already")
    parser.add_argument("--into", type=Path, default=IMAGES, help="folder of the images")
    args = parser.parse_args()
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
