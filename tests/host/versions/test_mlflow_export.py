"""A version in MLflow, read back by MLflow's own client: the same settings, figures, lineage and bytes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from eyas_device.bundle import sha256
from eyas_host.support.errors import MissingExtra
from eyas_host.versions.collect import read_run
from eyas_host.versions.mlflow_export import log_version
from eyas_host.versions.record import RegistryError, VersionRecord
from eyas_host.versions.registry import CHALLENGER, CHAMPION, Registry
from tests.support.audited import Audit
from tests.support.device_fixtures import pristine_bundle, weights  # noqa: F401 - fixtures
from tests.support.finished_run import finish_run
from tests.support.inside import eyas

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
RECIPE = {"run": {"name": "x", "seed": 3}, "student": {"epochs": 30, "sizes": [1, 2]}, "note": "no section"}


@pytest.fixture(scope="module")
def folder(pristine_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811 - fixture
    """A registry whose 1.0.0 serves and whose 1.1.0, never measured, is tried; both are in MLflow, the first twice."""
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    folder = tmp_path_factory.mktemp("mlflow")
    registry = opened(folder)
    for version, accuracy in (("1.0.0", 0.9), ("1.1.0", None)):
        run = finish_run(folder / version, pristine_bundle, version, accuracy=accuracy, recipe=RECIPE)
        parent = "1.0.0" if version != "1.0.0" else ""
        registry.add(read_run(run, now=1_700_000_000.0, by="me", note="a | b", parent=parent), run)
    for alias, version in ((CHAMPION, "1.0.0"), (CHALLENGER, "1.1.0")):
        registry.set_alias(alias, registry.find(version))
    return folder


def opened(folder: Path) -> Registry:
    return Registry(folder / "registry", now=lambda: 1_700_000_000.0, by="me")


def export(folder: Path, version: str, *more: str, uri: str = "sqlite:///ml/mlflow.db") -> Any:
    (folder / "ml").mkdir(exist_ok=True)
    return eyas(folder, "models", "export", version, uri, "--as", "mlflow", *more)


def client(folder: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder}/ml/mlflow.db", f"sqlite:///{folder}/ml/mlflow.db")


def expected_metrics(record: VersionRecord) -> dict[str, float]:
    """The record's figures as JSON has them, one by one."""
    tree, found = json.loads(msgspec.json.encode(record)), {}
    for variant, figures in tree["figures"].items():
        low, high = figures.pop("balanced_accuracy_ci")
        values = figures | {"balanced_accuracy_low": low, "balanced_accuracy_high": high}
        for name, value in values.items():
            if value is not None:
                found[f"{variant}/{name}"] = value
                if variant == tree["shipped"]:
                    found[name] = value
    return found


def test_what_is_read_back_is_what_the_version_has(folder: Path, tmp_path: Path) -> None:
    done = export(folder, "1.0.0", "--license", "apache-2.0")
    assert done.code == 0, done.err
    record = opened(folder).find("1.0.0")
    [run] = client(folder).search_runs([client(folder).get_experiment_by_name("tiny-shapes").experiment_id])
    assert done.out == f"tiny-shapes@1.0.0: run {run.info.run_id}, at sqlite:///ml/mlflow.db\n"
    assert (run.info.status, run.info.run_name, run.info.start_time) == ("FINISHED", record.name, 1_700_000_000_000)
    assert run.data.metrics == expected_metrics(record) and len(run.data.metrics) > 8
    low, high = record.figures[record.shipped].balanced_accuracy_ci
    assert (run.data.metrics["balanced_accuracy_low"], run.data.metrics["balanced_accuracy_high"]) == (low, high)
    assert run.data.params == {
        "run.name": "x",
        "run.seed": "3",
        "student.epochs": "30",
        "student.sizes": "[1,2]",
        "images.train": "70",
        "images.validation": "15",
        "images.test": "15",
        "seed": "3",
        "labels": ", ".join(record.labels),
    }
    tags = run.data.tags
    assert (tags["eyas.digest"], tags["eyas.data"], tags["eyas.split"]) == (
        record.digest, record.data.data, record.data.split
    )  # fmt: skip
    assert (tags["mlflow.user"], tags["mlflow.note.content"], tags["eyas.verdict"]) == ("me", "a | b", record.verdict)
    assert tags["eyas.library.torch"] == "2.13.0" and tags["eyas.code.teach"] == record.tools.code["teach"]
    assert not [name for name in tags if "git" in name or "source" in name], "nothing of this machine"
    files = Path(client(folder).download_artifacts(run.info.run_id, "", str(tmp_path)))
    bundle = {name: file.sha256 for name, file in record.files.items() if name.startswith("bundle/")}
    there = {str(path.relative_to(files)): sha256(path) for path in files.rglob("*") if path.is_file()}
    assert {name: digest for name, digest in there.items() if name.startswith("bundle/")} == bundle
    assert there.keys() - bundle.keys() == {"CARD.md", "bom.json", "record.json", "recipe.json"}
    assert msgspec.json.decode((files / "record.json").read_bytes(), type=VersionRecord) == record
    assert json.loads((files / "recipe.json").read_text()) == RECIPE
    assert 'license: "apache-2.0"' in (files / "CARD.md").read_text()
    assert json.loads((files / "bom.json").read_text())["metadata"]["component"]["version"] == "1.0.0"
    assert {path.name for path in folder.iterdir()} == {"1.0.0", "1.1.0", "registry", "ml"}, "nothing beside it"


def test_a_registered_model_has_the_aliases_of_the_registry_which_move(folder: Path) -> None:
    first = export(folder, "1.0.0", "--register")
    assert "as before; registered as version 1 (champion)" in first.out or "1.0.0: run" in first.out
    assert "registered as version 2 (challenger)" in export(folder, "1.1.0", "--register").out
    assert "as before; registered as version 1 (champion)" in export(folder, "1.0.0", "--register").out
    at = client(folder)
    for alias, version in ((CHAMPION, "1.0.0"), (CHALLENGER, "1.1.0")):
        found = at.get_model_version_by_alias("tiny-shapes", alias)
        assert found.tags["eyas.version"] == version and at.get_run(found.run_id).info.run_name.endswith(version)
        assert found.source == f"{at.get_run(found.run_id).info.artifact_uri}/bundle"
    unmeasured = at.get_run(at.get_model_version_by_alias("tiny-shapes", CHALLENGER).run_id).data
    assert unmeasured.metrics == {} and unmeasured.tags["eyas.parent"] == "1.0.0"
    assert "eyas.verdict" not in unmeasured.tags
    assert len(at.search_model_versions("name = 'tiny-shapes'")) == 2, "twice is once"
    opened(folder).set_alias(CHAMPION, opened(folder).find("1.1.0"))
    assert "registered as version 2 (challenger) (champion)" in export(folder, "1.1.0", "--register").out.replace(
        "(champion) (challenger)", "(challenger) (champion)"
    )
    assert at.get_model_version_by_alias("tiny-shapes", CHAMPION).tags["eyas.version"] == "1.1.0"
    opened(folder).set_alias(CHAMPION, opened(folder).find("1.0.0"))


def test_a_run_that_could_not_be_written_whole_is_failed_and_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    uri = f"sqlite:///{folder}/ml/mlflow.db"
    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "log_artifacts", full)
        with pytest.raises(RegistryError, match="No space left"):
            log_version(opened(folder), opened(folder).find("1.0.0"), uri, experiment="other")
    assert log_version(opened(folder), opened(folder).find("1.0.0"), uri, experiment="other").new
    runs = client(folder).search_runs([client(folder).get_experiment_by_name("other").experiment_id])
    assert sorted(run.info.status for run in runs) == ["FAILED", "FINISHED"]


def test_nothing_goes_anywhere_else(folder: Path, tmp_path: Path) -> None:
    """Under an audit, with a home of its own: no name is looked up, and nothing written beside the database."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    audit = Audit(tmp_path, tmp_path / "home", {"TMPDIR": str(tmp_path)})
    words = ("models", "export", "1.0.0", uri, "--as", "mlflow", "--register", "--registry", folder / "registry")
    done = audit.run("eyas_host", *map(str, words))
    assert done.code == 0, done.output
    assert done.lookups == [] and (tmp_path / "mlartifacts/tiny-shapes").is_dir()
    elsewhere = [path for path in done.written if not path.is_relative_to(tmp_path)]
    assert not [path for path in elsewhere if not path.is_relative_to("/dev")], elsewhere
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]


def test_mistakes_are_a_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for uri, reason in (
        ("sqlite:////dev/null/mlflow.db", "tiny-shapes@1.0.0: MLflow cannot store it at sqlite:////dev/null/mlflow.db"),
        ("http://me:secret@127.0.0.1:9/", "MLflow cannot store it at http://***@127.0.0.1:9/ ("),
        ("ml/files", "maintenance mode"),
        ("ftp://x", "cannot store it at ftp://x ("),
        ("https://me:secret@[::1", "(Invalid IPv6 URL)"),
        ("sqlite:///1.0.0/bundle/manifest.json", "file is not a database"),
    ):
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        wrong = export(folder, "1.0.0", uri=uri)
        assert wrong.code == 2 and reason in wrong.err and "Traceback" not in wrong.err, wrong.err
        assert "secret" not in wrong.err and len(wrong.err.splitlines()) == 1, wrong.err
    other = eyas(folder, "models", "export", "1.0.0", "x", "--register")
    assert other.code == 2 and "are for --as mlflow" in other.err
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(MissingExtra, match=r"--as mlflow needs mlflow-skinny; .* -m pip install 'eyas\[mlflow\]'"):
        log_version(opened(folder), opened(folder).find("1.0.0"), "sqlite:///x.db")
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
