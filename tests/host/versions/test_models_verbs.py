"""`eyas models`, typed: from a finished run to a card, and back to a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eyas_device.bundle import Bundle
from tests.support.device_fixtures import pristine_bundle, weights  # noqa: F401 - fixtures
from tests.support.finished_run import finish_run, split_of
from tests.support.inside import eyas


@pytest.fixture
def folder(pristine_bundle: Path, tmp_path: Path) -> Path:  # noqa: F811 - fixture
    """A folder with two finished runs of one model: the second has more images, and learned from test images."""
    labels = Bundle.open(pristine_bundle).manifest.labels
    finish_run(tmp_path / "runs/a", pristine_bundle, "1.0.0")
    finish_run(
        tmp_path / "runs/b", pristine_bundle, "1.1.0", split=split_of(labels, range(90), range(90, 95), range(95, 100))
    )
    return tmp_path


def test_from_a_run_to_a_version_that_serves_and_back(folder: Path) -> None:
    added = eyas(folder, "models", "add", "runs/a", "--alias", "champion", "--note", "the first")
    assert (added.code, added.out.splitlines()[-1]) == (0, "tiny-shapes@1.0.0: champion")
    assert "registered" in added.out
    assert "is registered already" in eyas(folder, "models", "add", "runs/a").out
    assert eyas(folder, "models", "add", "runs/b", "--alias", "challenger").code == 0
    listed = eyas(folder, "models", "list").out
    assert "tiny-shapes@1.0.0" in listed and "champion" in listed and "0.900 (0.800 to 0.900)" in listed
    rows = [json.loads(line) for line in eyas(folder, "models", "list", "--json").out.splitlines()]
    assert [(row["version"], row["parent"], row["aliases"]) for row in rows] == [
        ("1.0.0", "", ["champion"]),
        ("1.1.0", "1.0.0", ["challenger"]),
    ], "it follows the champion"
    shown = eyas(folder, "models", "show", "challenger").out
    assert "follows      tiny-shapes@1.0.0" in shown
    diff = eyas(folder, "models", "diff", "champion", "challenger").out
    assert "10 images that tested the first one trained the second: the figures cannot be compared" in diff
    assert "figures on different held-out images" in diff
    assert eyas(folder, "models", "card", "champion", "--out", "CARD.md").code == 0
    assert "# tiny-shapes 1.0.0 (champion)" in (folder / "CARD.md").read_text()
    assert eyas(folder, "models", "export", "champion", "again").code == 0
    assert Bundle.open(folder / "again/bundle").manifest.version == "1.0.0"
    assert eyas(folder, "models", "export", "champion", "hub", "--as", "hub").code == 0
    assert (folder / "hub/README.md").read_text().startswith("---\nlicense:")
    assert eyas(folder, "models", "export", "champion", "bom.json", "--as", "cyclonedx").code == 0
    assert json.loads((folder / "bom.json").read_text())["bomFormat"] == "CycloneDX"
    assert "champion, before: 1.0.0" in eyas(folder, "models", "alias", "champion", "challenger").out
    assert "dropped, was 1.1.0" in eyas(folder, "models", "alias", "challenger", "--drop").out
    log = eyas(folder, "models", "list", "--log").out
    assert [word for word in ("added", "alias champion", "alias dropped challenger") if word not in log] == []
    assert "removed the files of no version" in eyas(folder, "models", "prune", "--keep", "1").out, "it is the parent"


def test_mistakes_are_a_sentence_and_damage_is_an_exit_code(folder: Path) -> None:
    nothing = eyas(folder, "models", "show", "champion")
    assert nothing.code == 2 and "eyas models add RUN registers one" in nothing.err and "Traceback" not in nothing.err
    eyas(folder, "models", "add", "runs/a")
    for words, said in (
        (("add", "runs"), "split, teach, distill, prune, qat, compile, verify, pack not finished"),
        (("show", "2.0.0"), "no such version or alias; there are: 1.0.0"),
        (("alias", "Champion!", "1.0.0"), "an alias is of small letters"),
        (("export", "1.0.0", "x", "--as", "zip"), "run, bundle, hub, cyclonedx or mlflow"),
        (("add", "runs/b", "--parent", "9.9.9"), "no such version"),
    ):
        done = eyas(folder, "models", *words)
        assert done.code == 2 and said in done.err and "Traceback" not in done.err, done.err
    assert eyas(folder, "models", "verify").code == 0
    victim = next(path for path in (folder / "registry/objects").glob("*/*"))
    victim.chmod(0o644)
    victim.write_bytes(b"")
    found = eyas(folder, "models", "verify")
    assert found.code == 1 and "is damaged" in found.out
