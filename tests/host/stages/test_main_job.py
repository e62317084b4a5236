"""All stages through the command line, on drawn shapes: new, distill, resume, prune, costs, deploy."""

from __future__ import annotations

import csv
import getpass
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import scipy.special
import torch
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from eyas_device.predict import Classifier
from eyas_device.preprocess import read_image
from eyas_host import distill, load_recipe, open_run
from eyas_host.models.checkpoints import LABELS_ONLY, PRUNED, STUDENT, load_state
from tests.support import inside
from tests.support.networks import V3_SMALL
from tests.support.paths import ROOT
from tests.support.shapes import SHAPES, draw_folder
from tests.support.system_parts import unavailable

BIN = Path(sys.executable).parent
TINY = {
    "image.size": "64",
    "teacher.head_epochs": "4",
    "teacher.epochs": "1",
    "teacher.batch": "16",
    "student.views": "2",
    "student.epochs": "8",
    "student.batch": "16",
    "student.labels_only": "true",
    "prune.epochs": "1",
    "quantize.epochs": "1",
    "quantize.calibration": "16",
    "pack.golden": "4",
    "pack.images": "never",
    "image.decode": "reduced",
    "gate.min_agreement": "0.5",
    "gate.max_dp": "0.2",
    "gate.max_drop": "0.5",
}
RECIPE = "models/shapes/recipe.toml"
CHANCE = 1 / len(SHAPES)


def eyas(place: Path, *arguments: object) -> inside.Done:
    done = inside.eyas(place, *arguments)
    assert done.code == 0, done.err
    return done


def settings(**more: str) -> list[str]:
    tiny = TINY | {key.replace("__", "."): value for key, value in more.items()}
    return [word for key, value in tiny.items() for word in ("--set", f"{key}={value}")]


def report_of(run: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run / "report.json").read_bytes())
    return report


def sparsity(path: Path) -> float:
    """Fraction of zeros among a .tflite's int8 convolution weights."""
    interpreter = Interpreter(
        model_path=str(path), experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    )
    interpreter.allocate_tensors()
    details = interpreter.get_tensor_details()
    filters = [d for d in details if d["dtype"] == np.int8 and len(d["quantization_parameters"]["scales"]) > 1]
    weights = [interpreter.get_tensor(d["index"]) for d in filters]
    assert len(weights) > 40
    return sum(int((w == 0).sum()) for w in weights) / sum(w.size for w in weights)


@pytest.fixture(scope="module", autouse=True)
def _short_timings() -> Iterator[None]:
    """Latencies are measured for real, but not for long."""
    with (
        mock.patch("eyas_host.evaluation.networks._ROUNDS", 3),
        mock.patch("eyas_host.evaluation.latency._SECONDS", 0.1),
    ):
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of a five-class recipe that `eyas new` wrote."""
    place = tmp_path_factory.mktemp("main-job")
    draw_folder(place / "shapes", count=16)
    assert RECIPE in eyas(place, "new", place / "shapes").out
    eyas(place, "distill", RECIPE, *settings())
    return place


def test_the_report_has_every_variant_with_its_figures(place: Path) -> None:
    report = report_of(place / "runs/shapes")
    variants = {variant["name"]: variant for variant in report["variants"]}
    backends = {
        f"{runtime}-{precision}" for runtime in ("litert", "openvino", "onnx") for precision in ("fp32", "int8")
    }
    assert set(variants) == {"teacher", "student-labels-only", "student", "pruned", "qat", "exact-int8"} | backends
    for name in backends:
        assert variants[name]["split"] == "test"
        assert variants[name]["size_bytes"] > 10_000
        assert 0 < variants[name]["latency_ms"]["p50"] <= variants[name]["latency_ms"]["p90"]
    for runtime in ("litert", "openvino", "onnx"):
        assert report["parity"][f"{runtime}-fp32"]["max_dp"] < 1e-3
    assert variants["litert-int8"]["size_bytes"] <= variants["litert-fp32"]["size_bytes"] / 4 + 400_000
    assert report["test_accesses"] == 1
    assert report["weights"]["teacher"] in ("packaged", "hub")
    assert 0.57 <= report["pruning"]["macs_after"] / report["pruning"]["macs_before"] <= 0.6
    assert [stage["name"] for stage in report["stages"]][-1] == "pack"
    page = (place / "runs/shapes/report.html").read_text()
    assert "litert-int8" in page and 'src="http' not in page


def test_one_process_compiles_what_two_compile(place: Path) -> None:
    shutil.copytree(place / "runs", place / "alone")
    with mock.patch("eyas_host.export.build.has_room_beside", lambda memory: False):
        eyas(place, "distill", RECIPE, "--runs", "alone", "--only", "compile", *settings())
    together, alone = (place / runs / "shapes/compile" for runs in ("runs", "alone"))
    names = sorted(path.name for path in together.iterdir())
    assert len(names) == 9, "a file for each of two precisions, two for OpenVINO, and the record"
    for name in names:
        one, other = ((folder / name).read_bytes() for folder in (together, alone))
        if name == "stage.json":
            facts = [json.loads(content)["facts"] for content in (one, other)]
            assert all(facts[0][kind] == facts[1][kind] for kind in ("notes", "layers"))
        elif name.endswith(".xml"):  # its names have numbers, which count on in a process
            assert re.findall(rb' type="\w+"', one) == re.findall(rb' type="\w+"', other), name
        else:
            assert one == other, name


def test_the_networks_learned_something(place: Path) -> None:
    report = report_of(place / "runs/shapes")
    validation = {variant["name"]: variant for variant in report["validation_variants"]}
    assert validation["teacher"]["balanced_accuracy"] >= 2.5 * CHANCE
    # a dozen images rank the student's training; they are too few for its balanced accuracy
    assert min(validation[name]["auc"] for name in ("student", "pruned", "qat", "litert-int8")) > 0.55
    for training in ("head", "student"):
        losses = [epoch["loss"] for epoch in report["histories"][training]]
        assert losses[-1] < losses[0], training


def test_the_bundle_passes_the_check_on_the_device(place: Path) -> None:
    bundle = place / "runs/shapes/bundle"
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    assert tuple(manifest["labels"]) == SHAPES
    assert set(manifest["use"]) == {"litert", "openvino", "onnx"}
    assert all(manifest["lineage"][key] for key in ("data", "split", "recipe"))
    assert manifest["governance"] == {"images": "never"}
    assert manifest["preprocessing"]["decode"] == "reduced"
    assert manifest["reference"]["path"] == "reference.npz" and (bundle / "reference.npz").is_file()
    done = subprocess.run([BIN / "eyas-device", "check", bundle, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "FAILED" not in done.stdout


def test_the_lineage_names_files_that_stay(place: Path) -> None:
    """A later command writes the run's recipe.json again; what the hashes are of lies in pack/."""
    run = place / "runs/shapes"
    lineage = json.loads((run / "bundle/manifest.json").read_bytes())["lineage"]
    before = (run / "recipe.json").read_bytes()
    eyas(place, "split", RECIPE, "--yes", *settings(pack__version="9.9.9"))
    assert (run / "recipe.json").read_bytes() != before == (run / "pack/recipe.json").read_bytes()
    for name in ("recipe", "split"):
        assert sha256((run / f"pack/{name}.json").read_bytes()).hexdigest() == lineage[name]
    assert json.loads((run / "pack/recipe.json").read_bytes())["pack"]["images"] == "never"
    with (run / "split/index.csv").open(encoding="utf-8", newline="") as table:
        lines = sorted(f"{row['sha256']} {row['label']}\n" for row in csv.DictReader(table))
    assert sha256("".join(lines).encode()).hexdigest() == lineage["data"]
    outputs = json.loads((run / "pack/stage.json").read_bytes())["outputs"]
    assert {"pack/recipe.json", "pack/split.json"} <= set(outputs)
    eyas(place, "split", RECIPE, "--yes", "--set", "pack.version=")
    assert (run / "recipe.json").read_bytes() == before, "the setting is dropped for the tests below"


def test_nothing_that_travels_names_a_path_a_user_or_a_host_of_this_machine(place: Path) -> None:
    run = place / "runs/shapes"
    texts = [run / "report.html", run / "report.json", *run.glob("bundle/*.json"), *run.glob("bundle/*.md")]
    assert {path.name for path in texts} == {"report.html", "report.json", "manifest.json", "CARD.md", "README.md"}
    names = (str(place), tempfile.gettempdir(), str(Path.home()), f"/home/{getpass.getuser()}/", socket.gethostname())
    for path in texts:
        text = re.sub(r"data:image/[^\"]*", "", path.read_text(encoding="utf-8"))
        assert [name for name in names if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)] == [], path.name
    report = report_of(run)
    assert all(re.fullmatch(r"shapes/\w+/\d+\.(png|jpg)", mistake["path"]) for mistake in report["mistakes"])
    assert report["test_log"].startswith("shapes/.eyas/")


def test_the_verdict_asks_for_a_look_where_the_recipe_does_not_say_what_is_enough(place: Path) -> None:
    report = report_of(place / "runs/shapes")
    assert report["ship"]["verdict"] in ("look", "do not ship"), "a toy model of a few test images"
    assert any("set [accept] min_balanced_accuracy" in reason for reason in report["ship"]["reasons"])
    assert {"worst class", "small classes", "distillation", "int8"} >= set(report["facts"]) >= {"worst class"}
    assert set(report["test_losses"]) == set(report["parity"])
    page = (place / "runs/shapes/report.html").read_text(encoding="utf-8")
    assert "Grad-CAM</a> is left out: at 64 px the last convolution has 2 × 2 cells" in page or not report["mistakes"]  # noqa: RUF001


def test_the_report_names_the_machine_and_the_libraries_of_each_stage(place: Path) -> None:
    report = report_of(place / "runs/shapes")
    records = open_run(place / "runs/shapes").stages
    assert report["machine"] == records["verify"].machines[-1] and report["machine"]["processor"]
    assert report["versions"]["openvino"] == metadata.version("openvino")
    for stage in report["stages"]:
        assert stage["machines"] == list(records[stage["name"]].machines)
        assert stage["versions"]["numpy"] == np.__version__


def test_calibration_is_recorded(place: Path) -> None:
    kept = json.loads((place / "runs/shapes/qat/calibration.json").read_bytes())
    split = json.loads((place / "runs/shapes/split/manifest.json").read_bytes())
    assert len(kept["images"]) == len(set(kept["images"])) == int(TINY["quantize.calibration"])
    assert set(kept["images"]) <= {image["sha256"] for image in split["train"]}
    assert len(kept["ranges"]) == V3_SMALL["activations"]
    assert all(low <= 0 < high for low, high in kept["ranges"].values())


def test_the_int8_student_is_the_candidate_closest_to_the_float_student(place: Path) -> None:
    epochs = json.loads((place / "runs/shapes/qat/stage.json").read_bytes())["facts"]["histories"]["qat"]
    with np.load(place / "runs/shapes/verify/logits.npz") as logits:
        expected, got = (scipy.special.softmax(logits[name].astype(float), axis=1) for name in ("pruned", "qat"))
    divergence = scipy.special.rel_entr(expected, got).sum(axis=1).mean()
    best = min(epoch["metrics"]["divergence"] for epoch in epochs)
    assert divergence == pytest.approx(best, rel=1e-2) or divergence < best  # below it if calibration alone is kept


def test_a_new_report_has_the_sensitivity_and_does_not_access_the_test_set_again(place: Path) -> None:
    done = eyas(place, "sensitivity", RECIPE, "--images", "4", *settings())
    assert "backbone.blocks.0.0.conv_dw" in done.out + done.err
    done = eyas(place, "distill", RECIPE, *settings())
    assert done.err.count("unchanged") == 8 and "report   runs again   sensitivity/sensitivity.json changed" in done.err
    report = report_of(place / "runs/shapes")
    assert len(report["sensitivity"]["layers"]) > 50
    assert "Sensitivity plot" in (place / "runs/shapes/report.html").read_text()
    assert report["test_accesses"] == 1
    assert len((place / "runs/shapes/test-set/access.jsonl").read_text().splitlines()) == 1


def test_second_run_changes_nothing(place: Path) -> None:
    before = (place / "runs/shapes/report.json").read_bytes()
    started = time.monotonic()
    done = eyas(place, "distill", RECIPE, *settings())
    assert time.monotonic() - started < 60  # a guard against training again, not a claim of speed
    assert done.err.count("unchanged") == 9
    assert (place / "runs/shapes/report.json").read_bytes() == before


def test_the_public_functions_find_the_finished_run(place: Path) -> None:
    recipe = load_recipe(place / RECIPE, settings()[1::2])
    before = (place / "runs/shapes/report.json").read_bytes()
    run = distill(recipe, runs=place / "runs")
    assert (place / "runs/shapes/report.json").read_bytes() == before
    assert (run.recipe, run.bundle) == (recipe, place / "runs/shapes/bundle")
    assert list(run.stages) == ["split", "teach", "distill", "prune", "qat", "compile", "verify", "pack", "report"]
    assert run.report is not None and run.report["shipped"] in {v["name"] for v in run.report["variants"]}
    assert run == open_run(place / "runs/shapes")


def test_a_killed_run_resumes_and_ends_with_the_same_numbers(place: Path) -> None:
    for stage in ("split", "teach"):
        shutil.copytree(place / "runs/shapes" / stage, place / "killed/shapes" / stage)
    arguments = ["prune", RECIPE, "--runs", "killed", *settings()]
    folder = place / "killed/shapes/distill"
    process = subprocess.Popen(
        [BIN / "eyas", *arguments], cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 300
        while not (folder / "student.ckpt").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (folder / "stage.json").exists()
    saved = torch.load(folder / "student.ckpt", weights_only=True)["history"]
    views = (folder / "view-0.u8").stat().st_mtime_ns
    eyas(place, *arguments)
    assert (folder / "view-0.u8").stat().st_mtime_ns == views
    kept = json.loads((folder / "stage.json").read_bytes())["facts"]["histories"]["student"]
    assert len(kept) == int(TINY["student.epochs"])
    assert kept[: len(saved)] == [json.loads(epoch) for epoch in saved]  # times too: these epochs were not run again
    for weights in (STUDENT, LABELS_ONLY, PRUNED):
        expected, resumed = load_state(place / "runs/shapes" / weights), load_state(place / "killed/shapes" / weights)
        torch.testing.assert_close(resumed, expected, rtol=0, atol=1e-6)


def test_magnitude_pruning_reaches_the_artefact(place: Path) -> None:
    shutil.copytree(place / "runs", place / "sparse")
    more = settings(prune__method="nncf", prune__sparsity="0.5", compile__runtimes='["litert"]')
    done = eyas(place, "compile", RECIPE, "--runs", "sparse", "--yes", *more)
    assert done.err.count("unchanged") == 3  # split, teach, distill
    pruning = json.loads((place / "sparse/shapes/prune/stage.json").read_bytes())["facts"]
    assert pruning["method"] == "nncf" and set(pruning["measured_speed"]) == {"fp32", "int8"}
    assert pruning["parameters_after"] < 0.55 * pruning["parameters_before"]
    assert sparsity(place / "sparse/shapes/compile/litert-int8.tflite") > 0.45
    assert sparsity(place / "runs/shapes/compile/litert-int8.tflite") < 0.2


def test_the_device_applies_the_bundle_costs_as_the_report_does(place: Path) -> None:
    shutil.copytree(place / "runs", place / "priced")
    more = settings(cost__table="{ circle = { ring = 100 } }", cost__other="1")
    done = eyas(place, "distill", RECIPE, "--runs", "priced", "--yes", *more)
    assert done.err.count("unchanged") == 6  # up to compile
    run = place / "priced/shapes"
    decision = json.loads((run / "bundle/manifest.json").read_bytes())["decision"]
    circle, ring = SHAPES.index("circle"), SHAPES.index("ring")
    assert decision["costs"][circle][ring] == 100 and decision["costs"][ring][circle] == 1
    assert json.loads((run / "verify/confidence.json").read_bytes())["decision"] == decision
    report = report_of(run)
    assert report["test_accesses"] == 1, "the same models: their stored logits are used"
    confusion = np.zeros((len(SHAPES), len(SHAPES)), dtype=int)
    with Classifier.open(run / "bundle", artefact=report["shipped"]) as classifier:
        paths = json.loads((run / "split/locations.json").read_bytes())["paths"]
        for image in json.loads((run / "split/manifest.json").read_bytes())["test"]:
            prediction = classifier.predict(read_image(Path(paths[image["sha256"]]), classifier.spec))
            confusion[SHAPES.index(image["label"]), prediction.index] += 1
    assert confusion.tolist() == report["decided"]["confusion"]
    test = next(own for own in report["cost"]["splits"] if own["split"] == "test")
    assert test["decided"] == pytest.approx((confusion * decision["costs"]).sum() / confusion.sum())


def test_base_install_runs_the_bundle(place: Path, tmp_path: Path) -> None:
    """A device has only `eyas-device`: no torch, no host."""
    uv = BIN / "uv"
    if not uv.exists():
        pytest.skip("uv is not beside this Python")
    environment = tmp_path / "device"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    installed = subprocess.run(
        [uv, "pip", "install", "--quiet", "--python", environment / "bin/python", ROOT / "device"],
        capture_output=True,
        text=True,
    )
    if installed.returncode:
        unavailable(f"the registry cannot be reached: {installed.stderr.splitlines()[-1]}")
    assert [path.name for path in environment.glob("lib/*/site-packages/eyas*") if path.suffix == ""] == ["eyas_device"]
    assert not list(environment.glob("lib/*/site-packages/torch"))
    done = subprocess.run(
        [
            environment / "bin/eyas-device",
            "run",
            "--bundle",
            place / "runs/shapes/bundle",
            "--camera",
            f"folder:{place / 'shapes'}",
            "--accuracy",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "80 frames" in done.stdout + done.stderr
