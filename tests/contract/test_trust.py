"""What a device believes: a real repository, published with real keys, on a server and in a folder that misuse it."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from tuf.api.metadata import TargetFile
from tuf.ngclient import Updater
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet

from eyas_device.updates import refusals
from eyas_device.updates.fetcher import Limits
from eyas_device.updates.release import Policy, channel_target
from eyas_host.fleet.updates.ceremony import rotate
from eyas_host.fleet.updates.metadata import append_signature
from eyas_host.fleet.updates.repository import Repository
from tests.support.repositories import (
    DAY_S,
    QUICK,
    Camera,
    change,
    make_repository,
    newest,
    open_repository,
    served,
    versioned,
)

MODEL = "tiny-shapes"


@pytest.fixture(scope="session")
def pristine_kit(pristine_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit whose channel `stable` wants 1.2.3. Not to be changed by a test."""
    kit = tmp_path_factory.mktemp("kit") / "fleet"
    make_repository(kit).publish(pristine_bundle, channel="stable")
    return kit


@pytest.fixture
def repository(pristine_kit: Path, tmp_path: Path) -> Repository:
    return open_repository(Path(shutil.copytree(pristine_kit, tmp_path / "fleet")))


class Attack:
    """What a device is served: a copy of the repository, which somebody else may change."""

    def __init__(self, repository: Repository, served_folder: Path, camera: Camera) -> None:
        self.repository, self.folder, self.camera = repository, served_folder, camera

    def serve(self, folder: Path | None = None) -> None:
        """Serve the repository as it is now, or another folder."""
        shutil.rmtree(self.folder)
        shutil.copytree(folder or self.repository.folder, self.folder)


@pytest.fixture(params=["http", "folder"])
def attack(request: pytest.FixtureRequest, repository: Repository, tmp_path: Path) -> Iterator[Attack]:
    copy = Path(shutil.copytree(repository.folder, tmp_path / "served"))
    if request.param == "folder":
        yield Attack(repository, copy, Camera(tmp_path / "camera", repository.root(), str(copy)))
        return
    with served(copy) as (url, _):
        yield Attack(repository, copy, Camera(tmp_path / "camera", repository.root(), url))


def test_a_device_gets_the_release_that_its_channel_wants(attack: Attack, pristine_bundle: Path) -> None:
    with attack.camera.open() as trusted:
        found = trusted.refresh()
        channel = trusted.channel(MODEL)
        assert channel is not None
        release, data = trusted.release(channel.target)
        smallest = release.variants[0]
        blobs = {
            file.path: b"".join(trusted.fetcher.open(trusted.blob_url(file.sha256), max_bytes=file.size_bytes))
            for file in smallest.files
        }
        assert trusted.policy().revoked == {}
        assert trusted.channel("another") is None
    assert (found.clock, found.frozen) == ("", "")
    assert (release.version, smallest.runtimes, len(data) > 100) == ("1.2.3", ("litert",), True)
    assert blobs["litert-int8.tflite"] == (pristine_bundle / "litert-int8.tflite").read_bytes()


def test_a_sites_channel_comes_before_that_for_all(attack: Attack, pristine_bundle: Path, tmp_path: Path) -> None:
    attack.repository.publish(versioned(pristine_bundle, tmp_path / "b", "2.0.0"), channel="stable", site="hall-2")
    attack.serve()
    assert attack.camera.wanted() == "1.2.3"
    attack.camera.site = "hall-2"
    assert attack.camera.wanted() == "2.0.0"


# Refusals, each in its own words


def _unsigned(attack: Attack) -> None:
    change(attack.folder / "metadata/timestamp.json", lambda content: content.update(signatures=[]))


def _changed_timestamp(attack: Attack) -> None:
    change(attack.folder / "metadata/timestamp.json", lambda content: content["signed"].update(version=99))


def _not_metadata(attack: Attack) -> None:
    (attack.folder / "metadata/timestamp.json").write_bytes(b"<html>\x1b[31mplease log in</html>")


def _changed_targets(attack: Attack) -> None:
    change(newest(attack.folder, "targets"), lambda content: content["signed"]["targets"].clear())


def _foreign(attack: Attack) -> None:
    attack.serve(make_repository(attack.folder.parent / "other").folder)


def _longer(attack: Attack) -> None:
    path = newest(attack.folder, "targets")
    path.write_bytes(path.read_bytes() + b" " * 100_000)


def _no_timestamp(attack: Attack) -> None:
    (attack.folder / "metadata/timestamp.json").unlink()


def _one_root_key(attack: Attack) -> None:
    """A root with other keys for the timestamp, signed by one of the two keys that it takes."""
    keys = attack.repository.keys
    root = attack.repository.metadata().root
    root.signed.version += 1
    root.signatures.clear()
    signer = keys.signer(root.signed.roles["root"].keyids[0])
    append_signature(root, signer, "a root key")
    (attack.folder / "metadata/2.root.json").write_bytes(root.to_bytes())


@pytest.mark.parametrize(
    ("misuse", "refusal", "words"),
    [
        (_unsigned, refusals.UnsignedError, "timestamp.json: not signed"),
        (_changed_timestamp, refusals.TamperedError, "its signature is wrong"),
        (_not_metadata, refusals.TamperedError, "timestamp.json: not metadata"),
        (_changed_targets, refusals.TamperedError, "2.targets.json: not what was signed"),
        (_foreign, refusals.ForeignError, "keys that root version 1 does not trust"),
        (_longer, refusals.EndlessDataError, "2.targets.json: longer"),
        (_no_timestamp, refusals.MissingError, "timestamp.json: there is no such file"),
        (_one_root_key, refusals.UnsignedError, "2.root.json: signed by 1 of the 2 keys"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_a_refusal_says_what_is_wrong(
    attack: Attack, misuse: Callable[[Attack], None], refusal: type[refusals.TrustError], words: str
) -> None:
    attack.camera.look()
    shutil.rmtree(attack.camera.state)
    misuse(attack)
    with pytest.raises(refusal) as caught:
        attack.camera.look()
    assert type(caught.value) is refusal
    assert words in str(caught.value)
    assert str(caught.value).isprintable()
    attack.serve()
    assert attack.camera.wanted() == "1.2.3"


def test_an_unchanged_repository_costs_one_small_file(repository: Repository, tmp_path: Path) -> None:
    """What was fetched is kept by its hash, and is nothing to trust by itself."""
    with served(repository.folder) as (url, server):
        camera = Camera(tmp_path / "camera", repository.root(), url)
        assert camera.wanted() == "1.2.3"
        server.requested.clear()  # type: ignore[attr-defined]
        assert camera.wanted() == "1.2.3"
        assert server.requested == ["/metadata/2.root.json", "/metadata/timestamp.json"]  # type: ignore[attr-defined]
        for path in (camera.state / "updates/documents").iterdir():
            path.write_bytes(path.read_bytes().replace(b"1.2.3", b"6.6.6"))
        assert camera.wanted() == "1.2.3"
        for number in range(20):
            repository.set_policy(Policy(min_versions={"other": f"1.{number}"}))
            with camera.open() as trusted:
                trusted.refresh()
                assert trusted.policy().min_versions == {"other": f"1.{number}"}
        assert len(list((camera.state / "updates/documents").iterdir())) == 16


def test_a_changed_release_is_refused(attack: Attack) -> None:
    [path] = (attack.folder / "targets/releases").rglob("*.release.json")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(refusals.TamperedError, match="not what was signed"):
        attack.camera.wanted()


def test_an_older_state_is_refused(attack: Attack, pristine_bundle: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(attack.folder, tmp_path / "old"))
    attack.repository.publish(versioned(pristine_bundle, tmp_path / "b", "2.0.0"), channel="stable")
    attack.serve()
    assert attack.camera.wanted() == "2.0.0"
    attack.serve(old)
    with pytest.raises(refusals.RolledBackError, match="older than what this device has seen"):
        attack.camera.look()
    attack.serve()
    assert attack.camera.wanted() == "2.0.0"


@pytest.mark.parametrize("role", ["snapshot", "targets", "channels"])
def test_states_that_are_mixed_are_refused(attack: Attack, pristine_bundle: Path, tmp_path: Path, role: str) -> None:
    """An old, well signed file under the name of the new one."""
    old = newest(attack.folder, role).read_bytes()
    attack.repository.publish(versioned(pristine_bundle, tmp_path / "b", "2.0.0"), channel="stable")
    attack.serve()
    newest(attack.folder, role).write_bytes(old)
    with pytest.raises(refusals.MixedError, match="metadata of different states"):
        attack.camera.wanted()


def test_who_holds_the_online_keys_cannot_make_a_release(attack: Attack, tmp_path: Path) -> None:
    """They may choose among signed releases; one that they sign themselves is none."""
    metadata = attack.repository.metadata()
    data = b'{"model": "tiny-shapes", "version": "6.6.6"}'
    name = f"releases/{MODEL}/6.6.6/release.json"
    info = TargetFile.from_data(name, data, ["sha256"])
    metadata.roles["channels"].signed.targets[name] = info
    metadata.commit({"channels"}, time.time())
    attack.serve()
    path = attack.folder / "targets" / f"releases/{MODEL}/6.6.6/{info.hashes['sha256']}.release.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    with attack.camera.open() as trusted:
        trusted.refresh()
        with pytest.raises(refusals.MissingError, match="lists no such target"):
            trusted.release(name)


def test_a_site_cannot_speak_for_another(attack: Attack, pristine_bundle: Path, tmp_path: Path) -> None:
    """Each role has one delegator and paths of its own, so that cached metadata never count for another delegation."""
    for number, site in enumerate(("hall-1", "hall-2")):
        bundle = versioned(pristine_bundle, tmp_path / site, f"2.0.{number}")
        attack.repository.publish(bundle, channel="stable", site=site)
    metadata = attack.repository.metadata()
    delegations = metadata.targets.delegations
    assert delegations is not None and delegations.roles is not None
    assert all(role.terminating for name, role in delegations.roles.items() if name.startswith("site-"))
    assert all(role.signed.delegations is None for name, role in metadata.roles.items() if name != "targets")
    stolen = channel_target("stable", MODEL, "hall-2")
    targets = metadata.roles["site-hall-1"].signed.targets
    targets[stolen] = targets[channel_target("stable", MODEL, "hall-1")]
    metadata.commit({"site-hall-1"}, time.time())
    attack.serve()
    attack.camera.site = "hall-1"
    assert attack.camera.wanted() == "2.0.0"
    attack.camera.site = "hall-2"
    assert attack.camera.wanted() == "2.0.1"


def test_no_bytes_make_a_device_stumble(repository: Repository, tmp_path: Path) -> None:
    """Whatever stands in the files, a refusal is one of those that are meant."""
    chance = random.Random(20)
    files = [*(repository.folder / "metadata").iterdir(), *(repository.folder / "targets").rglob("*.json")]
    assert len(files) > 7
    nested = b'{"signatures": ' + b"[" * 50_000
    for number in range(150):
        folder = Path(shutil.copytree(repository.folder, tmp_path / f"served-{number}"))
        path = folder / files[number % len(files)].relative_to(repository.folder)
        data = bytearray(path.read_bytes())
        match number // len(files) % 5:
            case 0:
                data = bytearray(nested)
            case 1:
                del data[chance.randrange(len(data)) :]
            case 2:
                at = chance.randrange(len(data))
                data[at : at + chance.randrange(1, 40)] = chance.randbytes(chance.randrange(1, 40))
            case 3:
                content = json.loads(data)
                part = content.get("signed", content)
                part[chance.choice(sorted(part))] = chance.choice([None, [], {}, "\x1b[2J", -1, 10**300, True, [[]]])
                data = bytearray(json.dumps(content).encode())
            case _:
                content = json.loads(data)
                content["signatures"] = chance.choice(
                    [None, {}, [None], [{"keyid": [], "sig": 1}], [{"keyid": "a"}] * 9]
                )
                data = bytearray(json.dumps(content).encode())
        path.write_bytes(data)
        camera = Camera(tmp_path / f"camera-{number}", repository.root(), str(folder))
        with suppress(refusals.TrustError):
            camera.wanted()
            continue
        camera.url = str(repository.folder)
        assert camera.wanted() == "1.2.3"
        shutil.rmtree(folder)


# Keys that are lost or stolen


def test_stolen_online_keys_are_replaced_with_those_kept_away(attack: Attack, tmp_path: Path) -> None:
    """A thief counts the versions up, so that nothing newer could follow; the owner's new keys end that."""
    thief = Repository(Path(shutil.copytree(attack.repository.kit, tmp_path / "thief")))
    metadata = thief.metadata()
    for one in (metadata.timestamp, metadata.snapshot, metadata.roles["channels"]):
        one.signed.version = 1_000_000
    metadata.commit({"channels"}, time.time())
    attack.serve(thief.folder)
    assert attack.camera.wanted() == "1.2.3"
    attack.serve()
    with pytest.raises(refusals.RolledBackError):
        attack.camera.look()
    assert rotate(attack.repository, ["online"]).version == 2
    attack.serve()
    assert attack.camera.wanted() == "1.2.3"
    stolen = thief.metadata()
    stolen.commit({"channels"}, time.time())
    shutil.copy(thief.folder / "metadata/timestamp.json", attack.folder / "metadata/timestamp.json")
    with pytest.raises(refusals.ForeignError, match="root version 2 does not trust"):
        attack.camera.look()


def test_a_thief_of_the_online_keys_cannot_stop_the_clock_for_ever(
    attack: Attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He signs a time of 2040, which a device without a clock must believe; the owner's new keys end that, too."""
    monkeypatch.setattr("eyas_device.updates.trust.is_synchronised", lambda: False)
    thief = Repository(Path(shutil.copytree(attack.repository.kit, tmp_path / "thief")))
    thief.metadata().commit({"channels", "snapshot"}, 2_208_988_800.0)
    attack.serve(thief.folder)
    attack.camera.look()
    attack.serve()
    for _ in range(2):
        with pytest.raises(refusals.TrustError):
            attack.camera.look()
    rotate(attack.repository, ["online"])
    attack.serve()
    found = attack.camera.look()
    assert (found.clock, attack.camera.wanted()) == ("", "1.2.3")


def test_a_clock_that_the_network_sets_believes_no_signed_time(
    attack: Attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eyas_device.updates.trust.is_synchronised", lambda: True)
    thief = Repository(Path(shutil.copytree(attack.repository.kit, tmp_path / "thief")))
    thief.metadata().commit({"channels", "snapshot"}, 2_208_988_800.0)
    attack.serve(thief.folder)
    for _ in range(2):
        assert attack.camera.look().clock == ""


def test_a_chain_of_roots_is_followed_from_the_pinned_one(attack: Attack) -> None:
    for names in (["root-1"], ["root-2"], ["root-3", "targets"], ["root-1", "online"]):
        rotate(attack.repository, names)
    attack.serve()
    assert attack.camera.wanted() == "1.2.3"
    assert attack.camera.look().frozen == ""
    (attack.camera.state / "updates/metadata/root.json").unlink()
    (attack.camera.state / "updates/metadata/timestamp.json").write_bytes(b"")
    assert attack.camera.wanted() == "1.2.3"


# Clocks


def test_a_clock_of_1970_updates_and_says_so(attack: Attack) -> None:
    attack.camera.time = 60.0
    assert attack.camera.wanted() == "1.2.3"
    assert "the clock reads 1970-01-01, but it is" in attack.camera.look().clock


def test_a_clock_of_1970_does_not_forget_what_expired(attack: Attack) -> None:
    """The floor survives the restart: metadata that had expired before it are refused."""
    now = time.time()
    later = open_repository(attack.repository.kit, lambda: now + 20 * DAY_S)
    old = Path(shutil.copytree(attack.folder, attack.folder.with_name("old")))
    later.renew(everything=True)
    attack.serve()
    attack.camera.time = now + 20 * DAY_S
    attack.camera.look()
    attack.camera.time = 0.0
    assert attack.camera.wanted() == "1.2.3"
    attack.serve(old)
    shutil.rmtree(attack.camera.state / "updates/metadata")
    with pytest.raises(refusals.ExpiredError, match=r"timestamp.json is expired .* last signed on"):
        attack.camera.look()


@pytest.mark.parametrize(
    ("synchronised", "refusal"), [(False, refusals.ClockAheadError), (True, refusals.ExpiredError)]
)
def test_a_clock_that_is_ahead_stops_updates_until_it_is_right(
    attack: Attack, monkeypatch: pytest.MonkeyPatch, synchronised: bool, refusal: type[refusals.TrustError]
) -> None:
    monkeypatch.setattr("eyas_device.updates.explain.is_synchronised", lambda: synchronised)
    attack.camera.time = time.time() + 14 * 365 * DAY_S
    for _ in range(2):
        with pytest.raises(refusal, match="until") as caught:
            attack.camera.look()
        assert type(caught.value) is refusal
    attack.camera.time = None
    assert attack.camera.wanted() == "1.2.3"


def test_a_clock_that_was_days_ahead_poisons_nothing(attack: Attack) -> None:
    attack.camera.time = time.time() + 13 * DAY_S
    attack.camera.look()
    attack.camera.time = None
    found = attack.camera.look()
    assert "expiry cannot be judged" in found.clock
    open_repository(attack.repository.kit).renew()
    attack.serve()
    assert attack.camera.wanted() == "1.2.3"


def test_a_repository_that_nobody_renews_is_reported_before_it_expires(attack: Attack) -> None:
    attack.camera.time = time.time() + 8 * DAY_S
    assert "nothing new was signed since" in attack.camera.look().frozen
    attack.camera.time = time.time() + 15 * DAY_S
    with pytest.raises(refusals.ExpiredError):
        attack.camera.look()


# The device's own side


@pytest.mark.parametrize("content", [None, b"", b"{}", b"not json", b'{"signed": {"_type": "targets"}}'])
def test_without_a_pinned_root_nothing_is_believed(attack: Attack, content: bytes | None) -> None:
    attack.camera.root.unlink()
    if content is not None:
        attack.camera.root.write_bytes(content)
    with pytest.raises(refusals.RootError, match="`eyas enroll`"):
        attack.camera.look()


def test_a_pinned_root_that_is_not_signed_is_refused(attack: Attack) -> None:
    change(attack.camera.root, lambda content: content.update(signatures=[]))
    with pytest.raises(refusals.RootError, match="the pinned root is refused"):
        attack.camera.look()


def test_two_looks_at_once_are_not_possible(attack: Attack) -> None:
    with attack.camera.open(), pytest.raises(refusals.BusyError, match="another process"):
        attack.camera.open()


def test_a_stick_with_links_and_pipes_is_read_without_harm(repository: Repository, tmp_path: Path) -> None:
    camera = Camera(tmp_path / "camera", repository.root(), f"file://{repository.folder}")
    assert camera.wanted() == "1.2.3"
    timestamp = repository.folder / "metadata/timestamp.json"
    timestamp.unlink()
    timestamp.symlink_to("/etc/passwd")
    with pytest.raises(refusals.MissingError, match="a link to somewhere else"):
        camera.look()
    timestamp.unlink()
    os.mkfifo(timestamp)
    with pytest.raises(refusals.MissingError, match="not a file"):
        camera.look()
    shutil.rmtree(repository.folder)
    with pytest.raises(refusals.UnreachableError, match="is it mounted"):
        camera.look()


# Servers that do not end

_SERVER_S = 20.0
"""How long the slow ones would go on."""


def _drip(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "10000")
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" ")
        time.sleep(_SERVER_S / 200)


def _drip_headers(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    for _ in range(200):
        handler.wfile.write(b"a")
        time.sleep(_SERVER_S / 200)


def _silent(_handler: BaseHTTPRequestHandler) -> None:
    time.sleep(_SERVER_S)


def _endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" " * 65536)


def _broken_off(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "10000")
    handler.end_headers()
    handler.wfile.write(b"{")


def _circle(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(302)
    handler.send_header("Location", handler.path)
    handler.end_headers()


def _failing(handler: BaseHTTPRequestHandler) -> None:
    handler.send_error(503)


@pytest.mark.parametrize(
    ("answer", "refusal", "limits"),
    [
        (_drip, refusals.SlowDataError, QUICK),
        (_drip_headers, refusals.SlowDataError, QUICK),
        (_silent, refusals.SlowDataError, QUICK),
        (_endless, refusals.EndlessDataError, Limits()),
        (_broken_off, refusals.UnreachableError, Limits()),
        (_circle, refusals.UnreachableError, Limits()),
        (_failing, refusals.UnreachableError, Limits()),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
@pytest.mark.parametrize("file", ["timestamp.json", "2.root.json"])
def test_no_server_holds_a_device_back(
    repository: Repository,
    tmp_path: Path,
    answer: Callable[[BaseHTTPRequestHandler], None],
    refusal: type[refusals.TrustError],
    limits: Limits,
    file: str,
) -> None:
    with served(repository.folder) as (url, server):
        camera = Camera(tmp_path / "camera", repository.root(), url)
        server.answers[f"/metadata/{file}"] = answer  # type: ignore[attr-defined]
        began = time.monotonic()
        with pytest.raises(refusal) as caught, camera.open(limits) as trusted:
            trusted.refresh()
        assert type(caught.value) is refusal
        assert time.monotonic() - began < _SERVER_S
        server.answers.clear()  # type: ignore[attr-defined]
        assert camera.wanted() == "1.2.3"


# The parts of tuf that the device leans on


def test_the_private_parts_of_tuf_are_there(repository: Repository, tmp_path: Path) -> None:
    trusted = TrustedMetadataSet(repository.root(), Updater.__init__.__globals__["EnvelopeType"].METADATA)
    assert trusted.reference_time.tzinfo is not None
    updater = Updater(str(tmp_path), "metadata", bootstrap=repository.root())
    assert isinstance(updater._trusted_set, TrustedMetadataSet)
    for name in ("_persist_file", "_update_root_symlink", "_load_timestamp"):
        assert callable(getattr(Updater, name))
    assert updater._dir == str(tmp_path)


def test_metadata_are_on_the_disk_before_they_count(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file of the cache goes through the one durable write."""
    written: list[str] = []
    real = __import__("eyas_device.updates.trust", fromlist=["atomic_write"]).atomic_write

    def recorded(path: Path, data: bytes) -> None:
        written.append(path.name)
        real(path, data)

    monkeypatch.setattr("eyas_device.updates.trust.atomic_write", recorded)
    camera = Camera(tmp_path / "camera", repository.root(), str(repository.folder))
    camera.wanted()
    cached = {path.name for path in (camera.state / "updates/metadata").rglob("*.json") if not path.is_symlink()}
    assert cached == set(written) == {"1.root.json", "timestamp.json", "snapshot.json", "targets.json", "channels.json"}
    written.clear()
    camera.wanted()
    assert not written
