"""How much of everything the demonstration of the fleet has, and its first model."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from sides.demo_scenes import FOR_TRAINING, PER_LABEL, write_images

_RECIPE = """# The first model of the demonstration: six kinds of surface, in photographs that scikit-image ships.
[run]
name = "surfaces"
processes = {processes}
[data]
path = "images"
[image]
size = 64
[teacher]
model = "tf_efficientnet_lite0"
head_epochs = {head_epochs}
epochs = 0
[student]
model = "mobilenetv3_small_100"
views = {views}
epochs = {epochs}
labels_only = false
[prune]
method = "none"
[quantize]
epochs = 2
[compile]
runtimes = ["litert"]
[gate]
max_drop = 0.1
"""


class Form(msgspec.Struct, frozen=True, kw_only=True):
    """How much of everything there is."""

    devices: int = 16
    dirty: float = 4.0
    """Day on which a lens becomes dirty."""
    season: float = 5.0
    """Day on which the season changes."""
    last: float = 8.0
    """Day on which labels are asked for whatever the alarms."""
    days: float = 11.0
    at_the_end: float = 1.0
    """Days at the end whose accuracy counts."""
    wait_hours: int = 18
    """From the alarms until people have time to label."""
    versions: tuple[str, ...] = ("1.1.0", "1.2.0")
    """Each is trained from the labels of its time, and kept out where it is worse."""
    labelled: int = 300
    training: int = FOR_TRAINING
    """Pieces of each photograph that the first version learns from."""
    scenes: int = PER_LABEL - FOR_TRAINING
    """Further pieces of each, which cameras see."""
    head_epochs: int = 8
    views: int = 3
    epochs: int = 16
    """Of the first version's student, and of a retraining."""
    processes: int | None = None
    """Of each training; None: one for each core, if it pays."""
    minutes: float = 15.0
    """It may take."""
    shortened: str = ""
    """Note of figures that depend on the models, where these are shortened."""


FULL = Form()
QUICK = Form(
    devices=8,
    dirty=3.5,
    season=4.0,
    last=5.5,
    days=7.0,
    at_the_end=0.5,
    wait_hours=10,
    versions=("1.1.0",),
    labelled=150,
    training=30,
    scenes=24,
    head_epochs=4,
    views=2,
    epochs=6,
    processes=1,
    minutes=5.0,
    shortened="a shortened demonstration: 8 devices, 7 days, short trainings",
)


def eyas(folder: Path, *words: str, fails: bool = False) -> subprocess.CompletedProcess[str]:
    """Run `eyas WORDS` in a folder; one that fails ends the demonstration, with its output, unless it may."""
    command = [sys.executable, "-m", "eyas_host", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode and not (fails and done.returncode == 1):
        raise SystemExit(f"eyas {' '.join(words)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def recipe_of(form: Form) -> str:
    """The recipe of the first version."""
    processes = '"auto"' if form.processes is None else form.processes
    return _RECIPE.format(processes=processes, head_epochs=form.head_epochs, views=form.views, epochs=form.epochs)


def first_model(place: Path, form: Form) -> float:
    """Train and register the first version where it is not there; seconds that it took."""
    begun = time.monotonic()
    if not (place / "registry").is_dir():
        place.mkdir(parents=True, exist_ok=True)
        write_images(place / "images", form.training)
        (place / "surfaces.toml").write_text(recipe_of(form), encoding="utf-8")
        print("training the first model ...", flush=True)
        eyas(place, "distill", "surfaces.toml")
        eyas(place, "models", "add", "runs/surfaces", "--alias", "champion")
        shutil.copytree(place / "registry", place / "first-registry")
    shutil.rmtree(place / "registry")  # later versions are those of an earlier demonstration
    shutil.copytree(place / "first-registry", place / "registry")
    for number in form.versions:
        shutil.rmtree(place / f"runs/surfaces-{number}", ignore_errors=True)
    return time.monotonic() - begun
