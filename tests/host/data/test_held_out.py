"""The held-out test set: no access until the bundle is packed from the current outputs, and every access is logged."""

from __future__ import annotations

import errno
import fcntl
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from eyas_host.data import dataset
from eyas_host.data.access_log import LoggedAccess, append_access, read_accesses
from eyas_host.data.dataset import DecodedImages
from eyas_host.data.index import build_index
from eyas_host.data.manifest import save_split
from eyas_host.data.sources import source_folders
from eyas_host.data.split import Split, split_index
from eyas_host.pipeline.runner import RunContext, Stage, StageResult, run_chain
from eyas_host.recipe import Recipe
from eyas_host.recipe.data import DataSection
from eyas_host.recipe.run import RunSection
from eyas_host.support.errors import DataError
from tests.support.shapes import draw_folder

NAMES = ("split", "teach", "distill", "prune", "qat", "compile", "verify", "pack", "report")


def evaluate_on_test(context: RunContext) -> StageResult:
    dataset = Split.load(context.root).open_test("the report")
    return StageResult(f"{len(dataset)} images")


def writes(name: str, text: str) -> Stage:
    def run(context: RunContext) -> StageResult:
        if name == "split":
            data = DataSection(path=str(context.root.parent / "images"), split=(0.5, 0.25, 0.25))
            index = build_index(data)
            save_split(split_index(index, data, 0), context.root, index, source_folders(data))
        else:
            context.folder(name).mkdir(parents=True, exist_ok=True)
            (context.folder(name) / "made").write_text(text)
        return StageResult(text)

    needs = {"split": (), "report": ("split", "pack")}.get(name, ("split", NAMES[NAMES.index(name) - 1]))
    return Stage(name, ("run",), tuple(dict.fromkeys(needs)), evaluate_on_test if name == "report" else run)


def chain(text: str = "one") -> list[Stage]:
    return [writes(name, text) for name in NAMES]


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    draw_folder(tmp_path / "images", count=8, width=40, height=36, labels=("ring", "square"))
    return RunContext(Recipe(run=RunSection(name="toy")), tmp_path / "run")


@pytest.mark.parametrize("stage", NAMES[:-2])
def test_no_access_before_the_bundle_is_packed(context: RunContext, stage: str) -> None:
    run_chain(chain(), context, until=stage)
    with pytest.raises(DataError, match="held out until the bundle is packed") as caught:
        Split.load(context.root).open_test("too early")
    assert f"stage {NAMES[NAMES.index(stage) + 1]!r} has not finished" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert Split.load(context.root).test_accesses() == []
    assert not (context.root / "test-set").exists()


def test_the_report_is_logged_with_the_models_digest(context: RunContext) -> None:
    run_chain(chain(), context)
    (access,) = Split.load(context.root).test_accesses()
    assert access.reason == "the report" and not access.early
    assert len(access.models) == 64
    run_chain(chain(), context)
    assert len(Split.load(context.root).test_accesses()) == 1
    run_chain(chain(), context, start="report")
    again = Split.load(context.root).test_accesses()
    assert len(again) == 2 and again[1].models == access.models


def test_a_stage_that_ran_again_holds_it_out_again(context: RunContext) -> None:
    run_chain(chain(), context)
    before = Split.load(context.root).test_accesses()[0].models
    run_chain(chain("two"), context, only="distill")
    with pytest.raises(DataError, match="stage 'prune' has not run on the current inputs"):
        Split.load(context.root).open_test("again")
    with pytest.raises(DataError, match="held out"):
        run_chain(chain("two"), context, only="report")
    run_chain(chain("two"), context, start="distill")
    accesses = Split.load(context.root).test_accesses()
    assert len(accesses) == 2 and accesses[1].models != before


def test_identical_outputs_do_not_revoke_access(context: RunContext) -> None:
    run_chain(chain(), context)
    run_chain(chain(), context, only="teach")
    assert len(Split.load(context.root).open_test("the same models")) == 4


def test_an_early_access_is_logged_as_early(context: RunContext) -> None:
    run_chain(chain(), context, until="distill")
    assert len(Split.load(context.root).open_test("a benchmark of networks", early=True)) == 4
    run_chain(chain(), context)
    Split.load(context.root).open_test("and after", early=True)
    assert [(access.reason, access.early) for access in Split.load(context.root).test_accesses()] == [
        ("a benchmark of networks", True),
        ("the report", False),
        ("and after", False),
    ]


# One log for all runs on the same images


def beside(context: RunContext) -> Path:
    (log,) = (context.root.parent / "images/.eyas/test-sets").glob("*.jsonl")
    return log


def test_another_run_and_a_removed_run_do_not_make_it_unread(context: RunContext) -> None:
    run_chain(chain(), context)
    shutil.rmtree(context.root)
    other = RunContext(context.recipe, context.root.with_name("other"))
    run_chain(chain(), other, until="split")
    split = Split.load(other.root)
    assert [(access.run, access.reason) for access in split.test_accesses()] == [("run", "the report")]
    run_chain(chain(), other)
    assert [access.run for access in split.test_accesses()] == ["run", "other"]
    assert split.access_log().problems == () and Path(split.access_log().path) == beside(context)


def test_a_test_set_that_grew_is_still_read_and_another_one_is_not(tmp_path: Path) -> None:
    images = [f"{number:064d}" for number in range(20)]
    sources = [str(tmp_path)]
    append_access(LoggedAccess(time=1.0, reason="first"), images, sources, tmp_path / "run")
    assert len(read_accesses([*images, "f" * 64, "e" * 64], sources, tmp_path / "next").accesses) == 1
    assert (
        len(read_accesses(images[:10] + [f"{n:064x}" for n in range(2000, 2011)], sources, tmp_path / "next").accesses)
        == 0
    )
    assert len(read_accesses(["a" * 64], sources, tmp_path / "next").accesses) == 0


@pytest.mark.parametrize(
    "change", ["edited", "edited last", "removed", "shortened", "inserted", "reordered", "garbage", "deleted"]
)
def test_an_edited_log_is_noticed(tmp_path: Path, change: str) -> None:
    images, sources, run = ["a" * 64, "b" * 64], [str(tmp_path)], tmp_path / "run"
    for number in range(4):
        append_access(LoggedAccess(time=float(number), reason=f"report {number}"), images, sources, run)
    assert read_accesses(images, sources, run).problems == ()
    (log,) = (tmp_path / ".eyas/test-sets").glob("*.jsonl")
    lines = log.read_bytes().splitlines(keepends=True)
    if change == "edited":
        lines[1] = lines[1].replace(b"report 1", b"nothing")
    elif change == "edited last":
        lines[-1] = lines[-1].replace(b"report 3", b"nothing")
    elif change == "removed":
        del lines[1]
    elif change == "shortened":
        del lines[-1]
    elif change == "inserted":
        lines.insert(1, lines[0])
    elif change == "reordered":
        lines[1], lines[2] = lines[2], lines[1]
    elif change == "garbage":
        lines[1] = b"\xff{\n"
    if change == "deleted":
        log.unlink()
    else:
        log.write_bytes(b"".join(lines))
    found = read_accesses(images, sources, run)
    assert found.problems and all(str(tmp_path) in line or "missing in the log" in line for line in found.problems)
    assert len(found.accesses) >= 4, "the run's own lines are still counted"
    append_access(LoggedAccess(time=9.0, reason="after"), images, sources, run)
    again = read_accesses(images, sources, run)
    assert again.problems and again.accesses[-1].reason == "after"


def test_a_log_without_a_writable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the images if possible, else in the user's data folder, else beside the runs; never in a package."""
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder is needed")
    package = [str(Path(msgspec.__file__).parent)]
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    for number, sources in enumerate(([], [str(blocked)], package)):
        append_access(LoggedAccess(time=1.0, reason="a"), [f"{number:064d}"], sources, tmp_path / "run")
        log = read_accesses([f"{number:064d}"], sources, tmp_path / "run")
        assert Path(log.path).parent == tmp_path / "home/eyas/test-sets" and len(log.accesses) == 1
    assert not (Path(msgspec.__file__).parent / ".eyas").exists()
    monkeypatch.setenv("XDG_DATA_HOME", str(blocked))
    append_access(LoggedAccess(time=1.0, reason="a"), ["0" * 64], [str(blocked)], tmp_path / "runs/one")
    log = read_accesses(["0" * 64], [str(blocked)], tmp_path / "runs/two")
    assert Path(log.path).parent == tmp_path / "runs/.eyas/test-sets" and len(log.accesses) == 1
    with pytest.raises(DataError, match=r"access log of the held-out test set cannot be written.*XDG_DATA_HOME"):
        append_access(LoggedAccess(time=1.0, reason="a"), ["0" * 64], [str(blocked)], blocked / "run")


def test_images_that_moved_change_no_input(context: RunContext, tmp_path: Path) -> None:
    """Another folder, other file names: only the split runs again."""
    run_chain(chain(), context)
    moved = tmp_path / "elsewhere"
    (tmp_path / "images").rename(moved)
    for label in ("ring", "square"):
        for number, path in enumerate(sorted((moved / label).iterdir())):
            path.rename(path.with_name(f"renamed-{7 - number}{path.suffix}"))
    before = {stage: context.record(stage) for stage in NAMES}
    (tmp_path / "images").symlink_to(moved)
    run_chain(chain(), context, only="split")
    assert context.record("split") != before["split"]
    run_chain(chain(), context)
    assert all(context.record(stage) == before[stage] for stage in NAMES[1:])
    split = Split.load(context.root)
    assert "renamed" in split.train.images[0].path and split.train.pixels[0].shape == (36, 40, 3)
    assert split.test_accesses()[0].reason == "the report"


# Images are decoded on access


def test_decoded_images_are_kept_up_to_the_limit(context: RunContext, monkeypatch: pytest.MonkeyPatch) -> None:
    run_chain(chain(), context, until="split")
    train = Split.load(context.root).train
    each = 40 * 36 * 3
    monkeypatch.setattr(dataset, "MAX_CACHED_BYTES", 3 * each)
    none = DecodedImages(train.images, None)  # less than half would fit
    assert len(none) > 6 and not any(np.shares_memory(one, two) for one, two in zip(none, none, strict=True))
    monkeypatch.setattr(dataset, "MAX_CACHED_BYTES", 6 * each)
    some = DecodedImages(train.images, None)
    passes = list(some), list(some)
    assert not any(np.shares_memory(one, two) for one, two in zip(*passes, strict=True)), "a pass keeps nothing"
    first = [some[number] for number in range(len(some))]
    second, again = list(some), list(some)
    same = [np.shares_memory(one, two) for one, two in zip(second, again, strict=True)]
    assert same == [True] * 6 + [False] * (len(some) - 6)
    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))
    assert [p.shape for p in some[1:3]] == [(36, 40, 3)] * 2 and some[-1].shape == (36, 40, 3)
    with pytest.raises(IndexError):
        _ = some[len(some)]


def test_a_manifest_without_the_optional_fields_is_read(context: RunContext) -> None:
    run_chain(chain(), context, until="split")
    path = context.root / "split/manifest.json"
    old = {"strategy", "seed", "fractions", "labels", "train", "validation", "test", "counts"}
    path.write_bytes(msgspec.json.encode({k: v for k, v in msgspec.json.decode(path.read_bytes()).items() if k in old}))
    split = Split.load(context.root)
    assert (
        len(split.train) == len(split.manifest.train) > 0
        and split.manifest.clusters == ()
        and split.manifest.set_aside == {}
    )


def test_a_user_without_a_home_has_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    append_access(LoggedAccess(time=1.0, reason="a"), ["0" * 64], [], tmp_path / "runs/one")
    log = read_accesses(["0" * 64], [], tmp_path / "runs/one")
    assert len(log.accesses) == 1 and not log.problems


def test_a_file_system_without_locks_has_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*words: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    append_access(LoggedAccess(time=1.0, reason="a"), ["0" * 64], [str(tmp_path)], tmp_path / "runs/one")
    assert len(read_accesses(["0" * 64], [str(tmp_path)], tmp_path / "runs/one").accesses) == 1
