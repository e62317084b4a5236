"""Random folder trees, tables and image files as people have them, and what must hold of each.

Nothing but an `EyasError` is ever raised, and every image is taken or counted as left out. What is an image is
formulated here a second time: folders as the nodes of a graph, sub-folders and links as its edges.
"""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from eyas_device.camera.folder import FolderCamera
from eyas_device.errors import EyasError, ImageError
from eyas_device.preprocess import decode
from eyas_device.support.image_files import list_image_files
from eyas_host.data.class_folders import inspect_folder
from eyas_host.data.index import Index, build_index
from eyas_host.data.manifest import save_split
from eyas_host.data.sources import fingerprint, source_folders
from eyas_host.data.split import Split, split_index
from eyas_host.pipeline.runner import IMAGE_TABLE
from eyas_host.recipe.data import DataSection
from sides.strange_images import FORMATS, damage, encoded_image, sample_images

_SUFFIX = re.compile(r"(?is).*[^/.].*\.(bmp|jfif|jpe|jpe?g|png|tiff?|webp)")
_LITTER = re.compile(
    r"\..*|@eadir|#recycle|__macosx|\$recycle\.bin|lost\+found|thumbs\.db|desktop\.ini|.*\.lrdata|found\.\d\d\d",
    re.I | re.S,
)
_CLASSES = ("ring", "square", "Gerät", "猫", "valid", "a b", "-rf", "1.0", "x" * 60)
_DIVISIONS = (("train", "Val", "testing"), ("Training", "holdout"), ("train_set", "valid", "test1"), ("train", "test"))
_NAMES = (
    *("{}.heic", ".{}.png", "._{}.jpg", "{}", "{}.gif", "{}.png.part", "frame.{:06d}", "Thumbs.db", "desktop.ini"),
    *(
        "\udcfc{}.png",
        "a\n{}.png",
        "\x1b[31m{}.png",
        "\u202e{}.bmp",
        "é{}.webp",
        "e\u0301{}.webp",
        "{}.TIFF",
        "{}.jfif",
    ),
    *("{}.txt", " {}.JPG", "x" * 240 + "{}.png", "{}.npy", "#{}.png", "%{}.png", "a: {}.png", "{}.png~", "'{}\".jpeg"),
)
_FOLDERS = (
    "2021",
    "deep",
    "@eaDir",
    ".ipynb_checkpoints",
    "__MACOSX",
    "x.png",
    "Previews.lrdata",
    "FOUND.000",
    "train",
    "\udcfe",
)
_LINKS = ("file", "dangling", "itself", "class", "elsewhere", "hidden store", "root", "around", "hidden name", "pipe")


class Outcome:
    """What came of a number of examples."""

    def __init__(self) -> None:
        self.examples = 0
        self.accepted = 0
        """Examples that were used rather than refused with a reason."""
        self.images = 0
        """Images in them."""
        self.tracebacks: list[str] = []
        """Errors other than `EyasError`, and refusals without a reason."""
        self.losses: list[str] = []
        """Images that were neither taken nor counted."""

    def attempt(self, what: str, action: Callable[[], Any]) -> Any:
        """Return what `action` returns; None if it refuses, which is in order, or fails, which is noted."""
        try:
            return action()
        except EyasError as error:
            if not str(error).strip() or "Traceback" in str(error):
                self.tracebacks.append(f"{what}: a refusal without a reason: {error!r}")
        except Exception:  # what the benchmark looks for
            self.tracebacks.append(f"{what}: {traceback.format_exc(limit=-3)}")
        return None

    def expect(self, what: str, found: object, expected: object) -> None:
        """Note a loss if two counts or sets differ."""
        if found != expected:
            self.losses.append(f"{what}: {found!r:.300} instead of {expected!r:.300}")


def random_trees(count: int) -> Outcome:
    """Folder trees through `new`, `split` and the folder camera."""
    return _run(count, _tree(), _try_tree)


def random_tables(count: int) -> Outcome:
    """Tables through `split`."""
    return _run(count, _table(), _try_table)


def random_images(count: int) -> Outcome:
    """Damaged and strange image files through `split` and the folder camera."""
    return _run(count, _files(), _try_files)


def _run(count: int, strategy: st.SearchStrategy[Any], attempt: Callable[[Outcome, Path, Any], None]) -> Outcome:
    outcome = Outcome()

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def example(drawn: Any) -> None:
        outcome.examples += 1
        folder = Path(tempfile.mkdtemp(prefix="eyas-strange-"))
        try:
            attempt(outcome, folder, drawn)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    example()
    return outcome


# ------------------------------------------------------------------------------------------------------ folder trees


@st.composite
def _tree(draw: st.DrawFn) -> dict[str, Any]:
    labels = draw(st.lists(st.sampled_from(_CLASSES), min_size=1, max_size=4, unique=True))
    division = draw(st.one_of(st.just(("",)), st.just(("",)), st.sampled_from(_DIVISIONS)))
    folders = [f"{split}/{label}".lstrip("/") for split in division for label in labels]
    count = draw(st.sampled_from([0, 1, 4, 5, 6, 6, 6]))
    strange = st.tuples(
        st.sampled_from([*folders, *division, ""]),
        st.one_of(st.just(""), st.just(""), st.sampled_from(_FOLDERS)),
        st.sampled_from(_NAMES),
        st.sampled_from(["image", "image", "image", "copy", "cut", "empty", "text"]),
    )
    return {
        "folders": folders,
        "count": count,
        "by": "folders" if division != ("",) and draw(st.booleans()) else "auto",
        "strange": draw(st.lists(strange, max_size=8)),
        "links": draw(st.lists(st.tuples(st.sampled_from(folders), st.sampled_from(_LINKS)), max_size=4)),
        "skip": draw(st.sampled_from([True, True, True, False])),
        "wrapped": draw(st.sampled_from([False] * 9 + [True])),
    }


def _try_tree(outcome: Outcome, folder: Path, tree: dict[str, Any]) -> None:
    root = folder / "outer" / "set" / ("inner" if tree["wrapped"] else "")
    _write_tree(folder, root, tree)
    root = folder / "outer" / "set"
    taken, left_out = _second_formulation(root)
    outcome.images += len(taken)
    listing = outcome.attempt("lister", lambda: list_image_files(root))
    if listing is not None:
        outcome.expect("listed", {_identity(path) for path in listing.images}, taken)
        outcome.expect("images listed twice", len(listing.images), len(taken))
        outcome.expect("files left out", sum(listing.left_out.values()), left_out)
    outcome.attempt("camera", lambda: _try_camera(outcome, root, taken))
    outcome.attempt("new", lambda: inspect_folder(root))
    data = DataSection(path=str(root), by=tree["by"], skip_unreadable=tree["skip"], near_duplicates=0)
    index = _try_split(outcome, data, folder / "run")
    if index is not None:
        found = {_identity(Path(path)) for path in _paths(index)}
        beside = len(taken) - len(found)
        outcome.expect("images of the index", found <= taken, True)
        outcome.expect("taken and left out", len(found) + sum(index.left_out.values()), len(taken) + left_out)
        outcome.expect("beside", index.left_out.get("beside the class folders", 0), beside)


def _write_tree(folder: Path, root: Path, tree: dict[str, Any]) -> None:
    numbers = iter(range(100_000))
    elsewhere, store = folder / "elsewhere", root / ".store"
    for place in (elsewhere / "deep", store, root):
        place.mkdir(parents=True, exist_ok=True)
    for place in (
        elsewhere / "1.png",
        elsewhere / "deep" / "2.jpg",
        elsewhere / ".3.png",
        store / "4.png",
        store / "5",
    ):
        place.write_bytes(encoded_image(next(numbers)))
    for name in tree["folders"]:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(tree["count"]):
            (root / name / f"{number:03d}{FORMATS[number % len(FORMATS)]}").write_bytes(encoded_image(next(numbers)))
    for place, inner, name, content in tree["strange"]:
        number = next(numbers)
        path = root / place / inner / name.format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        image = encoded_image(0 if content == "copy" else number)
        path.write_bytes({"cut": image[: len(image) // 2], "empty": b"", "text": b"no image\n"}.get(content, image))
    for number, (place, kind) in enumerate(tree["links"]):
        link = root / place / f"link{number}"
        targets: dict[str, tuple[Path, str | Path]] = {
            "file": (link.with_suffix(".png"), store / "5"),
            "dangling": (link.with_suffix(".png"), "nothing"),
            "itself": (link.with_suffix(".png"), f"{link.name}.png"),
            "class": (link, root / tree["folders"][0]),
            "elsewhere": (link, elsewhere),
            "hidden store": (link, store),
            "root": (link, root),
            "around": (link, root.parent),
            "hidden name": (link.with_name(f".{link.name}"), elsewhere),
        }
        if kind == "pipe":
            os.mkfifo(link.with_suffix(".png"))
        else:
            targets[kind][0].symlink_to(targets[kind][1])


def _second_formulation(root: Path) -> tuple[set[tuple[str, str]], int]:
    """Images below `root` by real folder and name, and the count of what is left out.

    The visible folders are the nodes of a graph, sub-folders and links its edges: those that lead to a node which is
    there already, or to a folder around the root, are left out.
    """
    around = {str(parent) for parent in Path(os.path.realpath(root)).parents}
    nodes = {os.path.realpath(root): str(root)}
    waiting, edges = [os.path.realpath(root)], 0
    taken: set[tuple[str, str]] = set()
    left_out = 0
    links: list[tuple[str, str]] = []
    while waiting or links:
        if not waiting:
            real, path = links.pop(0)
            if real in nodes or real in around:
                continue
            nodes[real] = path
            waiting.append(real)
        real = waiting.pop()
        for here in sorted(Path(real).iterdir()):
            path, hidden = f"{nodes[real]}/{here.name}", _LITTER.fullmatch(here.name) is not None
            if here.is_dir() and not here.is_symlink():
                if hidden:
                    left_out += sum(not one.is_dir() or one.is_symlink() for one in here.rglob("*"))
                else:
                    edges += 1
                    if str(here) not in nodes:
                        nodes[str(here)] = path
                        waiting.append(str(here))
            elif here.is_dir() and not hidden:
                edges += 1
                links.append((os.path.realpath(here), path))
            elif here.is_file() and not hidden and _SUFFIX.fullmatch(here.name) and _is_text(path):
                taken.add((real, here.name))
            else:
                left_out += 1
    return taken, left_out + edges - (len(nodes) - 1)


def _is_text(path: str) -> bool:
    return not any("\udc80" <= character <= "\udcff" for character in path)


def _identity(path: Path) -> tuple[str, str]:
    return os.path.realpath(path.parent), path.name


def _try_camera(outcome: Outcome, root: Path, taken: set[tuple[str, str]]) -> None:
    """Every image is a frame, once; of those that cannot be decoded the camera's user hears one by one."""
    with FolderCamera.open(str(root)) as camera:
        frames = list(iter(camera.capture, None))
    outcome.expect("frames", sorted(_identity(Path(frame.source)) for frame in frames), sorted(taken))
    for frame in frames:
        outcome.attempt("frame", frame.pixels)


# ------------------------------------------------------------------------------------------------------------ tables


@st.composite
def _table(draw: st.DrawFn) -> dict[str, Any]:
    cell = st.sampled_from(
        ["ok", "bad", "1", "2", "N/A", "", " ok", "a,b", "猫", "../x", "ok\u200b", "OK", "nan", "x" * 300]
    )
    moment = st.sampled_from(
        [
            "",
            "2026-11-30T14:05",
            "30.11.2026 14:05",
            "1764511500",
            "1764511500000",
            "12/11/2026",
            "46356.5",
            "noon",
            "-1",
        ]
    )
    strange = st.tuples(
        st.integers(30, 39),
        st.one_of(st.sampled_from(["ok", "bad"]), cell),
        st.sampled_from(["g1", "g2", "g3", ""]),
        st.one_of(st.just("2026-11-30T14:05"), moment),
    )
    usual = [
        (number, ("ok", "bad")[number % 2], f"g{number // 4}", f"2026-{1 + number // 3:02d}-01") for number in range(30)
    ]
    usual = draw(st.sampled_from([usual, usual, usual, usual[:5], []]))
    return {
        "rows": [*usual, *draw(st.lists(strange, max_size=3, unique_by=lambda row: row[0]))],
        "columns": draw(
            st.sampled_from(
                [("path", "label"), ("label", "path"), ("path", "label", "group"), ("path", "label", "time")]
            )
        ),
        "header": draw(st.sampled_from([*["plain"] * 6, "upper", "blanks", "file", "none", "twice", "odd", "unnamed"])),
        "separator": draw(st.sampled_from([",", ",", ";", "\t", "|"])),
        "encoding": draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252"])),
        "newline": draw(st.sampled_from(["\n", "\r\n", "\r"])),
        "paths": draw(st.sampled_from([*["relative"] * 4, "absolute", "backslashes", "odd", "missing"])),
        "extra": draw(st.sampled_from([*[""] * 8, "sep=;\n", "\n\n", "\x00", '"', "# note\n"])),
        "by": draw(st.sampled_from(["auto", "auto", "stratified", "stratified", "group", "time"])),
    }


def _try_table(outcome: Outcome, folder: Path, table: dict[str, Any]) -> None:
    (folder / "images").mkdir()
    for number in range(40):
        (folder / "images" / f"{number}.png").write_bytes(encoded_image(number))
    path = folder / "table.csv"
    path.write_bytes(_table_text(folder, table).encode(table["encoding"], "replace"))
    outcome.images += len(table["rows"])
    data = DataSection(source="csv", path=str(path), by=table["by"], near_duplicates=0, skip_unreadable=True)
    index = _try_split(outcome, data, folder / "run")
    if index is not None:
        encoding = table["encoding"]
        written = {number: label.encode(encoding, "replace").decode(encoding) for number, label, *_ in table["rows"]}
        labels = {f"{number}.png": label.strip() for number, label in written.items()}
        outcome.expect("rows", sorted(Path(path).name for path in _paths(index)), sorted(labels))
        outcome.expect(
            "labels", {Path(one.path).name: one.label for one in index.images}.items() <= labels.items(), True
        )


def _table_text(folder: Path, table: dict[str, Any]) -> str:
    columns: list[str] = list(table["columns"])
    shown = {
        "upper": [name.upper() for name in columns],
        "blanks": [f" {name} " for name in columns],
        "file": [name.replace("path", "filename") for name in columns],
        "twice": [*columns[:-1], columns[0]],
        "odd": [f"{name}?" for name in columns],
        "unnamed": ["", *columns],
    }.get(table["header"], columns)
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=table["separator"], lineterminator=table["newline"])
    if table["header"] != "none":
        writer.writerow(shown)
    for place, (number, label, group, moment) in enumerate(table["rows"]):
        name = f"images/{number}.png"
        file = {
            "absolute": str(folder / name),
            "backslashes": name.replace("/", "\\"),
            "odd": f"./images/../{name}",
            "missing": f"nowhere/{number}.png",
        }.get(table["paths"], name)
        cells = {"path": file, "label": label, "group": group, "time": moment}
        writer.writerow([str(place)] * (table["header"] == "unnamed") + [cells[name] for name in columns])
    return str(table["extra"]) + stream.getvalue()


# ------------------------------------------------------------------------------------------------------- image files


@st.composite
def _files(draw: st.DrawFn) -> list[tuple[str, list[tuple[str, int, int]], str]]:
    change = st.tuples(
        st.sampled_from(["flip", "cut", "insert", "zero", "append", "repeat"]),
        st.integers(0, 4000),
        st.integers(0, 255),
    )
    one = st.tuples(st.sampled_from(list(sample_images())), st.lists(change, max_size=3), st.sampled_from(FORMATS))
    return draw(st.lists(one, min_size=1, max_size=6))


def _try_files(outcome: Outcome, folder: Path, files: list[tuple[str, list[tuple[str, int, int]], str]]) -> None:
    root = folder / "outer" / "set"
    readable: set[str] = set()
    for number, (sample, changes, suffix) in enumerate(files):
        path = root / ("ring", "square")[number % 2] / f"{number}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(damage(sample_images()[sample], changes))
        try:
            decode(path.read_bytes(), where=str(path))
            readable.add(str(path))
        except ImageError:
            pass
        except Exception:  # what the benchmark looks for
            outcome.tracebacks.append(f"decode {sample} {changes}: {traceback.format_exc(limit=-3)}")
    outcome.images += len(files)
    for label in ("ring", "square"):
        for number in range(6):
            path = root / label / f"good{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded_image(1000 + number + 10 * len(label)))
            readable.add(str(path))
    taken, _ = _second_formulation(root)
    outcome.attempt("camera", lambda: _try_camera(outcome, root, taken))
    data = DataSection(path=str(root), near_duplicates=0, skip_unreadable=True)
    index = _try_split(outcome, data, folder / "run")
    if index is not None:
        outcome.expect("files", sorted(_identity(Path(path)) for path in _paths(index)), sorted(taken))
        found = {one.path for one in index.images} | {copy.path for copy, _ in index.copies}
        outcome.expect("what the device reads", found, readable)


# ------------------------------------------------------------------------------------------------------------ shared


def _try_split(outcome: Outcome, data: DataSection, run: Path) -> Index | None:
    """The index of `data`, if it is not refused; its split goes through the run's files and back."""
    before = outcome.attempt("fingerprint", lambda: fingerprint(data))
    index: Index | None = outcome.attempt("index", lambda: build_index(data))
    outcome.expect("fingerprint", outcome.attempt("fingerprint", lambda: fingerprint(data)), before)
    manifest = None if index is None else outcome.attempt("split", lambda: split_index(index, data, 0))
    if index is None or manifest is None:
        return index
    outcome.accepted += 1
    run.mkdir()
    outcome.attempt("save", lambda: save_split(manifest, run, index, source_folders(data)))
    loaded = outcome.attempt("load", lambda: Split.load(run).manifest)
    if loaded is not None:
        aside = [image for images in loaded.set_aside.values() for image in images]
        assigned = [image.path for image in (*loaded.train, *loaded.validation, *loaded.test, *aside)]
        outcome.expect("assigned", sorted(assigned), sorted(image.path for image in index.images))
        with (run / IMAGE_TABLE).open(encoding="utf-8", newline="") as stream:
            rows = [row["path"] for row in csv.DictReader(stream)]
        outcome.expect("index.csv", sorted(rows), sorted(_paths(index)))
    return index


def _paths(index: Index) -> list[str]:
    """Path of every image that the index has, knows as a copy, or could not read."""
    unreadable = (image.path for image in index.unreadable)
    return [*(one.path for one in index.images), *(copy.path for copy, _ in index.copies), *unreadable]
