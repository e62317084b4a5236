"""Whatever is interrupted, at whatever step: the current slot holds a verified bundle."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eyas_device.bundle import GOLDEN, MANIFEST, SCHEMA, Artefact, Bundle, Manifest
from eyas_device.commands import install as install_verb
from eyas_device.commands import slots as slots_verb
from eyas_device.errors import BundleError, CheckFailed
from eyas_device.updates import slots as slots_module
from eyas_device.updates.release import MAX_BYTES
from eyas_device.updates.slots import SlotError, Slots
from tests.support import tiny
from tests.support.bundles import entry
from tests.support.cut_process import cut_at

VERSIONS = ("1.0.0", "2.0.0", "3.0.0")


class Bad(Exception):  # noqa: N818 - reads as the state it reports
    """What a proof raises that failed."""


def refuse(root: Path) -> None:
    raise Bad(str(root))


def accept(root: Path) -> None:
    Bundle.open(root)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small bundle a version, with a file in a folder of its own: hashes are right, no runtime could load them."""
    made = {}
    for version in VERSIONS:
        root = tmp_path_factory.mktemp(f"bundle-{version}")
        (root / "parts").mkdir()
        (root / "model.tflite").write_bytes(version.encode() * 1000)
        (root / "parts" / "weights.bin").write_bytes(version.encode() * 5000)
        (root / "CARD.md").write_text(f"card of {version}")
        files = (
            entry(root / "model.tflite"),
            msgspec.structs.replace(entry(root / "parts" / "weights.bin"), path="parts/weights.bin"),
        )
        manifest = Manifest(
            schema=SCHEMA,
            name="slotted",
            version=version,
            labels=tiny.LABELS,
            preprocessing=tiny.SPEC,
            artefacts=(Artefact("litert-fp32", "litert", "fp32", files),),
            use={"litert": "litert-fp32"},
        )
        (root / MANIFEST).write_bytes(msgspec.json.encode(manifest))
        made[version] = root
    return made


def version_of(slots: Slots) -> str | None:
    """The version of the current bundle, which must be whole."""
    current = slots.current()
    return None if current is None else Bundle.open(current).manifest.version


@pytest.fixture
def crash(tmp_path: Path) -> Callable[[Callable[[], object], int], bool]:
    return partial(cut_at, tmp_path)


def test_first_and_second_installation(tmp_path: Path, bundles: dict[str, Path]) -> None:
    slots = Slots(tmp_path / "state")
    assert slots.current() is None
    assert slots.inactive() == tmp_path / "state/slots/a"
    first = slots.install(bundles["1.0.0"], check=accept)
    assert (first.name, version_of(slots)) == ("a", "1.0.0")
    second = slots.install(bundles["2.0.0"], check=accept)
    assert (second.name, version_of(slots), slots.inactive().name) == ("b", "2.0.0", "a")
    assert (slots.folder / "current").readlink() == Path("b")
    assert (second / "CARD.md").read_text() == "card of 2.0.0"
    assert slots.roll_back() == first
    assert version_of(slots) == "1.0.0"
    assert slots.install(bundles["3.0.0"], check=accept) == second
    assert [state.version for state in slots.states()] == ["1.0.0", "3.0.0"]
    assert [(state.current, state.good) for state in slots.states()] == [(False, True), (True, True)]


def test_the_same_bundle_again_is_checked_but_not_copied(tmp_path: Path, bundles: dict[str, Path]) -> None:
    slots = Slots(tmp_path)
    first = slots.install(bundles["1.0.0"], check=accept)
    checked: list[Path] = []
    assert slots.install(bundles["1.0.0"], check=checked.append) == first
    assert checked == [first]
    assert not (slots.folder / "b").exists()
    with pytest.raises(Bad):
        slots.install(bundles["1.0.0"], check=refuse)
    assert version_of(slots) == "1.0.0"


def test_a_failed_check_leaves_the_current_slot(tmp_path: Path, bundles: dict[str, Path]) -> None:
    slots = Slots(tmp_path)
    with pytest.raises(Bad):
        slots.install(bundles["1.0.0"], check=refuse)
    assert slots.current() is None
    slots.install(bundles["1.0.0"], check=accept)
    with pytest.raises(Bad):
        slots.install(bundles["2.0.0"], check=refuse)
    assert version_of(slots) == "1.0.0"
    with pytest.raises(SlotError, match="no good slot to switch back to"):
        slots.roll_back()


def test_a_crash_at_any_step(tmp_path: Path, bundles: dict[str, Path], crash: Callable[..., bool]) -> None:
    ran, at = 0, 0
    while True:
        state = tmp_path / str(at)
        slots = Slots(state)
        first = crash(lambda s=slots: s.install(bundles["1.0.0"], check=accept), at)
        assert version_of(slots) in (None, "1.0.0")
        slots.install(bundles["1.0.0"], check=accept)
        slots.install(bundles["2.0.0"], check=accept)
        second = crash(lambda s=slots: s.install(bundles["3.0.0"], check=accept), at)
        assert version_of(slots) in ("2.0.0", "3.0.0")
        slots.install(bundles["3.0.0"], check=accept)
        assert version_of(slots) == "3.0.0"
        slots.roll_back()
        third = crash(slots.roll_back, at)
        assert version_of(slots) in ("2.0.0", "3.0.0")
        if not (first or second or third):
            break
        ran, at = ran + 1, at + 1
        shutil.rmtree(state)
    assert ran > 15


STEPS = st.lists(
    st.tuples(st.sampled_from(["install", "fail", "roll back", "spoil link", "spoil inactive"]), st.integers(0, 2),
              st.none() | st.integers(0, 36)),
    max_size=8,
)  # fmt: skip


@given(steps=STEPS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_history(steps: list[tuple[str, int, int | None]], bundles: dict[str, Path]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        slots = Slots(Path(folder))
        for action, number, at in steps:
            before, version = version_of(slots), VERSIONS[number]
            allowed: set[str | None] = {before}
            if action == "spoil link":
                link = slots.folder / "current"
                if link.is_symlink():
                    link.unlink()
                    link.symlink_to("nowhere")
                    allowed |= {state.version for state in slots.states() if state.good}
            elif action == "spoil inactive":
                victim = slots.inactive() / "model.tflite"
                if victim.parent == slots.current():  # it was refused when it was checked again
                    allowed |= {state.version for state in slots.states() if state.good}
                if victim.exists():
                    victim.write_bytes(b"spoilt")
            else:

                def work(action: str = action, version: str = version) -> None:
                    if action == "roll back":
                        slots.roll_back()
                    else:
                        slots.install(bundles[version], check=refuse if action == "fail" else accept)

                good = {state.version for state in slots.states() if state.good}
                if action == "install":
                    allowed.add(version)
                if action == "roll back" and before is not None:
                    allowed |= good
                if at is not None:
                    cut_at(Path(folder), work, at, may_fail=True)
                else:
                    try:
                        work()
                        allowed -= {before} if action == "roll back" and len(good) == 2 else set()
                        allowed = {version} if action == "install" else allowed
                    except (Bad, SlotError):
                        assert action != "install"
                        allowed = {before}
            after = version_of(slots)
            assert after in allowed, (action, version, at)
            assert after is not None or before is None, "went dark"


def test_files_are_on_the_disk_before_the_marker_and_the_marker_before_the_link(
    tmp_path: Path, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(slots_module, "_step", done.append)
    Slots(tmp_path).install(bundles["1.0.0"], check=lambda root: done.append("check"))
    order = [
        "unmark a",
        "sync slots",
        "clear a",
        "copy parts/weights.bin",
        "synced weights.bin",
        "sync parts",
        "sync a",
    ]
    order += ["check", "mark a", "synced .a.good", "marked a", "sync slots", "link a", "sync slots", "linked a"]
    rest = iter(done)
    assert all(step in rest for step in order), done
    assert done[-1] == "sync slots"


def test_the_marker_is_gone_and_the_link_is_there_all_the_time(
    tmp_path: Path, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = Slots(tmp_path)
    slots.install(bundles["1.0.0"], check=accept)
    steps: list[str] = []

    def on_step(name: str) -> None:
        steps.append(name)
        assert (slots.folder / "current").is_symlink()
        if name.startswith(("clear b", "copy", "sync b", "mark b")):
            assert not (slots.folder / "b.good").exists(), name

    monkeypatch.setattr(slots_module, "_step", on_step)
    slots.install(bundles["2.0.0"], check=accept)
    slots.roll_back()
    slots.install(bundles["2.0.0"], check=accept)  # a slot is not good until its bundle has been checked again
    assert len(steps) > 20


@pytest.mark.parametrize("how", ["link", "pipe", "grown"])
def test_a_file_that_changes_while_it_is_copied(
    how: str, tmp_path: Path, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(bundles["1.0.0"], tmp_path / "source"))
    model = source / "model.tflite"

    def swap(name: str) -> None:
        if name == "copy model.tflite":
            content = model.read_bytes()
            model.unlink()
            if how == "link":
                (source / "same").write_bytes(content)
                model.symlink_to("same")
            elif how == "pipe":
                os.mkfifo(model)
            else:
                model.write_bytes(content + b"more")

    monkeypatch.setattr(slots_module, "_step", swap)
    slots = Slots(tmp_path / "state")
    with pytest.raises(BundleError, match=r"model\.tflite"):
        slots.install(source, check=accept)
    assert slots.current() is None


def test_a_damaged_current_slot_falls_back_and_is_never_preferred(tmp_path: Path, bundles: dict[str, Path]) -> None:
    slots = Slots(tmp_path)
    slots.install(bundles["1.0.0"], check=accept)
    current = slots.install(bundles["2.0.0"], check=accept)
    (current / "model.tflite").write_bytes(b"rot")
    assert version_of(slots) == "1.0.0"
    assert slots.inactive() == current
    slots.install(bundles["3.0.0"], check=accept)
    assert version_of(slots) == "3.0.0"
    assert version_of(Slots(tmp_path)) == "3.0.0"


@pytest.mark.parametrize("target", ["nowhere", "../slots/a", "/", "a.good", ""])
def test_a_damaged_link(target: str, tmp_path: Path, bundles: dict[str, Path]) -> None:
    slots = Slots(tmp_path)
    slots.install(bundles["1.0.0"], check=accept)
    link = slots.folder / "current"
    link.unlink()
    if target:
        link.symlink_to(target)
    else:
        link.mkdir()
        (link / "junk").touch()
    assert version_of(slots) == "1.0.0"
    slots.install(bundles["1.0.0"], check=accept)
    assert link.readlink() == Path("a")


def test_without_the_link_a_slot_that_was_refused_comes_last(tmp_path: Path, bundles: dict[str, Path]) -> None:
    slots = Slots(tmp_path)
    slots.install(bundles["1.0.0"], check=accept)
    slots.refuse("a", "wrong on real frames")
    slots.install(bundles["2.0.0"], check=accept)
    (slots.folder / "current").unlink()
    assert version_of(slots) == "2.0.0"


def test_a_slot_that_is_a_link_is_not_good_and_its_target_is_not_touched(
    tmp_path: Path, bundles: dict[str, Path]
) -> None:
    slots = Slots(tmp_path / "state")
    slots.install(bundles["1.0.0"], check=accept)
    shutil.move(slots.folder / "a", tmp_path / "elsewhere")
    (slots.folder / "a").symlink_to(tmp_path / "elsewhere")
    assert slots.current() is None
    slots.install(bundles["2.0.0"], check=accept)
    assert version_of(slots) == "2.0.0"
    assert (tmp_path / "elsewhere" / MANIFEST).is_file()


def test_a_full_disk(tmp_path: Path, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    slots = Slots(tmp_path)
    slots.install(bundles["1.0.0"], check=accept)
    slots.install(bundles["2.0.0"], check=accept)
    statvfs = os.statvfs(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: os.statvfs_result([*statvfs[:4], 0, *statvfs[5:]]))
        with pytest.raises(SlotError, match="free some space"):
            slots.install(bundles["3.0.0"], check=accept)
    assert all(state.good for state in slots.states()), "the other slot was cleared before the check"
    assert version_of(slots) == "2.0.0"

    fsync = os.fsync

    def full(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == "weights.bin":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SlotError, match=r"No space left.*free some space"):
            slots.install(bundles["3.0.0"], check=accept)
    assert version_of(slots) == "2.0.0"
    assert not (slots.folder / "a").exists()
    slots.install(bundles["3.0.0"], check=accept)
    assert version_of(slots) == "3.0.0"


def test_two_installers(tmp_path: Path, bundles: dict[str, Path]) -> None:
    slots = Slots(tmp_path)
    slots.install(bundles["1.0.0"], check=accept)
    with (slots.folder / ".lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for attempt in (lambda: slots.install(bundles["2.0.0"], check=accept), slots.roll_back):
            with pytest.raises(SlotError, match="another installation"):
                attempt()
        assert version_of(slots) == "1.0.0"
    slots.install(bundles["2.0.0"], check=accept)
    assert version_of(slots) == "2.0.0"


def spoil(bundle: Path, how: str) -> None:
    """Make a bundle hostile in one way."""
    model = bundle / "litert-int8.tflite"
    if how == "link":
        model.rename(bundle / "real")
        model.symlink_to("real")
    elif how == "linked manifest":
        (bundle / MANIFEST).rename(bundle / "real")
        (bundle / MANIFEST).symlink_to("real")
    elif how == "linked card":
        (bundle / "CARD.md").symlink_to("/etc/hostname")
    elif how == "pipe":
        model.unlink()
        os.mkfifo(model)
    elif how == "huge manifest":
        os.truncate(bundle / MANIFEST, 1 << 33)
    elif how == "deep manifest":
        (bundle / MANIFEST).write_bytes(b'{"schema":' + b"[" * 100_000)
    elif how == "changed byte":
        model.write_bytes(model.read_bytes()[:-1] + b"!")
    elif how == "cut off":
        os.truncate(model, 100)
    else:
        tree = msgspec.json.decode((bundle / MANIFEST).read_bytes())
        file = tree["artefacts"][0]["files"][0]
        if how == "huge size":
            file["size_bytes"] = 1 << 50
        elif how == "negative size":
            file["size_bytes"] = -(1 << 40)
        elif how == "many files":
            tree["artefacts"][0]["files"] = [{**file, "path": f"f{n}"} for n in range(1000)]
        else:
            file["path"] = how
        (bundle / MANIFEST).write_bytes(msgspec.json.encode(tree))


@pytest.mark.parametrize(
    "how",
    ["link", "linked manifest", "linked card", "pipe", "huge manifest", "deep manifest", "changed byte", "cut off",
     "huge size", "negative size", "many files", "../outside", "/etc/passwd", "a//b", "./a", "x\\y", MANIFEST,
     "CARD.md", "d/d/d/d/d", "n" * 300],
)  # fmt: skip
def test_hostile_bundles(how: str, tmp_path: Path, bundle_root: Path, pristine_bundle: Path) -> None:
    slots = Slots(tmp_path / "state")
    slots.install(pristine_bundle, check=accept)
    spoil(bundle_root, how)
    with pytest.raises(BundleError):
        slots.install(bundle_root, check=accept)
    assert version_of(slots) == "1.2.3"
    assert {path.name for path in slots.folder.iterdir()} == {"a", "a.good", "current", ".lock", ".a.lock"}


def test_the_golden_check_of_a_real_bundle(
    tmp_path: Path, bundle_root: Path, edit_manifest: Callable[..., None]
) -> None:
    slots = Slots(tmp_path / "state")
    slots.install(bundle_root)
    assert version_of(slots) == "1.2.3"
    edit_manifest(version="1.2.4", golden_tolerance=0.0)
    with pytest.raises(CheckFailed, match=r"good here: litert-int8 on litert: .*golden check"):
        slots.install(bundle_root)
    assert version_of(slots) == "1.2.3"
    edit_manifest(version="1.2.5", golden=None)
    (bundle_root / GOLDEN).unlink()
    with pytest.raises(BundleError, match="no golden images"):
        slots.install(bundle_root)
    assert version_of(slots) == "1.2.3"


def test_an_unreadable_or_unwritable_state(tmp_path: Path, bundles: dict[str, Path]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SlotError, match="cannot be written"):
        Slots(tmp_path / "file").install(bundles["1.0.0"], check=accept)
    assert Slots(tmp_path / "file").current() is None


def run(verb: object, *argv: object) -> int:
    """A verb by itself, as the command line calls it."""
    import argparse

    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)  # type: ignore[attr-defined]
    return int(verb.main(parser.parse_args([str(word) for word in argv])))  # type: ignore[attr-defined]


def test_the_verbs(
    tmp_path: Path, bundle_root: Path, edit_manifest: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    assert run(install_verb, bundle_root, "--state", state) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"tiny-shapes 1.2.3 is now current: slot a, {state}/slots/a\ngood here: tiny-shapes 1.2.3: ")
    assert run(install_verb, bundle_root, "--state", state) == 0
    assert "was already current" in capsys.readouterr().out
    edit_manifest(version="1.3.0")
    assert run(install_verb, bundle_root, "--state", state, "--json") == 0
    slot = msgspec.json.decode(capsys.readouterr().out)
    assert (slot["slot"], slot["version"], slot["changed"]) == ("b", "1.3.0", True)
    assert run(slots_verb, "--state", state, "--roll-back") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["*", "a", "tiny-shapes", "1.2.3", "good"]
    assert lines[1].split() == ["b", "tiny-shapes", "1.3.0", "good"]
    with pytest.raises(SlotError):
        (state / "slots/b/manifest.json").unlink()
        run(slots_verb, "--state", state, "--roll-back")


def test_the_release_of_a_slot_is_on_the_disk_before_the_switch_and_leaves_with_its_bundle(
    tmp_path: Path, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = Slots(tmp_path)
    slots.install(bundles["1.0.0"], check=accept, release=b'{"version": "1.0.0"}')
    found: dict[str, bytes | None] = {}
    monkeypatch.setattr(slots_module, "_step", lambda name: found.update({name: slots.release("b")}))
    slots.install(bundles["2.0.0"], check=accept, release=b'{"version": "2.0.0"}')
    assert found["link b"] == found["mark b"] == b'{"version": "2.0.0"}' and found["copy model.tflite"] is None
    assert slots.release("a") == b'{"version": "1.0.0"}'
    slots.install(bundles["2.0.0"], check=accept)
    assert slots.release("b") == b'{"version": "2.0.0"}', "the same bundle once more, by hand"
    slots.install(bundles["2.0.0"], check=accept, release=b'{"version": "2.0.0", "note": "again"}')
    assert slots.release("b") == b'{"version": "2.0.0", "note": "again"}'
    (slots.folder / "a.probation").write_text("{}")
    slots.install(bundles["3.0.0"], check=accept)
    assert slots.release("a") is None and not (slots.folder / "a.probation").exists(), "it was of another bundle"


@pytest.mark.parametrize("kind", ["pipe", "folder", "huge"])
def test_a_release_that_is_no_file_never_blocks(kind: str, tmp_path: Path, bundles: dict[str, Path]) -> None:
    slots = Slots(tmp_path)
    slots.install(bundles["1.0.0"], check=accept)
    path = slots.folder / "a.release"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as stream:
            stream.truncate(1 << 40)
    content = slots.release("a")
    assert content is None or len(content) == MAX_BYTES + 1
