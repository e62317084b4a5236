"""A key in hardware, by PKCS#11: SoftHSM is a token without hardware, whose key nobody can read either."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from eyas_host.fleet.updates.ceremony import rotate
from eyas_host.fleet.updates.keys import SigningError
from eyas_host.fleet.updates.repository import Repository
from tests.support.device_fixtures import pristine_bundle, weights  # noqa: F401 - fixtures
from tests.support.repositories import PASSPHRASE, Camera, make_repository, versioned
from tests.support.system_parts import find, require, unavailable

_LABEL, _PIN = "release team", "135790"
_LIBRARY = Path("/usr/lib/softhsm/libsofthsm2.so")


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token with an ECDSA key pair of id 2, as a YubiKey's signature slot has; its public key in PEM."""
    require("softhsm2-util")
    if not _LIBRARY.exists():
        unavailable(f"{_LIBRARY} is not installed (make system-deps)")
    pkcs11 = pytest.importorskip("pkcs11")
    ec = pytest.importorskip("pkcs11.util.ec")
    folder = tmp_path_factory.mktemp("token")
    (folder / "tokens").mkdir()
    (folder / "softhsm2.conf").write_text(f"directories.tokendir = {folder}/tokens\nobjectstore.backend = file\n")
    with pytest.MonkeyPatch.context() as patch:  # SoftHSM reads it when it is loaded, once in a process
        patch.setenv("SOFTHSM2_CONF", str(folder / "softhsm2.conf"))
        words = ["--init-token", "--free", "--label", _LABEL, "--so-pin", "24680", "--pin", _PIN]
        subprocess.run([find("softhsm2-util") or "", *words], check=True, capture_output=True)
        with pkcs11.lib(str(_LIBRARY)).get_token(token_label=_LABEL).open(rw=True, user_pin=_PIN) as session:
            curve = {pkcs11.Attribute.EC_PARAMS: ec.encode_named_curve_parameters("secp256r1")}
            parameters = session.create_domain_parameters(pkcs11.KeyType.EC, curve, local=True)
            public, _ = parameters.generate_keypair(id=b"\x02", label="targets", store=True)
            key = serialization.load_der_public_key(ec.encode_ec_public_key(public))
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    (folder / "targets.pub").write_bytes(key.public_bytes(serialization.Encoding.PEM, form))
    return folder / "targets.pub"


def test_it_signs_a_release_that_devices_take(
    token: Path,
    pristine_bundle: Path,  # noqa: F811 - fixture
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYKCS11LIB", str(_LIBRARY))
    pin = _PIN

    def ask(name: str, _new: bool) -> str:
        """Its PIN, or the passphrase of a key in a file."""
        return pin if name.endswith(", pin") else PASSPHRASE

    def opened() -> Repository:
        return Repository(kit, ask=ask)

    kit = tmp_path / "fleet"
    make_repository(kit)
    uri = f"hsm:2?label={_LABEL.replace(' ', '+')}"
    rotate(opened(), ["targets"], uri=uri, public=token)
    camera = Camera(tmp_path / "camera", opened().root(), str(opened().folder))
    opened().publish(versioned(pristine_bundle, tmp_path / "1.0.0", "1.0.0"), channel="stable")
    assert camera.wanted() == "1.0.0"

    pin = "000000"
    with pytest.raises(SigningError, match=r"^targets \(\w{8}\): could not sign \(PinIncorrect\)"):
        opened().publish(versioned(pristine_bundle, tmp_path / "2.0.0", "2.0.0"), channel="stable")
    assert camera.wanted() == "1.0.0"
    pin = _PIN
    opened().publish(tmp_path / "2.0.0", channel="stable")
    assert camera.wanted() == "2.0.0"
