"""The certificate authority: it is never replaced, whatever of it is missing, closed or damaged."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509

from eyas_host.fleet.broker import kit as kit_module
from eyas_host.fleet.broker.enroll import enroll
from eyas_host.fleet.broker.expel import expel
from eyas_host.fleet.broker.kit import prepare
from eyas_host.fleet.broker.pki import Authority, CredentialError, days_left, serial_number
from tests.support.small_disk import mounted

Files = dict[str, bytes]


def contents(folder: Path) -> Files:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def no_key(fleet: Path) -> None:
    (fleet / "ca" / "ca.key").unlink()


def no_certificate(fleet: Path) -> None:
    (fleet / "ca" / "ca.crt").unlink()


def no_folder(fleet: Path) -> None:
    shutil.rmtree(fleet / "ca")


def empty_key(fleet: Path) -> None:
    (fleet / "ca" / "ca.key").write_bytes(b"")


def cut_certificate(fleet: Path) -> None:
    path = fleet / "ca" / "ca.crt"
    path.write_bytes(path.read_bytes()[:200])


def key_of_another(fleet: Path) -> None:
    Authority(fleet.parent / "other")
    shutil.copy(fleet.parent / "other" / "ca.key", fleet / "ca" / "ca.key")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_key, "ca.key is missing beside ca.crt"),
        (no_certificate, "ca.crt is missing beside ca.key: copy it back"),
        (no_folder, "is missing, but"),
        (empty_key, "ca.key: damaged"),
        (cut_certificate, "ca.crt: damaged"),
        (key_of_another, "does not belong to"),
    ],
)
def test_enrolling_with_half_an_authority_is_an_error(
    tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    fleet = tmp_path / "fleet"
    prepare(fleet)
    enroll(fleet, "cam-1")
    damage(fleet)
    before = contents(fleet)
    with pytest.raises(CredentialError) as caught:
        enroll(fleet, "cam-2")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert "remove" not in str(caught.value), "whoever obeys locks the fleet out"
    assert contents(fleet) == before


def test_a_broker_runs_without_the_key_until_something_has_to_be_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = tmp_path / "fleet"
    first = prepare(fleet, names=["broker.lan"])
    no_key(fleet)
    before = contents(fleet)
    assert prepare(fleet, names=["broker.lan"]) == first
    assert contents(fleet) == before
    with pytest.raises(CredentialError, match="put it back"):
        prepare(fleet, names=["another.lan"])
    with pytest.raises(CredentialError, match="put it back"):
        enroll(fleet, "cam-1")
    assert contents(fleet) == before
    elsewhere = prepare(fleet, bind="127.0.0.2", names=["broker.lan"])
    assert "not for 127.0.0.2" in elsewhere.warnings[0], "an address that changed by itself stops no broker"
    monkeypatch.setattr(kit_module, "_RENEW_DAYS", 10_000.0)
    old = prepare(fleet, bind="127.0.0.1", names=["broker.lan"])
    assert len(old.warnings) == 2 and all("expires in 8" in warning for warning in old.warnings)
    for name in ("broker/server.crt", "host/client.crt"):
        (fleet / name).unlink()
        with pytest.raises(CredentialError, match="put it back"):
            prepare(fleet, names=["broker.lan"])
        (fleet / name).write_bytes(before[name])


def test_a_pair_that_does_not_belong_together_is_issued_again(tmp_path: Path) -> None:
    """As a power cut between the two leaves it, or a copy of half of a folder."""
    fleet = tmp_path / "fleet"
    kit = prepare(fleet)
    other = Authority(tmp_path / "other").issue(tmp_path / "x", "eyas-host")
    for own, strange in (
        (kit.host.key, other.key),
        (fleet / "broker/server.key", other.key),
        (kit.host.cert, other.cert),
    ):
        shutil.copy(strange, own)
        serials = serial_number(kit.host.cert), serial_number(fleet / "broker/server.crt")
        prepare(fleet)
        assert (serial_number(kit.host.cert), serial_number(fleet / "broker/server.crt")) != serials
        assert days_left(kit.host.cert) > 800


def test_two_first_starts_and_many_enrolments_at_once(tmp_path: Path) -> None:
    """One authority comes of it, whose record names every certificate."""
    script = (
        "import sys; from pathlib import Path; from eyas_host.fleet.broker.enroll import enroll\n"
        "for number in range(10): enroll(Path(sys.argv[1]), f'cam-{sys.argv[2]}-{number}')"
    )
    fleet = tmp_path / "fleet"
    processes = [subprocess.Popen([sys.executable, "-c", script, str(fleet), str(n)]) for n in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    authority = Authority(fleet / "ca", create=False)
    serials = {int(issued.serial, 16): issued.name for issued in authority.issued()}
    certificates = list(fleet.glob("devices/*/client.crt"))
    assert len(certificates) == len(serials) == 30
    for path in certificates:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        certificate.verify_directly_issued_by(authority.certificate)
        assert serials[certificate.serial_number] == path.parent.name


def fill(disk: Path) -> Path:
    """Take all room there is."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as stream, pytest.raises(OSError, match="No space"):
        while True:
            stream.write(b"x" * 1024)
    return filler


def test_a_full_disk_leaves_everything_as_it_was(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=256k") as disk:
        fleet = disk / "fleet"
        prepare(fleet)
        enroll(fleet, "cam-1")
        before = contents(fleet)
        filler = fill(disk)
        for verb in (lambda: enroll(fleet, "cam-1"), lambda: enroll(fleet, "cam-2"), lambda: expel(fleet, "cam-1")):
            with pytest.raises(CredentialError, match="No space left on device") as caught:
                verb()
            assert "remove" not in str(caught.value)
        assert contents(fleet) == before
        filler.unlink()
        shutil.rmtree(fleet)
        fill(disk)
        with pytest.raises(CredentialError, match="No space left on device"):
            prepare(fleet)
        assert contents(disk) == {"filler": filler.read_bytes()}, "no half of an authority"


@contextmanager
def another_user() -> Iterator[None]:
    """Act as the user `nobody`."""
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


CLOSED = ["ca", "ca/ca.key", "ca/ca.crt", "broker", "broker/hosts", "broker/server.key", "broker/ca.crl", "host"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user than the one that owns the files")
@pytest.mark.parametrize("closed", CLOSED)
def test_a_closed_folder_or_file_is_one_line(open_folder: Path, closed: str) -> None:
    fleet = open_folder / closed.replace("/", "-")
    prepare(fleet)
    for path in (fleet, *fleet.rglob("*")):
        path.chmod(0o777)
    (fleet / closed).chmod(0)
    before = contents(fleet / "ca")
    verbs = [lambda: prepare(fleet, names=["broker.lan"])]
    verbs += [lambda: enroll(fleet, "cam-1")] if closed.startswith("ca") else []
    for verb in verbs:
        with another_user(), pytest.raises(CredentialError) as caught:
            verb()
        assert "Permission denied" in str(caught.value) and "see to its permissions" in str(caught.value)
        assert "remove" not in str(caught.value) and "\n" not in str(caught.value)
    assert contents(fleet / "ca") == before
