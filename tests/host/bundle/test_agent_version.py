"""The oldest agent of a bundle follows from what it uses."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from msgspec.structs import replace

import eyas_host.bundle.pack
from eyas_device.bundle import BundleError, read_manifest
from eyas_host.bundle import agent_version
from eyas_host.bundle.agent_version import min_agent_version
from eyas_host.export.manifest import write_manifest
from tests.contract.test_versions import HERE


def test_a_bundle_of_first_features_runs_on_the_first_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eyas_device.__version__", "7.8.9")
    assert min_agent_version(read_manifest(HERE / "0.1.0")) == "0.1.0"
    assert "__version__" not in inspect.getsource(eyas_host.bundle.pack), "the packer's version is no reason"


def test_a_feature_that_older_agents_misread_asks_for_the_agent_that_knows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(HERE / "0.1.0")
    features = {
        "more than two labels": ("0.10.0", lambda m: len(m.labels) > 2),
        "costs": ("0.9.0", lambda m: True),
        "large images": ("3.0", lambda m: m.preprocessing.size > 4096),
    }
    monkeypatch.setattr(agent_version, "FEATURES", features)
    assert min_agent_version(manifest) == "0.10.0", "versions are compared as numbers, unused features not at all"
    write_manifest(replace(manifest, min_agent_version="0.10.0"), tmp_path)
    with pytest.raises(BundleError, match=r"needs eyas 0\.10\.0 or newer"):
        read_manifest(tmp_path)
