"""A bundle on a second labelled set: figures beside sklearn's, images that the run has seen, sets that are refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest
import scipy.special
from scipy.stats import norm
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score, recall_score, roc_auc_score
from typer.testing import CliRunner

from eyas_device.bundle import MANIFEST, sha256
from eyas_device.errors import BundleError
from eyas_device.predict import Classifier
from eyas_device.preprocess import prepare, read_image
from eyas_host.cli.app import app
from eyas_host.data.index import build_index
from eyas_host.data.manifest import save_split
from eyas_host.data.split import split_index
from eyas_host.evaluation.labelled_figures import Evaluation
from eyas_host.evaluation.labelled_set import evaluate_bundle
from eyas_host.recipe.data import DataSection
from eyas_host.report.labelled_set import render_evaluation
from eyas_host.support.errors import DataError
from tests.support import tiny
from tests.support.bundles import TEMPERATURE
from tests.support.inside import eyas

ARTEFACTS = ("litert-fp32", "litert-int8", "openvino-fp32", "onnx-fp32")
PER_LABEL = 8


def draw(folder: Path, *, seed: int = 5000, count: int = PER_LABEL) -> Path:
    """Class folders; the last two images of each label are drawn as the next label, so that there are mistakes."""
    for number, label in enumerate(tiny.LABELS):
        (folder / label).mkdir(parents=True)
        for image in range(count):
            drawn = tiny.LABELS[(number + (image >= count - 2)) % len(tiny.LABELS)]
            cv2.imwrite(str(folder / label / f"{image}.png"), tiny.draw_shape(drawn, seed + image))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("evaluated") / "line <2>")


@pytest.fixture(scope="module")
def evaluation(pristine_bundle: Path, source: Path) -> Evaluation:
    (source / "notes.heic").write_bytes(b"x")
    return evaluate_bundle(pristine_bundle, source)


@pytest.fixture
def run(pristine_bundle: Path, tmp_path: Path) -> Path:
    """A run's folder with a split of other images, and the bundle."""
    root = tmp_path / "run"
    shutil.copytree(pristine_bundle, root / "bundle")
    data = DataSection(path=str(draw(tmp_path / "trained", seed=7000, count=12)), split=(0.5, 0.25, 0.25))
    index = build_index(data)
    save_split(split_index(index, data, seed=0), root, index)
    return root


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "120"})


@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_figures_are_those_of_sklearn_on_the_devices_own_predictions(
    pristine_bundle: Path, source: Path, evaluation: Evaluation, artefact: str
) -> None:
    found = next(one for one in evaluation.artefacts if one.name == artefact)
    files = sorted(source.rglob("*.png"))
    truth = np.array([tiny.LABELS.index(path.parent.name) for path in files])
    with Classifier.open(pristine_bundle, artefact=artefact) as classifier:
        predictions = [classifier.predict(read_image(path)) for path in files]
        logits = np.stack([classifier.runtime.infer(prepare(read_image(path), tiny.SPEC)).copy() for path in files])
    predicted = np.array([prediction.index for prediction in predictions])
    probabilities = scipy.special.softmax(logits.astype(np.float64) / TEMPERATURE, axis=1)
    assert np.stack([prediction.probabilities for prediction in predictions]) == pytest.approx(probabilities, abs=1e-6)
    assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(truth, predicted))
    assert found.f1 == pytest.approx(f1_score(truth, predicted, average="macro"))
    scores = [roc_auc_score(truth == label, probabilities[:, label]) for label in range(tiny.CLASSES)]
    assert found.auc == pytest.approx(np.mean(scores))
    assert [own.auc for own in found.labels] == pytest.approx(scores)
    assert [own.recall for own in found.labels] == pytest.approx(recall_score(truth, predicted, average=None))
    assert np.array_equal(found.confusion, confusion_matrix(truth, predicted))
    assert found.uncertain == pytest.approx(np.mean([prediction.uncertain for prediction in predictions]))
    confidence, hit = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    bins = np.minimum(confidence * 15, 14).astype(int)
    gaps = [(bins == b).mean() * abs(hit[bins == b].mean() - confidence[bins == b].mean()) for b in set(bins)]
    assert found.ece == pytest.approx(sum(gaps), abs=1e-6)
    low, high = found.balanced_accuracy_ci
    assert 0 < low <= found.balanced_accuracy <= high < 1
    z, n = norm.ppf(0.975), PER_LABEL
    for own in found.labels:
        assert own.recall is not None and own.recall_ci is not None and own.images == n
        centre, half = (own.recall + z**2 / 2 / n), z * np.sqrt(own.recall * (1 - own.recall) / n + z**2 / 4 / n**2)
        assert own.recall_ci == pytest.approx(((centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)))


def test_artefacts_are_compared_and_mistakes_listed(
    pristine_bundle: Path, source: Path, evaluation: Evaluation
) -> None:
    assert evaluation.bundle_sha256 == sha256(pristine_bundle / MANIFEST)
    assert evaluation.main == "litert-int8" and [one.name for one in evaluation.artefacts] == list(ARTEFACTS)
    own, theirs = [], []
    onnx = Classifier.open(pristine_bundle, artefact="onnx-fp32")
    with onnx, Classifier.open(pristine_bundle, artefact="litert-int8") as main:
        for path in source.rglob("*.png"):
            own.append(onnx.predict(read_image(path)))
            theirs.append(main.predict(read_image(path)))
    found = next(one for one in evaluation.parity if one.artefact == "onnx-fp32")
    gaps = np.abs(np.stack([p.probabilities for p in own]) - np.stack([p.probabilities for p in theirs]))
    assert found.agreement == np.mean([a.label == b.label for a, b in zip(own, theirs, strict=True)])
    assert (found.mean_dp, found.max_dp) == pytest.approx((gaps.mean(), gaps.max()), abs=1e-6)
    assert evaluation.mistake_count == len(evaluation.mistakes) >= 6
    assert all(Path(one.path).parent.name == one.label != one.predicted for one in evaluation.mistakes)
    confidences = [one.confidence for one in evaluation.mistakes]
    assert confidences == sorted(confidences, reverse=True)
    assert next(a for a in evaluation.artefacts if a.name == "litert-int8").packed_balanced_accuracy == 0.98765


def test_images_of_the_run_are_found(run: Path, source: Path, tmp_path: Path) -> None:
    manifest = msgspec.json.decode((run / "split" / "manifest.json").read_bytes())
    paths = msgspec.json.decode((run / "split" / "locations.json").read_bytes())["paths"]
    copied, encoded, tested = (
        paths[next(image["sha256"] for image in manifest[split] if image["label"] == label)]
        for split, label in (("train", "disc"), ("train", "cross"), ("test", "stripes"))
    )
    mixed = Path(shutil.copytree(source, tmp_path / "mixed"))
    shutil.copy(copied, mixed / "disc" / "copied.png")
    shutil.copy(tested, mixed / "stripes" / "tested.png")
    pixels = cv2.resize(read_image(Path(encoded)), None, fx=1.5, fy=1.5)
    cv2.imwrite(str(mixed / "cross" / "encoded.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
    found = evaluate_bundle(run / "bundle", mixed, artefacts=["onnx-fp32"])
    assert found.overlap.checked and found.overlap.near_duplicates_checked
    seen = {Path(one.path).name: one for one in found.overlap.images}
    assert (seen["copied.png"].split, seen["copied.png"].match) == ("train", "exact")
    assert seen["copied.png"].original == copied
    assert (seen["tested.png"].split, seen["tested.png"].match) == ("test", "exact")
    assert (seen["encoded.jpg"].match, seen["encoded.jpg"].bits > 0) == ("near-duplicate", True)
    assert seen["encoded.jpg"].split in ("train", "validation", "test")
    trained = [one for one in seen.values() if one.split == "train"]
    assert any("were trained on: 1 exact copy" in line for line in found.warnings)
    known = {one.path for one in found.overlap.images if one.split in ("train", "validation")}
    assert len(trained) >= 1
    unseen = found.artefacts[0].unseen
    assert unseen is not None and unseen.images == found.images - len(known)


def test_another_set_of_the_same_kind_is_not_taken_for_the_runs(run: Path, source: Path) -> None:
    found = evaluate_bundle(run / "bundle", source, artefacts=["onnx-fp32"])
    assert not [one for one in found.overlap.images if one.match == "exact"]


def test_a_bundle_without_its_run_says_that_nothing_was_checked(
    run: Path, bundle_root: Path, source: Path, evaluation: Evaluation
) -> None:
    assert not evaluation.overlap.checked
    assert any("could not be checked" in line and "--run DIR" in line for line in evaluation.warnings)
    assert evaluate_bundle(bundle_root, source, artefacts=["onnx-fp32"], run=run).overlap.checked
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read"):
        evaluate_bundle(bundle_root, source, run=source)


def test_a_split_that_is_not_the_bundles_is_noticed(
    run: Path, bundle_root: Path, edit_manifest: Callable[..., None], source: Path
) -> None:
    edit_manifest(lineage={"split": "0" * 64})
    found = evaluate_bundle(bundle_root, source, artefacts=["onnx-fp32"], run=run)
    assert any("is not the split that the bundle was made from" in line for line in found.warnings)


def test_a_table_may_lack_labels_and_have_groups(pristine_bundle: Path, source: Path, tmp_path: Path) -> None:
    rows = [f"{path},{path.parent.name},{path.stem}" for path in source.rglob("*.png") if path.parent.name != "disc"]
    table = tmp_path / "set.csv"
    table.write_text("path,label,group\n" + "\n".join(rows), encoding="utf-8")
    found = evaluate_bundle(pristine_bundle, table)
    assert found.missing_labels == ("disc",) and found.counts == {"cross": PER_LABEL, "stripes": PER_LABEL}
    main = found.artefacts[0]
    assert (main.auc, main.pr_auc, main.labels[1].recall, main.labels[1].images) == (None, None, None, 0)
    assert main.balanced_accuracy == pytest.approx(np.mean([main.labels[n].recall for n in (0, 2)]))
    assert any(line.startswith("no images of disc") for line in found.warnings)
    assert any("8 groups" in line for line in found.warnings)
    assert "not measured" in render_evaluation(found)


def test_exact_copies_and_images_of_one_group_count_once(
    pristine_bundle: Path, source: Path, tmp_path: Path, evaluation: Evaluation
) -> None:
    for number in range(3):
        shutil.copytree(source, tmp_path / "copied", copy_function=_copier(f"{number}-"), dirs_exist_ok=True)
    rows = [f"{path},{path.parent.name},{path.stem[2:]}" for path in sorted((tmp_path / "copied").rglob("*.png"))]
    table = tmp_path / "set.csv"
    table.write_text("path,label,group\n" + "\n".join(rows), encoding="utf-8")
    single = next(one for one in evaluation.artefacts if one.name == "onnx-fp32")
    copied, grouped = (
        evaluate_bundle(pristine_bundle, place, artefacts=["onnx-fp32"]).artefacts[0]
        for place in (tmp_path / "copied", table)
    )
    assert copied.balanced_accuracy_ci == pytest.approx(single.balanced_accuracy_ci, abs=1e-9)
    assert copied.auc_ci == pytest.approx(single.auc_ci, abs=0.05)
    low, high = grouped.balanced_accuracy_ci
    assert high - low > 0.5 * (single.balanced_accuracy_ci[1] - single.balanced_accuracy_ci[0]), (
        "8 groups, not 72 images"
    )


def test_images_with_two_labels_are_one_warning(pristine_bundle: Path, source: Path, tmp_path: Path) -> None:
    table = tmp_path / "set.csv"
    own = [(path, path.parent.name) for path in sorted(source.rglob("*.png"))]
    copies = shutil.copytree(source / "cross", tmp_path / "again")
    other = [(path, "disc") for path in sorted(copies.iterdir())]
    more = shutil.copytree(source / "disc", tmp_path / "more")
    other += [(path, "stripes") for path in sorted(more.iterdir())]
    rows = "".join(f"{path},{label}\n" for path, label in [*own, *other])
    table.write_text(f"path,label\n{rows}", encoding="utf-8")
    warnings = evaluate_bundle(pristine_bundle, table, artefacts=["onnx-fp32"]).warnings
    (line,) = (line for line in warnings if "two labels" in line)
    assert line.startswith(f"{2 * PER_LABEL} images have two labels: ") and line.count(" and ") == 10 + 1
    assert line.endswith(f"; and {2 * PER_LABEL - 10} more")


def _copier(prefix: str) -> Callable[[str, str], object]:
    """Copies a file under another name."""
    return lambda one, other: shutil.copy(one, Path(other).with_name(prefix + Path(other).name))


def test_costs_decide_as_on_the_device(bundle_root: Path, edit_manifest: Callable[..., None], source: Path) -> None:
    costs = [[0, 1, 1], [50, 0, 1], [1, 1, 0]]
    edit_manifest(decision={"costs": costs, "currency": "EUR"})
    found = evaluate_bundle(bundle_root, source, artefacts=["onnx-fp32"])
    priced = []
    with Classifier.open(bundle_root, artefact="onnx-fp32") as classifier:
        for path in source.rglob("*.png"):
            predicted = classifier.predict(read_image(path)).index
            priced.append(costs[tiny.LABELS.index(path.parent.name)][predicted])
    assert found.artefacts[0].cost == pytest.approx(np.mean(priced))
    assert found.mistakes[0].cost == max(priced)


def test_files_that_are_left_out_are_said(evaluation: Evaluation) -> None:
    assert evaluation.left_out == {".heic": 1}
    assert "1 file left out: 1 .heic" in evaluation.warnings


def test_the_page_holds_everything(evaluation: Evaluation) -> None:
    page = render_evaluation(evaluation)
    assert "line &lt;2&gt;" in page and "<script" not in page and "http://" not in page.replace("http://www.w3.org", "")
    assert page.count("data:image/jpeg") == len(evaluation.mistakes)
    assert "Confusion matrix" in page and "Reliability diagram" in page
    assert all(name in page for name in ARTEFACTS)


def test_the_verb_writes_page_and_figures(run: Path, source: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    result = invoke(run / "bundle", source, "--artefact", "onnx-fp32", "--json", figures)
    assert result.exit_code == 0, result.output
    assert (run / "evaluate" / f"{source.name}.html").is_file()
    decoded = msgspec.json.decode(figures.read_bytes(), type=Evaluation)
    assert [one.name for one in decoded.artefacts] == ["onnx-fp32"] and decoded.schema == 1
    raw = msgspec.json.decode(figures.read_bytes())
    assert set(raw) == set(Evaluation.__struct_fields__)
    assert set(raw["artefacts"][0]) >= {"balanced_accuracy", "balanced_accuracy_ci", "confusion", "ece", "reliability"}
    assert "onnx-fp32" in result.stdout
    page = tmp_path / "page.html"
    piped = invoke(run / "bundle", source, "--artefact", "onnx-fp32", "--json", "-", "--html", page)
    assert msgspec.json.decode(piped.stdout, type=Evaluation).images == 3 * PER_LABEL and page.is_file()


def test_sets_that_cannot_be_used_are_refused(
    pristine_bundle: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    unknown = Path(shutil.copytree(source, tmp_path / "unknown"))
    (unknown / "disc").rename(unknown / "circle")
    damaged = Path(shutil.copytree(source, tmp_path / "damaged"))
    (damaged / "disc" / "0.png").write_bytes((damaged / "disc" / "0.png").read_bytes()[:60])
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, message in (
        ((pristine_bundle, unknown), "'circle' (8 images); it knows cross, disc, stripes"),
        ((pristine_bundle, empty), "a folder for each class is needed"),
        ((pristine_bundle, tmp_path / "nowhere"), "no such folder or table"),
        ((pristine_bundle, damaged), "1 unreadable image; fix or remove them, or give --skip-unreadable"),
        ((pristine_bundle, source, "--artefact", "onnx-int4"), "no artefact 'onnx-int4'"),
        ((tmp_path / "nowhere", source), "nowhere"),
    ):
        error = invoke(*arguments).exception
        assert isinstance(error, DataError | BundleError) and message in str(error)
    skipped = invoke(pristine_bundle, damaged, "--skip-unreadable", "--artefact", "onnx-fp32", "--json", "-")
    assert skipped.exit_code == 0
    found = msgspec.json.decode(skipped.stdout, type=Evaluation)
    assert found.images == 3 * PER_LABEL - 1 and "0.png" in found.unreadable[0]
    assert list(tmp_path.glob("*.html")) == [tmp_path / "tiny-shapes-damaged.html"]


def test_a_mistake_ends_with_exit_code_2_and_one_message(pristine_bundle: Path, tmp_path: Path) -> None:
    done = eyas(tmp_path, "evaluate", pristine_bundle, tmp_path)
    assert done.code == 2 and done.err.startswith("eyas: ") and len(done.err.splitlines()) == 1


def test_torch_is_not_imported(pristine_bundle: Path, source: Path, tmp_path: Path) -> None:
    script = "import sys\nfrom eyas_host.cli.app import app\napp(sys.argv[1:], standalone_mode=False)\n"
    command = [sys.executable, "-c", script + "assert 'torch' not in sys.modules", "evaluate", str(pristine_bundle)]
    command += [str(source), "--artefact", "litert-int8", "--html", str(tmp_path / "page.html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_help_names_what_may_be_given() -> None:
    shown = invoke("--help").stdout
    assert all(
        word in shown for word in ("BUNDLE", "FOLDER|TABLE", "--artefact", "--run", "--skip-unreadable", "--json")
    )
