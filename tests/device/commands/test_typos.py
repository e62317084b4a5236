"""A typo on the command line makes no file and no folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from eyas_device.cli import main


@pytest.mark.parametrize(
    "words",
    [
        "run --config typo.toml",
        "run --bundle typo --camera fake:",
        "run --bundle BUNDLE --camera folder:typo/",
        "run --bundle BUNDLE --camera typo/",
        "check typo",
        "check BUNDLE --config typo.toml",
        "info typo",
        "bench --bundle typo",
        "doctor --config typo.toml",
        "snapshot --bundle typo --camera fake: --out out",
        "snapshot --bundle BUNDLE --camera typo: --out out",
        "install typo --state STATE",
        "install BUNDLE --config typo.toml",
        "slots --state STATE",
        "reload --state STATE",
        "status --state STATE",
    ],
)
def test_a_typo_makes_nothing(
    words: str,
    tmp_path: Path,
    pristine_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"BUNDLE": str(pristine_bundle), "STATE": str(tmp_path / "typo")}
    code = main([places.get(word, word) for word in words.split()])
    out, err = capfd.readouterr()
    assert (code != 0 or words.startswith("slots")) and "Traceback" not in err, (out, err)
    assert list(tmp_path.iterdir()) == []
