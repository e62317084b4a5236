"""The held-out test set: no access until the bundle is packed from the current outputs, and every access is logged."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from eyas_host.data import dataset
from eyas_host.data.dataset import DecodedImages
from eyas_host.data.index import build_index
from eyas_host.data.split import Split, save_split, split_index
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
            save_split(split_index(index, data, 0), context.root, index)
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


def test_a_log_without_the_optional_fields_is_read(context: RunContext) -> None:
    run_chain(chain(), context, until="split")
    (context.root / "test-set").mkdir()
    (context.root / "test-set/access.jsonl").write_text('{"time":1.0,"reason":"long ago"}\n')
    (access,) = Split.load(context.root).test_accesses()
    assert access.reason == "long ago" and access.models == ""


# Images are decoded on access


def test_decoded_images_are_kept_up_to_the_limit(context: RunContext, monkeypatch: pytest.MonkeyPatch) -> None:
    run_chain(chain(), context, until="split")
    train = Split.load(context.root).train
    each = 40 * 36 * 3
    monkeypatch.setattr(dataset, "MAX_CACHED_BYTES", 3 * each)
    some = DecodedImages(train.images, None)
    first = [some[number] for number in range(len(some))]
    second, again = list(some), list(some)
    same = [np.shares_memory(one, two) for one, two in zip(second, again, strict=True)]
    assert same == [True] * 3 + [False] * (len(some) - 3)
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
    assert len(split.train) == 8 and split.manifest.clusters == () and split.manifest.set_aside == {}
