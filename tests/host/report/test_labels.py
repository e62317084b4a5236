"""`eyas labels check`: which pairs are shown, in which order, what it answers, and that it needs no split."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyas_device.bundle import sha256
from eyas_host.data.duplicates import BITS
from eyas_host.data.file_info import FileInfo
from eyas_host.data.index import build_index
from eyas_host.data.label_pairs import find_label_pairs
from eyas_host.data.manifest import MANIFEST, save_split
from eyas_host.data.sources import LabelledImage
from eyas_host.data.split import split_index
from eyas_host.pipeline.runner import RECORD, RunContext, StageRecord
from eyas_host.recipe.load import load_recipe
from eyas_host.report.labels import check_labels, render_label_check
from tests.support.inside import eyas
from tests.support.shapes import draw_folder


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 24)), max_size=14),
    st.sampled_from([0, 4, 16]),
)
def test_pairs_are_the_nearest_of_another_label(drawn: list[tuple[int, int, int]], max_bits: int) -> None:
    """Against all pairs, one by one: hashes with a number of bits flipped from one of four; equal ones are one file."""
    bases = np.random.default_rng(0).integers(0, 2, (4, BITS), dtype=np.uint8)
    images, files, bits = [], {}, []
    for number, (label, base, flipped) in enumerate(drawn):
        own = bases[base].copy()
        own[:flipped] ^= 1
        packed = np.packbits(own).tobytes()
        sha = hashlib.sha256(packed).hexdigest()
        images.append(LabelledImage(path=f"/{number:02d}", label="abc"[label], sha256=sha))
        files[sha] = FileInfo(8, 8, "grey", 8, packed)
        bits.append(own)
    found = find_label_pairs(images, files, max_bits)
    distance = [[int((one != two).sum()) for two in bits] for one in bits]
    nearest = {}
    for row, image in enumerate(images):
        others = [n for n, other in enumerate(images) if other.label != image.label and distance[row][n] <= max_bits]
        if others:
            nearest[image.path] = min(distance[row][n] for n in others)
    shown: dict[str, int] = {}
    for pair in found:
        assert pair.one.label != pair.two.label and pair.identical == (pair.bits == 0)
        for image in (pair.one, pair.two):
            shown[image.path] = min(pair.bits, shown.get(image.path, BITS))
    assert shown == nearest
    assert [pair.bits for pair in found] == sorted(pair.bits for pair in found)
    assert len({(pair.one.path, pair.two.path) for pair in found}) == len(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes; a square that is also a ring, another that is one re-encoded, and a file that is no image."""
    root = tmp_path_factory.mktemp("labels")
    images = draw_folder(root / "images", count=8, labels=("ring", "square"))
    shutil.copy(images / "square/000.png", images / "ring/same.png")
    cv2.imwrite(str(images / "ring/near.jpg"), cv2.imread(str(images / "square/002.png")))
    (images / "ring/broken.png").write_bytes(b"none")
    (root / "recipe.toml").write_text('[run]\nname = "toy"\n[data]\npath = "images"\nby = "stratified"\n')
    return root


def test_pairs_are_shown_where_the_split_is_refused(folder: Path) -> None:
    assert eyas(folder, "split", "recipe.toml", "--set", "data.skip_unreadable=true").code == 2
    done = eyas(folder, "labels", "check", "recipe.toml")
    assert done.code == 1
    assert "18 images: 2 pairs of look-alikes with two labels (1 identical); 1 unreadable left out: " in done.err
    page = (folder / "runs/toy/labels/check.html").read_text(encoding="utf-8")
    assert page.index("ring/same.png") < page.index("ring/near.jpg")  # in order of suspicion
    assert "the same file twice" in page and re.search(r"\d+ of 256 bits differ", page)
    assert page.count('src="data:image/jpeg;base64,') == 4
    assert str(folder) not in page and "<li>ring/broken.png: " in page
    assert not re.search(r"<script|https?://|<link", page)


def test_nothing_to_look_at(folder: Path, tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", count=3, labels=("ring", "square"))
    shutil.copy(folder / "recipe.toml", tmp_path)
    done = eyas(tmp_path, "labels", "check", "recipe.toml", "--set", "data.near_duplicates=0")
    assert done.code == 0 and "6 images: 0 pairs of look-alikes with two labels" in done.err
    assert "None." in (tmp_path / "runs/toy/labels/check.html").read_text(encoding="utf-8")


def test_labels_that_the_teacher_contradicts(tmp_path: Path) -> None:
    """Only of validation, only where it is sure, and only if its predictions are of the present split."""
    draw_folder(tmp_path / "images", count=10, labels=("ring", "square"))
    (tmp_path / "recipe.toml").write_text('[run]\nname = "toy"\n[data]\npath = "images"\n')
    recipe = load_recipe(tmp_path / "recipe.toml")
    context = RunContext(recipe, tmp_path / "runs/toy")
    manifest = split_index(build_index(recipe.data), recipe.data, 0)
    save_split(manifest, context.root, sources=[str(tmp_path / "images")])
    assert check_labels(context).contradictions is None
    images = manifest.validation
    logits = np.array([[2.0, -2.0] if image.label == "ring" else [-2.0, 2.0] for image in images], dtype=np.float32)
    logits[0] = -logits[0]
    logits[1] = (0.1, -0.1) if images[1].label == "square" else (-0.1, 0.1)
    (context.root / "verify").mkdir()
    np.savez(context.root / "verify/logits.npz", teacher=logits)
    needed = {
        "stage": "verify",
        "inputs": {MANIFEST.as_posix(): sha256(context.root / MANIFEST)},
        **{key: {} for key in ("sources", "recipe", "libraries", "outputs", "sizes", "times_ns", "facts")},
        **dict.fromkeys(("seed", "finished", "seconds", "peak_rss_mb"), 0),
        **dict.fromkeys(("device", "code", "code_version", "summary"), ""),
        "machines": [],
    }
    record = msgspec.convert(needed, StageRecord)
    (context.root / "verify" / RECORD).write_bytes(msgspec.json.encode(record))
    check = check_labels(context)
    assert check.contradictions is not None
    (found,) = check.contradictions
    assert found.image.sha256 == images[0].sha256 and found.predicted != images[0].label
    assert found.confidence == pytest.approx(1 / (1 + np.exp(-4.0)))
    assert "1 label that the teacher contradicts" in check.summary
    assert "98.2 %" in render_label_check("toy", check)
    stale = msgspec.structs.replace(record, inputs={MANIFEST.as_posix(): "of another split"})
    (context.root / "verify" / RECORD).write_bytes(msgspec.json.encode(stale))
    assert check_labels(context).contradictions is None
