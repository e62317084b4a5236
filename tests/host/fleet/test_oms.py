"""`eyas publish --oms`: what OpenSSF's own tool says of the signature, where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from eyas_device.bundle import Bundle
from eyas_host.fleet.updates.keys import SigningError
from eyas_host.fleet.updates.oms import sign_bundle
from eyas_host.support.errors import MissingExtra
from tests.support.device_fixtures import bundle_root, edit_manifest, pristine_bundle, weights  # noqa: F401 - fixtures


def test_without_the_extra_the_line_that_installs_it(
    bundle_root: Path,  # noqa: F811 - fixture
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(MissingExtra, match=r"pip install 'eyas\[oms\]'"):
        sign_bundle(bundle_root, bundle_root / "key.pem")


def test_openssf_s_tool_verifies_it_and_sees_a_change(bundle_root: Path, tmp_path: Path) -> None:  # noqa: F811
    verifying = pytest.importorskip("model_signing.verifying", reason="the extra oms is not installed")
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    plain = serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    for _ in range(2):  # a signature that is there already is replaced
        signature = sign_bundle(bundle_root, private)
    assert signature == bundle_root / "model.sig"
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=public)
    verifier.verify(bundle_root, signature)
    Bundle.open(bundle_root)
    (bundle_root / "manifest.json").write_bytes((bundle_root / "manifest.json").read_bytes() + b"\n")
    with pytest.raises(ValueError, match="manifest"):
        verifier.verify(bundle_root, signature)
    with pytest.raises(SigningError, match="cannot sign"):
        sign_bundle(bundle_root, public)
