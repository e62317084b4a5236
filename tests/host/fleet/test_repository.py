"""The signed repository: publishing, withdrawing, renewing, copying, and a crash at every file that is written."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from eyas_device.updates import refusals
from eyas_device.updates.release import Bounds, Channel, Policy, blob_path
from eyas_host.fleet.broker.pki import CredentialError
from eyas_host.fleet.updates import repository as repository_module
from eyas_host.fleet.updates.ceremony import create, rotate, sign, sign_file
from eyas_host.fleet.updates.keys import SigningError
from eyas_host.fleet.updates.metadata import DamagedRepository
from eyas_host.fleet.updates.mirror import mirror
from eyas_host.fleet.updates.prune import GRACE_S, prune
from eyas_host.fleet.updates.repository import Repository
from eyas_host.fleet.updates.variants import PublishError
from eyas_host.fleet.updates.verify import verify
from eyas_host.support.errors import StageError
from tests.support.bundles import edit
from tests.support.device_fixtures import pristine_bundle, weights  # noqa: F401 - fixtures
from tests.support.repositories import (
    DAY_S,
    PASSPHRASE,
    Camera,
    ask,
    change,
    make_repository,
    open_repository,
    versioned,
)

MODEL = "tiny-shapes"


@pytest.fixture(scope="module")
def empty_kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kit = tmp_path_factory.mktemp("kit") / "fleet"
    make_repository(kit)
    return kit


@pytest.fixture
def repository(empty_kit: Path, tmp_path: Path) -> Repository:
    return open_repository(Path(shutil.copytree(empty_kit, tmp_path / "fleet")))


@pytest.fixture
def bundles(pristine_bundle: Path, tmp_path: Path) -> Iterator[dict[str, Path]]:  # noqa: F811 - fixture
    yield {version: versioned(pristine_bundle, tmp_path / version, version) for version in ("1.0.0", "1.1.0", "2.0.0")}


@pytest.fixture
def camera(repository: Repository, tmp_path: Path) -> Camera:
    return Camera(tmp_path / "camera", repository.root(), str(repository.folder))


# Publishing


def test_variants_are_what_one_runtime_loads_the_smallest_first(
    repository: Repository, bundles: dict[str, Path]
) -> None:
    release = repository.publish(bundles["1.0.0"], probation=Bounds(frames=7), boards=("raspberry-pi-5",), note="first")
    sizes = [sum(file.size_bytes for file in variant.files) for variant in release.variants]
    assert sizes == sorted(sizes)
    assert {variant.runtimes for variant in release.variants} == {
        ("litert",), ("onnx",), ("openvino",), ("litert", "openvino", "onnx")
    }  # fmt: skip
    assert (release.probation.frames, release.boards, release.note) == (7, ("raspberry-pi-5",), "first")
    for variant in release.variants:
        files = {file.path: file.sha256 for file in variant.files}
        assert files["manifest.json"] == variant.manifest_sha256
        assert all((repository.folder / blob_path(digest)).is_file() for digest in files.values())
    only = repository.publish(edit(bundles["2.0.0"], name="other"), targets=["pi5"])
    assert [variant.runtimes for variant in only.variants] == [("litert",)]


def test_the_same_bundle_again_only_sets_the_channel(repository: Repository, bundles: dict[str, Path]) -> None:
    first = repository.publish(bundles["1.0.0"])
    before = sorted(path.name for path in (repository.folder / "metadata").iterdir())
    assert repository.publish(bundles["1.0.0"]) == first
    assert sorted(path.name for path in (repository.folder / "metadata").iterdir()) == before
    assert repository.channel("stable", MODEL) is None
    repository.publish(bundles["1.0.0"], channel="stable")
    assert repository.channel("stable", MODEL) is not None


def test_another_bundle_with_the_same_version_is_refused(repository: Repository, bundles: dict[str, Path]) -> None:
    repository.publish(bundles["1.0.0"])
    edit(bundles["1.0.0"], created="later")
    with pytest.raises(PublishError, match="higher version"):
        repository.publish(bundles["1.0.0"])


def test_a_channel_does_not_go_back_by_itself(repository: Repository, bundles: dict[str, Path]) -> None:
    repository.publish(bundles["2.0.0"], channel="stable")
    with pytest.raises(PublishError, match=r"wants 2\.0\.0, which is newer .* `eyas revoke 2\.0\.0`"):
        repository.publish(bundles["1.0.0"], channel="stable")


def test_a_rollout_under_way_is_not_overrun(repository: Repository, bundles: dict[str, Path]) -> None:
    repository.publish(bundles["1.0.0"])
    repository.set_channel(
        "stable", Channel(model=MODEL, target=f"releases/{MODEL}/1.0.0/release.json", rollout="r1", shares={"*": 0.1})
    )
    with pytest.raises(PublishError, match="rollout r1 is under way"):
        repository.publish(bundles["2.0.0"], channel="stable")
    with pytest.raises(PublishError, match="not published"):
        repository.set_channel("stable", Channel(model=MODEL, target=f"releases/{MODEL}/9/release.json"))


def test_a_missing_key_publishes_nothing(repository: Repository, bundles: dict[str, Path], tmp_path: Path) -> None:
    stick = tmp_path / "stick"
    stick.mkdir()
    [key] = repository.keys.folder.glob("targets-*.pem")
    key.rename(stick / key.name)
    with pytest.raises(SigningError, match=r"targets cannot be signed: targets \(.*--keys DIR"):
        repository.publish(bundles["1.0.0"], channel="stable")
    assert verify(repository) == []
    assert repository.releases() == []
    with_stick = Repository(repository.kit, ask=ask, key_folders=[stick])
    assert with_stick.publish(bundles["1.0.0"], channel="stable").version == "1.0.0"


@pytest.mark.parametrize("answer", [None, "not the passphrase"])
def test_without_the_passphrase_nothing_is_published(
    repository: Repository, bundles: dict[str, Path], answer: str | None
) -> None:
    closed = Repository(repository.kit, ask=None if answer is None else lambda name, new: answer)
    with pytest.raises(SigningError, match="passphrase"):
        closed.publish(bundles["1.0.0"])
    assert closed.releases() == []


def test_private_keys_are_their_owners_alone(repository: Repository) -> None:
    private = sorted(repository.keys.folder.glob("*.pem"))
    assert len(private) == 7
    assert {path.stat().st_mode & 0o777 for path in private} == {0o600}
    encrypted = {path.name.rsplit("-", 1)[0] for path in private if b"ENCRYPTED" in path.read_bytes()}
    assert encrypted == {"root-1", "root-2", "root-3", "targets"}
    assert not list(repository.folder.rglob("*.pem"))


# A crash at every file


def test_a_crash_at_any_file_leaves_a_sound_repository(
    repository: Repository,
    bundles: dict[str, Path],
    camera: Camera,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Publishing, revoking and replacing keys, stopped before each file that they write: devices read on."""
    repository.publish(bundles["1.0.0"], channel="stable")
    camera.wanted()
    names = ("eyas_host.fleet.updates.metadata.write_bytes", "eyas_host.fleet.updates.repository.write_bytes")
    real = repository_module.write_bytes
    tried = 0

    def run(action: str, kit: Path, after: int | None) -> int:
        count = 0

        def write(path: Path, data: bytes) -> None:
            nonlocal count
            if after is not None and count >= after:
                raise StageError("power cut")
            count += 1
            real(path, data)

        for name in names:
            monkeypatch.setattr(name, write)
        opened = open_repository(kit)
        try:
            if action == "publish":
                opened.publish(bundles["2.0.0"], channel="stable", site="hall-2")
            elif action == "revoke":
                opened.revoke("1.0.0")
            else:
                rotate(opened, ["channels"])
        finally:
            for name in names:
                monkeypatch.setattr(name, real)
        return count

    for action in ("publish", "revoke", "rotate"):
        whole = run(action, Path(shutil.copytree(repository.kit, tmp_path / action)), None)
        assert whole >= 4
        for after in range(whole):
            kit = Path(shutil.copytree(repository.kit, tmp_path / f"{action}-{after}"))
            with pytest.raises(CredentialError, match="power cut"):
                run(action, kit, after)
            at = Camera(tmp_path / f"camera-{action}-{after}", repository.root(), str(kit / "repository"))
            assert at.wanted() == "1.0.0"
            assert verify(open_repository(kit)) == []
            run(action, kit, None)
            assert verify(open_repository(kit)) == []
            at.look()
            tried += 1
    assert tried >= 12


def test_a_crash_while_a_new_root_is_published_is_healed_by_renewing(
    repository: Repository,
    bundles: dict[str, Path],
    camera: Camera,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Devices may refuse what they see between the root and the timestamp; they keep what they have until then."""
    repository.publish(bundles["1.0.0"], channel="stable")
    camera.wanted()
    name = "eyas_host.fleet.updates.metadata.write_bytes"
    real = repository_module.write_bytes
    for after in range(5):
        kit = Path(shutil.copytree(repository.kit, tmp_path / f"kit-{after}"))
        left = iter(range(after))

        def write(path: Path, data: bytes, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise StageError("power cut")
            real(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(name, write)
            with pytest.raises(CredentialError, match="power cut"):
                rotate(open_repository(kit), ["online"])
        at = Camera(tmp_path / f"camera-{after}", repository.root(), str(kit / "repository"))
        with suppress(refusals.TrustError):
            assert at.wanted() == "1.0.0"
        Repository(kit).renew()
        assert at.wanted() == "1.0.0"
        assert verify(open_repository(kit)) == []


# Withdrawing


def test_a_revoked_release_is_gone_and_its_channels_go_back(
    repository: Repository, bundles: dict[str, Path], camera: Camera
) -> None:
    repository.publish(bundles["1.0.0"], channel="stable")
    bad = repository.publish(bundles["1.1.0"], channel="stable")
    assert camera.wanted() == "1.1.0"
    [gone] = repository.revoke("1.1.0", reason="wrong at night")
    assert gone == bad
    with camera.open() as trusted:
        trusted.refresh()
        channel = trusted.channel(MODEL)
        assert channel is not None
        assert (channel.target, channel.rolled_back) == ("", True)
        assert trusted.release(channel.previous)[0].version == "1.0.0"
        assert trusted.policy().revoked == {bad.identity: "wrong at night"}
        with pytest.raises(refusals.MissingError, match="withdrawn"):
            trusted.release(f"releases/{MODEL}/1.1.0/release.json")
    with pytest.raises(PublishError, match="was revoked"):
        repository.publish(bundles["1.1.0"])
    assert repository.publish(bundles["2.0.0"], channel="stable").version == "2.0.0"
    assert camera.wanted() == "2.0.0"


def test_what_is_revoked_has_to_be_clear(repository: Repository, bundles: dict[str, Path]) -> None:
    repository.publish(bundles["1.0.0"])
    repository.publish(edit(versioned(bundles["1.0.0"], bundles["1.0.0"].with_name("o"), "1.0.0"), name="other"))
    with pytest.raises(PublishError, match="published are: other 1"):
        repository.revoke("3.0.0")
    with pytest.raises(PublishError, match="of which model"):
        repository.revoke("1.0.0")
    assert len(repository.revoke("1.0.0", model="other")) == 1
    repository.set_policy(Policy(min_versions={MODEL: "1.0.0"}))
    assert repository.policy().min_versions == {MODEL: "1.0.0"}


def test_nothing_older_is_installed_any_more_and_no_channel_still_wants_it(
    repository: Repository, bundles: dict[str, Path], camera: Camera
) -> None:
    for version in ("1.0.0", "1.1.0"):
        repository.publish(bundles[version], channel="stable")
    repository.publish(bundles["2.0.0"])
    with pytest.raises(
        PublishError, match=r"channels/stable/.*: devices of it may still take 1\.1\.0; bring them all to 2"
    ):
        repository.refuse_older("2.0.0")
    targets = [f"releases/{MODEL}/{version}/release.json" for version in ("1.0.0", "2.0.0")]
    rolling = Channel(model=MODEL, target=targets[1], previous=targets[0], rollout="r", shares={"*": 0.5})
    for goes_back in (rolling, Channel(model=MODEL, previous=targets[0], rolled_back=True)):
        repository.set_channel("stable", goes_back)
        with pytest.raises(PublishError, match=r"still take 1\.0\.0"):
            repository.refuse_older("1.1.0")
    assert repository.policy().min_versions == {}, "a refusal changes nothing"
    repository.set_channel("stable", Channel(model=MODEL, target=targets[1], previous=targets[0]))
    assert repository.refuse_older("1.1.0") == MODEL
    with camera.open() as trusted:
        trusted.refresh()
        assert trusted.policy().min_versions == {MODEL: "1.1.0"}
        channel = trusted.channel(MODEL)
        assert channel is not None and (channel.target, channel.previous) == (targets[1], "")
    with pytest.raises(PublishError, match=r"is older than 1\.1\.0"):
        repository.publish(versioned(bundles["1.0.0"], bundles["1.0.0"].with_name("old"), "0.9.0"))
    with pytest.raises(PublishError, match="no such release"):
        repository.refuse_older("14.0.0")
    assert repository.refuse_older("1.0.0") == MODEL, "a mistake can be taken back"
    assert verify(repository) == []


# Keys of the root


def test_a_root_waits_for_keys_that_lie_apart(repository: Repository, camera: Camera, tmp_path: Path) -> None:
    camera.look()
    sticks = [tmp_path / f"stick-{number}" for number in (1, 2, 3)]
    for number, stick in enumerate(sticks, 1):
        stick.mkdir()
        [key] = repository.keys.folder.glob(f"root-{number}-*.pem")
        key.rename(stick / key.name)
    waiting = rotate(repository, ["timestamp"])
    assert waiting.pending is not None
    assert (waiting.missing, len(waiting.candidates)) == (2, 3)
    camera.look()
    first = sign(Repository(repository.kit, ask=ask, key_folders=sticks[:1]))
    assert (first.missing, [name.split()[0] for name in first.candidates]) == (1, ["root-2", "root-3"])
    elsewhere = Path(shutil.copy(waiting.pending, tmp_path / "2.root.json"))
    [pem] = sticks[2].glob("*.pem")
    assert len(sign_file(elsewhere, [pem], ask)) == 1
    shutil.copy(elsewhere, waiting.pending)
    assert sign(repository).pending is None
    assert not waiting.pending.exists()
    camera.look()
    assert verify(repository) == []
    with pytest.raises(PublishError, match="no root waits"):
        sign(repository)


def test_below_the_threshold_no_root_can_follow(repository: Repository, camera: Camera) -> None:
    """Two of three keys of the root are lost: nothing that is signed with the third alone is believed."""
    camera.look()
    for number in (2, 3):
        [key] = repository.keys.folder.glob(f"root-{number}-*.pem")
        key.unlink()
    waiting = rotate(repository, ["root-2", "root-3"])
    assert waiting.pending is not None and waiting.missing == 1
    forced = repository.folder / "metadata" / waiting.pending.name
    shutil.copy(waiting.pending, forced)
    with pytest.raises(refusals.UnsignedError, match=r"2\.root\.json: signed by 1 of the 2 keys"):
        camera.look()
    forced.unlink()
    camera.look()
    another = create(repository.kit.with_name("new"), ask)
    camera.url = str(another.folder)
    with pytest.raises(refusals.ForeignError):
        camera.look()
    shutil.rmtree(camera.state)
    camera.root.write_bytes(another.root())
    camera.look()


def test_a_key_that_lies_elsewhere_signs_by_its_uri(repository: Repository, camera: Camera, tmp_path: Path) -> None:
    """Any URI of securesystemslib, e.g. `file2:`; `test_hardware_key.py` has a token."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    plain = serialization.NoEncryption()
    private, public = tmp_path / "token.pem", tmp_path / "token.pub"
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    rotate(repository, ["targets"], uri=f"file2:{private}", public=public)
    again = open_repository(repository.kit)
    again.set_policy(Policy(min_versions={"a": "1"}))
    with camera.open() as trusted:
        trusted.refresh()
        assert trusted.policy().min_versions == {"a": "1"}
    private.unlink()
    with pytest.raises(SigningError, match="cannot be used"):
        open_repository(repository.kit).set_policy(Policy())
    with pytest.raises(SigningError, match="not a public key"):
        rotate(again, ["targets"], uri="hsm:2", public=tmp_path / "camera/root.json")


def test_a_second_repository_is_not_made_over_the_first(repository: Repository, tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="already"):
        create(repository.kit, ask)
    with pytest.raises(PublishError, match="3 of 2 root keys"):
        create(tmp_path / "k", ask, root_keys=2, threshold=3)
    with pytest.raises(SigningError, match="at least 8 characters"):
        create(tmp_path / "k", lambda name, new: "short")
    with pytest.raises(DamagedRepository, match="`eyas keys init`"):
        Repository(tmp_path / "nothing")


# Renewing, verifying, copying


def test_renewing_needs_no_passphrase_and_keeps_a_device_content(
    repository: Repository, bundles: dict[str, Path], camera: Camera
) -> None:
    start = time.time()
    repository.publish(bundles["1.0.0"], channel="stable")
    for days in range(6, 60, 6):
        now = start + days * DAY_S
        alone = Repository(repository.kit, now=lambda now=now: now)
        assert alone.renew() == []
        camera.time = now
        assert camera.wanted() == "1.0.0"
    alone = Repository(repository.kit, now=lambda: start + 320 * DAY_S)
    assert any("targets expires in" in warning and "--all" in warning for warning in alone.renew())
    open_repository(repository.kit, lambda: start + 320 * DAY_S).renew(everything=True)
    assert alone.renew() == []
    late = Repository(repository.kit, now=lambda: start + 680 * DAY_S)
    assert any("root expires in 50 days" in warning for warning in late.renew())


def test_a_server_with_a_wrong_clock_signs_nothing(
    repository: Repository, bundles: dict[str, Path], camera: Camera
) -> None:
    """It reads 1970, or was ahead for a day and is right again."""
    with pytest.raises(SigningError, match="clock reads 1970-01-01; set it"):
        open_repository(repository.kit, lambda: 5.0).publish(bundles["1.0.0"], channel="stable")
    open_repository(repository.kit, lambda: time.time() + 300 * DAY_S).publish(bundles["1.0.0"], channel="stable")
    camera.wanted()
    with pytest.raises(SigningError, match=r"but the repository was signed on .* `eyas keys rotate online`"):
        repository.renew()
    rotate(repository, ["online"])
    assert camera.wanted() == "1.0.0"
    assert verify(repository) == []


def test_verify_finds_what_a_device_would_stumble_over(repository: Repository, bundles: dict[str, Path]) -> None:
    release = repository.publish(bundles["1.0.0"], channel="stable")
    assert verify(repository) == []
    largest = max(release.variants[0].files, key=lambda file: file.size_bytes)
    blob = repository.folder / blob_path(largest.sha256)
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert any(f"{largest.path}: blob {largest.sha256[:8]} is damaged" in problem for problem in verify(repository))
    blob.unlink()
    assert any("cannot be read" in problem for problem in verify(repository))
    repository.publish(edit(bundles["1.0.0"], name="repaired"))
    assert verify(repository) == []
    change(repository.folder / "metadata/timestamp.json", lambda content: content.update(signatures=[]))
    assert verify(repository) == ["timestamp.json: not signed"]


def test_a_copy_is_whole_at_any_moment(repository: Repository, bundles: dict[str, Path], tmp_path: Path) -> None:
    """The copy to a stick that is pulled out: an older state stays readable until the new one is complete."""
    repository.publish(bundles["1.0.0"], channel="stable")
    stick = tmp_path / "stick"
    assert mirror(repository, stick).files > 10
    assert mirror(repository, stick).files == 0
    camera = Camera(tmp_path / "other", repository.root(), str(stick))
    assert camera.wanted() == "1.0.0"
    repository.publish(bundles["2.0.0"], channel="stable")
    copied: list[str] = []
    real = shutil.copyfile

    def recorded(source: Path, to: Path) -> None:
        copied.append(Path(source).relative_to(repository.folder).as_posix())
        assert camera.wanted() == "1.0.0"
        real(source, to)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eyas_host.fleet.updates.mirror.shutil.copyfile", recorded)
        mirror(repository, stick)
    order = [name.split("/")[0] for name in copied]
    assert order == sorted(order, key=["blobs", "targets", "metadata"].index)
    assert copied[-1] == "metadata/timestamp.json"
    assert camera.wanted() == "2.0.0"
    assert verify(repository, stick) == []
    with pytest.raises(CredentialError, match="is the stick mounted"):
        mirror(repository, tmp_path / "absent/stick")


def test_what_nothing_names_goes_after_a_while(
    repository: Repository, bundles: dict[str, Path], camera: Camera
) -> None:
    repository.publish(bundles["1.0.0"], channel="stable")
    repository.publish(bundles["2.0.0"], channel="stable")
    repository.revoke("1.0.0")
    assert prune(repository) == 0
    later = open_repository(repository.kit, lambda: time.time() + GRACE_S + 60)
    assert prune(later) > 5
    assert verify(later) == []
    assert camera.wanted() == "2.0.0"
    assert prune(later) == 0


def test_a_damaged_repository_is_named(repository: Repository) -> None:
    path = repository.folder / "metadata/timestamp.json"
    path.write_bytes(b"{")
    with pytest.raises(DamagedRepository, match=r"timestamp\.json: damaged .* restore"):
        repository.releases()
    path.unlink()
    with pytest.raises(DamagedRepository, match=r"timestamp\.json: missing"):
        repository.releases()


def test_two_writers_wait_for_each_other(repository: Repository, bundles: dict[str, Path], tmp_path: Path) -> None:
    import threading

    names = [f"model-{number}" for number in range(4)]
    paths = [edit(versioned(bundles["1.0.0"], tmp_path / name, "1.0.0"), name=name) for name in names]
    errors: list[BaseException] = []

    def publish(path: Path) -> None:
        try:
            open_repository(repository.kit).publish(path, channel="stable")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=publish, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []
    assert {release.model for release in repository.releases()} == set(names)
    assert verify(repository) == []


def test_a_passphrase_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eyas_host.fleet.updates.keys import given_passphrase

    monkeypatch.delenv("EYAS_KEY_PASSPHRASE", raising=False)
    assert given_passphrase(None) is None
    monkeypatch.setenv("EYAS_KEY_PASSPHRASE", PASSPHRASE)
    assert given_passphrase(None) == PASSPHRASE
    file = tmp_path / "secret"
    with pytest.raises(SigningError, match="No such file"):
        given_passphrase(file)
    file.write_text("\n")
    with pytest.raises(SigningError, match="first line is empty"):
        given_passphrase(file)
    file.write_text("from the file\nmore\n")
    assert given_passphrase(file) == "from the file"
